"""The Hugging Face Hub through huggingface_hub: hf://datasets/OWNER/NAME[@REVISION]/FILE."""

from __future__ import annotations

from typing import Any

from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.data.storage.store import Store
from imgcls.errors import StorageError


class HubStore(Store):
    """The Hugging Face Hub, with the token and the endpoint of its own settings (HF_TOKEN)."""

    protocols = ("hf",)

    def build_file_system(self, protocol: str, settings: StorageConfig, account: str | None) -> Any:
        try:
            from huggingface_hub import HfFileSystem
        except ImportError as error:
            raise StorageError("requires huggingface_hub; run: pip install 'imgcls[hf]'") from error
        return HfFileSystem(use_listings_cache=False, token=False if settings.anon else None)
