"""Settings of `imgcls doctor`. Imports neither Ray nor torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import PositiveFloat

from imgcls.config import Section
from imgcls.data.storage.storage_settings import StorageConfig


class CheckedStorageConfig(StorageConfig):
    """Folder to check, and access to its object store."""

    shorthand: ClassVar[str | None] = "url"

    url: str | None = None
    """Folder or URL that runs will write to; files are written below it and removed again."""


class DoctorConfig(Section):
    """Check a machine or a cluster."""

    address: str | None = None
    """Ray cluster to check: host:port of its head node, ray://host:port, or auto (default:
    RAY_ADDRESS, else the cluster that runs on this machine)."""
    start_ray: bool = False
    """Start Ray on this machine if no cluster runs, as other commands do, and check that."""
    timeout_s: PositiveFloat = 120.0
    """Maximum wait for the nodes' answers, in seconds."""
    json_lines: bool = False
    """Print one JSON object instead of text."""
    storage: CheckedStorageConfig = CheckedStorageConfig()
