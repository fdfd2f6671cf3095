"""Small archives for tests, written by the standard library."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgcls.data.manifests.manifest import ManifestConfig, open_manifest


def write_tar(path: Path, members: Mapping[str, bytes], **options: Any) -> str:
    """A tar with these members; returns its path."""
    with tarfile.open(path, "w", **options) as tar:
        add_members(tar, members)
    return str(path)


def add_members(tar: tarfile.TarFile, members: Mapping[str, bytes]) -> None:
    for name, data in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def write_zip(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> str:
    """A zip with these members; returns its path."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(path)


def rows_of(path: object, **options: Any) -> list[dict[str, Any]]:
    """The rows of a manifest."""
    manifest = open_manifest(ManifestConfig(path=str(path), **options))
    return [row for batch in manifest.batches() for row in batch.to_pylist()]
