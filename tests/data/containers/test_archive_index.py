"""Indexes of archives: members by name, kept in a folder for other processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from imgcls.data import image_files
from imgcls.data.containers import archive_index
from imgcls.data.containers.archive_index import ArchiveScan, Member, MemberIndex, build_index
from imgcls.data.containers.tar_archive import TarArchive
from imgcls.data.storage.range_file import RangeFile, open_ranges
from imgcls.data.storage.storage_settings import create_thread_pool
from tests.data.archives import write_tar
from tests.s3 import BUCKET, url


def test_an_index_finds_each_of_many_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_index, "_BATCH_MEMBERS", 64)
    members = [Member(f"{n}.jpg", 512 * n, n, n, n % 9, n, "") for n in range(300)]
    index = build_index(ArchiveScan(iter(members)))
    assert len(index) == 300
    for n in range(300):
        assert index.find(f"{n}.jpg") == members[n]
    assert index.find("300.jpg") is None
    assert list(index.iter_members()) == members
    assert index.replaced_count == 0


def test_an_index_of_no_members_is_empty() -> None:
    index = build_index(ArchiveScan(iter(())))
    assert len(index) == 0
    assert index.find("a.jpg") is None
    assert list(index.iter_members()) == []


def test_of_members_with_one_name_the_last_one_counts() -> None:
    names = ["a", "b", "a", "c", "b", "a"]
    members = [Member(name, at, 1, 1) for at, name in enumerate(names)]
    index = build_index(ArchiveScan(iter(members)))
    assert [index.find(name) for name in "abc"] == [members[5], members[4], members[3]]
    assert list(index.iter_members()) == members[3:]
    assert index.replaced_count == 3


def test_an_encoded_index_is_decoded_equal() -> None:
    members = [Member("a", 1, 2, 3, 8, 2**32 - 1, ""), Member("b", 2**40, 0, 0, 0, 0, "missing: x")]
    index = build_index(ArchiveScan(iter(members), damage="is cut", note="is old"))
    again = MemberIndex.decode(index.encode())
    assert list(again.iter_members()) == members
    assert (again.damage, again.note) == ("is cut", "is old")


class Scans:
    """Counts the scans of an archive."""

    def __init__(self) -> None:
        self.count = 0

    def load(self, file: RangeFile) -> MemberIndex:
        def scan() -> ArchiveScan:
            self.count += 1
            return TarArchive.scan(file)

        return archive_index.load_index("tar", file, scan)


def forget_indexes() -> None:
    """Forget what this process knows, as another process does not know it."""
    archive_index._indexes = type(archive_index._indexes)(100, len)


def test_the_index_of_an_archive_in_a_store_is_kept_for_other_processes(
    s3: Any, tmp_path: Path
) -> None:
    def put(members: dict[str, bytes]) -> None:
        with open(write_tar(tmp_path / "x.tar", members), "rb") as file:
            s3.upload_fileobj(file, BUCKET, "kept.tar")

    put({"a.jpg": b"one"})
    folder, scans = tmp_path / "indexes", Scans()
    assert scans.load(open_ranges(url("kept.tar"))).places == set()
    with archive_index.use_index_folder(str(folder)):
        scans.load(open_ranges(url("kept.tar")))
        assert len(os.listdir(folder)) == 1  # of the index that this process had before
        forget_indexes()
        assert scans.load(open_ranges(url("kept.tar"))).find("a.jpg") is not None
        assert scans.count == 1
        (kept,) = folder.iterdir()
        kept.write_bytes(b"damaged")
        forget_indexes()
        assert scans.load(open_ranges(url("kept.tar"))).find("a.jpg") is not None
        assert scans.count == 2
        put({"b.jpg": b"another"})
        assert scans.load(open_ranges(url("kept.tar"))).find("b.jpg") is not None
        assert scans.count == 3
        assert len(os.listdir(folder)) == 2


def test_the_index_of_a_large_local_archive_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_index, "MIN_KEPT_MEMBERS", 3)
    folder = tmp_path / "indexes"
    with archive_index.use_index_folder(str(folder)):
        for names in ("ab", "abc"):
            archive = write_tar(tmp_path / f"{names}.tar", dict.fromkeys(names, b""))
            image_files.read_image(f"tar://{archive}#a")
            assert folder.exists() == (names == "abc")


def test_the_folder_of_indexes_applies_in_a_thread_pool(tmp_path: Path) -> None:
    with (
        archive_index.use_index_folder(str(tmp_path)),
        create_thread_pool(1, "test") as pool,
    ):
        assert pool.submit(archive_index.get_index_folder).result() == str(tmp_path)
    assert archive_index.get_index_folder() is None
