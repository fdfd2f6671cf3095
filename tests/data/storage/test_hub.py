from __future__ import annotations

import sys

import pytest

from imgcls.data.storage import filesystem, object_store
from imgcls.errors import StorageError


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    object_store.build_store.cache_clear()
    with pytest.raises(StorageError, match=r"pip install 'imgcls\[hf\]'"):
        filesystem.exists("hf://datasets/owner/name/train.parquet")
