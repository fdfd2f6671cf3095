from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgcls.data.storage import range_file
from imgcls.errors import StorageError, StorageMissing


def test_parts_of_a_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    file = range_file.open_ranges(str(path))
    assert file.size == 100
    assert file.read(10, 13) == bytes([10, 11, 12])
    assert file.read(99, 100) == bytes([99])
    with pytest.raises(StorageError, match="ends before"):
        file.read(99, 101)


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    path, new = tmp_path / "file", tmp_path / "new"
    path.write_bytes(b"old content")
    new.write_bytes(b"new content")
    file = range_file.open_ranges(str(path))
    os.replace(new, path)
    assert file.read(0, 3) == b"old"
    assert range_file.get_local_version(str(path)) != file.version


def test_a_file_that_is_written_over_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old content")
    file = range_file.open_ranges(str(path))
    path.write_bytes(b"new content of another size")
    with pytest.raises(StorageMissing, match="has changed since"):
        file.read(0, 3)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageMissing):
        range_file.open_ranges(str(tmp_path / "none"))
