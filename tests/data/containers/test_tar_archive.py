"""Members of tar archives: their bytes, and an error for each that cannot be read."""

from __future__ import annotations

import gzip
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from imgcls.data import image_files
from imgcls.data.containers import archive_file, archive_index
from imgcls.data.containers.tar_archive import TarArchive, scan_tar
from imgcls.data.storage.range_file import open_ranges
from imgcls.data.storage.readahead import UNLIMITED
from imgcls.errors import (
    ImageError,
    StorageError,
    StorageMissing,
    StorageTooLarge,
    TruncatedImage,
)
from tests.data.archives import add_members, write_tar
from tests.s3 import BUCKET, url

LONG = "long/" * 60 + "name.jpg"


def read(archive: object, member: str, **options: Any) -> bytes:
    return image_files.read_image(f"tar://{archive}#{member}", **options)


def fails(kind: type[Exception], archive: object, member: str, **options: Any) -> str:
    with pytest.raises((StorageError, ImageError)) as caught:
        read(archive, member, **options)
    assert type(caught.value) is kind, repr(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_each_format_are_read(tmp_path: Path, format: int) -> None:
    members = {"a.jpg": b"one", "./b/ü→#1.jpg": b"x" * 5000, "empty.jpg": b"", "c.jpg": b"three"}
    if format != tarfile.USTAR_FORMAT:
        members[LONG] = b"long"
    archive = write_tar(tmp_path / "x.tar", members, format=format)
    for name, data in members.items():
        assert read(archive, name) == data
        assert image_files.get_size(f"tar://{archive}#{name}") == len(data)
    assert read(archive, "b/ü→#1.jpg") == b"x" * 5000
    assert "has no member 'd.jpg'" in fails(StorageMissing, archive, "d.jpg")


def test_the_last_of_several_members_of_one_name_is_read(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"old", "b.jpg": b"b"})
    with tarfile.open(archive, "a") as tar:
        add_members(tar, {"./a.jpg": b"new"})
    assert read(archive, "a.jpg") == b"new"
    index = TarArchive(archive).index
    assert [member.name for member in index.iter_members()] == ["b.jpg", "a.jpg"]
    assert index.replaced_count == 1


def test_links_are_followed_within_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add_members(tar, {"d/a.jpg": b"one"})
        for name, kind, target in (
            ("hard.jpg", tarfile.LNKTYPE, "d/a.jpg"),
            ("d/soft.jpg", tarfile.SYMTYPE, "a.jpg"),
            ("e/up.jpg", tarfile.SYMTYPE, "../d/a.jpg"),
            ("twice.jpg", tarfile.LNKTYPE, "hard.jpg"),
            ("loop.jpg", tarfile.SYMTYPE, "loop.jpg"),
            ("out.jpg", tarfile.SYMTYPE, "../../etc/passwd"),
            ("root.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("fifo.jpg", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    for name in ("hard.jpg", "d/soft.jpg", "e/up.jpg", "twice.jpg"):
        assert read(path, name) == b"one"
        assert image_files.get_size(f"tar://{path}#{name}") == 3
    assert "a link to other links" in fails(StorageMissing, path, "loop.jpg")
    for name in ("out.jpg", "root.jpg"):
        assert "not in the archive" in fails(StorageMissing, path, name)
    assert "FIFO" in fails(StorageError, path, "fifo.jpg")


def test_a_sparse_member_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.size": "3", "GNU.sparse.numblocks": "0"}
    with tarfile.open(path, "w") as tar:
        tar.addfile(info)
    assert "sparse" in fails(StorageError, path, "a.jpg")


def test_a_sparse_member_that_is_larger_than_the_archive_does_not_end_it(tmp_path: Path) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(1_000_000)
    (tmp_path / "b.jpg").write_bytes(b"one")
    for format in ("gnu", "pax"):
        archive = f"{tmp_path}/{format}.tar"
        options = [f"--format={format}", "--sparse", "-C", str(tmp_path)]
        subprocess.run(["tar", "-cf", archive, *options, "a.jpg", "b.jpg"], check=True)
        assert "sparse" in fails(StorageError, archive, "a.jpg")
        assert read(archive, "b.jpg") == b"one"
        assert TarArchive(archive).index.note == ""


def test_names_that_are_not_utf_8_are_escaped(tmp_path: Path) -> None:
    names = {os.fsdecode(b"caf\xe9.jpg"): b"one", os.fsdecode(b"caf\xe8.jpg"): b"two"}
    archive = write_tar(tmp_path / "x.tar", names, format=tarfile.GNU_FORMAT)
    index = TarArchive(archive).index
    assert [member.name for member in index.iter_members()] == [r"caf\xe9.jpg", r"caf\xe8.jpg"]
    assert read(archive, r"caf\xe9.jpg") == b"one"
    assert read(archive, r"caf\xe8.jpg") == b"two"


def test_names_outside_the_archive_are_only_names(tmp_path: Path) -> None:
    members = {"/etc/a.jpg": b"one", "../b.jpg": b"two"}
    archive = write_tar(tmp_path / "x.tar", members)
    assert read(archive, "/etc/a.jpg") == b"one"
    assert read(archive, "../b.jpg") == b"two"
    assert os.listdir(tmp_path) == ["x.tar"]


def test_a_member_over_the_limit_is_not_read(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"x" * 1000})
    assert read(archive, "a.jpg", max_bytes=1000) == b"x" * 1000
    assert "1,000 bytes" in fails(StorageTooLarge, archive, "a.jpg", max_bytes=999)


def test_an_archive_cut_in_a_member_keeps_the_others(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"one", "b.jpg": b"x" * 2000, "c.jpg": b"c"})
    os.truncate(archive, 512 + 512 + 512 + 1000)
    assert read(archive, "a.jpg") == b"one"
    assert "the archive ends before" in fails(TruncatedImage, archive, "b.jpg")
    assert TarArchive(archive).index.note == "is cut: its last member 'b.jpg' is not complete"
    fails(StorageMissing, archive, "c.jpg")


@pytest.mark.parametrize(
    ("size", "damage", "note"),
    [
        (1024 + 100, "damaged or cut header at byte 1,024", ""),
        (1024, "", "has no end mark"),
        (10240, "", ""),
    ],
)
def test_the_end_of_an_archive_is_checked(
    tmp_path: Path, size: int, damage: str, note: str
) -> None:
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"one", "b.jpg": b"two"})
    os.truncate(archive, size)
    index = TarArchive(archive).index
    assert damage in index.damage
    assert note in index.note
    assert (bool(index.damage), bool(index.note)) == (bool(damage), bool(note))


def test_a_damaged_header_is_found(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"one", "b.jpg": b"two"})
    with open(archive, "r+b") as file:
        file.seek(1024 + 130)
        file.write(b"7")
    index = TarArchive(archive).index
    assert "damaged or cut header at byte 1,024 of 10,240 (bad checksum)" in index.damage
    assert "damaged or cut header" in fails(StorageMissing, archive, "b.jpg")


def test_archives_joined_by_cat_are_found(tmp_path: Path) -> None:
    one = Path(write_tar(tmp_path / "1.tar", {"a.jpg": b"one"}))
    joined = tmp_path / "x.tar"
    joined.write_bytes(one.read_bytes() * 2)
    assert "has data after its end at byte 1,024" in TarArchive(str(joined)).index.damage


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"no tar" * 500, "is not a tar archive"),
        (b"short", "is not a tar archive"),
        (gzip.compress(b"x" * 2000, mtime=0), "decompress it with `gunzip -k x.tar`"),
    ],
    ids=["empty", "no tar", "short", "gzip"],
)
def test_a_file_that_is_no_tar_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    assert message in fails(StorageError, path, "a.jpg")


def test_an_archive_that_is_replaced_is_opened_again(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"one"})
    assert read(archive, "a.jpg") == b"one"
    write_tar(tmp_path / "new.tar", {"b.jpg": b"b" * 600, "a.jpg": b"two"})
    os.replace(tmp_path / "new.tar", archive)
    assert read(archive, "a.jpg") == b"two"


def test_a_member_whose_header_has_changed_is_an_error(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"one", "b.jpg": b"two"})
    opened, found = TarArchive(archive), os.stat(archive)
    with open(archive, "r+b") as file:
        file.write(b"c.jpg")
    os.utime(archive, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert opened.read("b.jpg", UNLIMITED) == b"two"
    with pytest.raises(StorageMissing, match="has changed since"):
        opened.read("a.jpg", UNLIMITED)


def test_small_texts_are_kept_by_a_scan(tmp_path: Path) -> None:
    texts = {"a.cls": b"3", "a.jpg": b"x", "a.json": b"{}", "b.txt": b"x" * 100_000}
    scan = scan_tar(open_ranges(write_tar(tmp_path / "x.tar", texts)))
    assert len(list(scan.members)) == 4
    assert scan.texts == {"a.cls": b"3", "a.json": b"{}"}


def test_an_archive_in_a_store_is_read_by_ranges(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_file, "BLOCK_BYTES", 50_000)
    members = {f"{i}.jpg": bytes([i]) * 3000 for i in range(99)}
    members["large.jpg"] = bytes(200_000)
    with open(write_tar(tmp_path / "x.tar", members), "rb") as file:
        s3.upload_fileobj(file, BUCKET, "x.tar")
    names = [f"tar://{url('x.tar')}#{name}" for name in members]
    assert list(image_files.read_ahead(names)) == list(members.values())
    assert image_files.read_image(names[17]) == members["17.jpg"]


def test_an_archive_that_is_replaced_in_a_store_during_a_run_is_an_error(
    s3: Any, tmp_path: Path
) -> None:
    def put(members: dict[str, bytes]) -> None:
        with open(write_tar(tmp_path / "x.tar", members), "rb") as file:
            s3.upload_fileobj(file, BUCKET, "x.tar")

    put({"a.jpg": b"one", "b.jpg": b"two"})
    with archive_index.use_index_folder(str(tmp_path / "indexes")):
        assert read(url("x.tar"), "a.jpg") == b"one"
        put({"a.jpg": b"ONE", "b.jpg": b"TWO"})
        assert "has changed since it was opened" in fails(StorageMissing, url("x.tar"), "b.jpg")
    assert read(url("x.tar"), "a.jpg") == b"ONE"
    put({"c.jpg": b"three"})
    assert read(url("x.tar"), "c.jpg") == b"three"
