"""Fingerprints of manifests: hashes by which a run recognizes the manifest of its plan."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from imgcls.data.storage import filesystem
from imgcls.errors import StorageError


def hash_files(files: Iterable[str]) -> str:
    """BLAKE2b of the bytes of files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        for block in filesystem.iter_blocks(file):
            digest.update(block)
        digest.update(b"\x00end of file\x00")
    return digest.hexdigest()


def hash_listing(files: Iterable[tuple[str, str | None]]) -> str:
    """BLAKE2b of the paths of image files, with their sizes on a disk.

    files: (path as in the rows, resolved path)
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, url in files:
        size = _get_file_size(url) if url is not None and filesystem.is_local(url) else 0
        digest.update(f"{path}\x00{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _get_file_size(url: str) -> int:
    try:
        return filesystem.size(url)
    except StorageError:
        return -1  # a dead link is a row, and fails as a row
