"""Configuration of `imgcls publish`."""

from __future__ import annotations

from typing import ClassVar

from imgcls.config import Section
from imgcls.data.storage.storage_settings import StorageConfig


class PublishConfig(Section):
    """Publish a committed run to a table."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: str
    """Output folder of a committed `imgcls predict`."""
    to: str
    """delta:URL_OR_PATH, iceberg:CATALOG.NAMESPACE.TABLE or hf:datasets/OWNER/NAME. A run is added
    once, however often it is published."""
    storage: StorageConfig = StorageConfig()
