"""Members of zip archives: their bytes, and an error for each that cannot be read."""

from __future__ import annotations

import os
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from imgcls.data import image_files
from imgcls.data.containers import archive_file
from imgcls.data.containers.zip_archive import ZipArchive, scan_zip
from imgcls.data.storage.range_file import open_ranges
from imgcls.errors import ImageError, StorageError, StorageMissing, StorageTooLarge
from tests.data.archives import write_zip
from tests.s3 import BUCKET, url


def read(archive: object, member: str, **options: Any) -> bytes:
    return image_files.read_image(f"zip://{archive}#{member}", **options)


def fails(kind: type[Exception], archive: object, member: str, **options: Any) -> str:
    with pytest.raises((StorageError, ImageError)) as caught:
        read(archive, member, **options)
    assert type(caught.value) is kind, repr(caught.value)
    return str(caught.value)


def patch(archive: object, old: bytes, new: bytes, *, last: bool) -> None:
    """Replace some bytes, at the first or the last place where they are."""
    data = Path(str(archive)).read_bytes()
    at = data.rfind(old) if last else data.find(old)
    Path(str(archive)).write_bytes(data[:at] + new + data[at + len(old) :])


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", [b"", b"#!/bin/sh\n"], ids=["plain", "self-extracting"])
def test_members_are_read(tmp_path: Path, method: int, prefix: bytes) -> None:
    noise = random.Random(0).randbytes(5000)
    members = {"a.jpg": noise, "./b/ü→#1.jpg": b"x" * 5000, "empty.jpg": b""}
    archive = Path(write_zip(tmp_path / "x.zip", members, method))
    archive.write_bytes(prefix + archive.read_bytes())
    for name, data in members.items():
        assert read(archive, name) == data
        assert image_files.get_size(f"zip://{archive}#{name}") == len(data)
    assert "has no member 'd.jpg'" in fails(StorageMissing, archive, "d.jpg")


def test_the_members_are_those_of_zipfile(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("folder")
        for number in range(300):
            with archive.open(f"folder/{number}é.jpg", "w", force_zip64=number % 2 == 1) as member:
                member.write(bytes(number))
        archive.comment = b"a comment"
    with zipfile.ZipFile(path) as archive:
        expected = [
            (i.filename, i.header_offset, i.file_size, i.compress_size, i.CRC)
            for i in archive.infolist()
            if not i.is_dir()
        ]
    found = list(scan_zip(open_ranges(str(path))).members)
    assert [(m.name, m.offset, m.size, m.stored, m.crc) for m in found] == expected
    assert read(path, "folder/299é.jpg") == bytes(299)


def test_zip64_archives_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    members = {f"{number}.jpg": bytes([number]) * 500 for number in range(10)}
    archive = write_zip(tmp_path / "x.zip", members)
    assert b"PK\x06\x06" in Path(archive).read_bytes()
    for name, data in members.items():
        assert read(archive, name) == data


def test_a_comment_may_look_like_the_end_of_an_archive(tmp_path: Path) -> None:
    path = Path(write_zip(tmp_path / "x.zip", {"a.jpg": b"one"}))
    comment = b"PK\x05\x06" * 20
    path.write_bytes(path.read_bytes()[:-2] + struct.pack("<H", len(comment)) + comment)
    assert read(path, "a.jpg") == b"one"


def test_names_outside_the_archive_are_only_names(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "x.zip", {"/etc/a.jpg": b"one", "../b.jpg": b"two"})
    assert read(archive, "/etc/a.jpg") == b"one"
    assert read(archive, "../b.jpg") == b"two"
    assert os.listdir(tmp_path) == ["x.zip"]


class RawName(zipfile.ZipInfo):
    """A member whose name is written as these bytes, without the flag for UTF-8."""

    raw = b""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802
        return self.raw, self.flag_bits & ~0x800


def write_raw_name(path: Path, raw: bytes, extra: bytes = b"", host: int = 3) -> list[str]:
    """The names of the members of an archive with one of this name."""
    info = RawName("x.jpg")
    info.raw, info.extra, info.create_system = raw, extra, host
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, b"one")
    members = list(scan_zip(open_ranges(str(path))).members)
    assert [read(path, member.name) for member in members] == [b"one"] * len(members)
    return [member.name for member in members]


def test_names_are_decoded_by_what_they_are(tmp_path: Path) -> None:
    path, name = tmp_path / "x.zip", "café/1.jpg"
    assert write_raw_name(path, name.encode()) == [name]  # Info-ZIP on Linux, macOS
    assert write_raw_name(path, name.encode("cp437")) == [name]
    for checksum, found in ((zlib.crc32(b"caf_/1.jpg"), name), (0, "caf_/1.jpg")):
        field = struct.pack("<BL", 1, checksum) + name.encode()
        extra = struct.pack("<2HL2H", 0x5455, 4, 0, 0x7075, len(field)) + field
        assert write_raw_name(path, b"caf_/1.jpg", extra) == [found]


@pytest.mark.parametrize(
    ("name", "host", "found"),
    [
        ("cats\\1.jpg", 0, "cats/1.jpg"),
        ("cats\\1.jpg", 10, "cats/1.jpg"),
        ("cats\\1.jpg", 3, "cats\\1.jpg"),  # a name on Linux
        ("cats/1\\2.jpg", 0, "cats/1\\2.jpg"),
    ],
)
def test_folders_of_windows_are_folders(tmp_path: Path, name: str, host: int, found: str) -> None:
    assert write_raw_name(tmp_path / "x.zip", name.encode(), host=host) == [found]


def test_a_backslash_within_a_character_is_no_folder(tmp_path: Path) -> None:
    raw = "\u8868.jpg".encode("shift-jis")
    assert raw[1:2] == b"\\"
    assert write_raw_name(tmp_path / "x.zip", raw, host=0) == [raw.decode("cp437")]


def test_a_member_over_the_limit_is_not_decompressed(tmp_path: Path) -> None:
    members = {"a.jpg": bytes(1_000_000)}
    archive = write_zip(tmp_path / "x.zip", members, zipfile.ZIP_DEFLATED)
    assert os.path.getsize(archive) < 2000
    assert "1,000,000 bytes" in fails(StorageTooLarge, archive, "a.jpg", max_bytes=999_999)
    assert len(read(archive, "a.jpg", max_bytes=1_000_000)) == 1_000_000


def test_a_member_that_is_larger_than_declared_is_too_large(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "x.zip", {"a.jpg": bytes(1_000_000)}, zipfile.ZIP_DEFLATED)
    patch(archive, struct.pack("<L", 1_000_000), struct.pack("<L", 1000), last=True)
    assert "more than the 1,000 bytes" in fails(StorageTooLarge, archive, "a.jpg", max_bytes=2000)


def test_damaged_members_are_errors(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(5000)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        archive = write_zip(tmp_path / "x.zip", {"a.jpg": noise, "b.jpg": b"two"}, method)
        patch(archive, noise[2000:2008], b"xxxxxxxx", last=False)
        assert "damaged" in fails(ImageError, archive, "a.jpg")
        assert read(archive, "b.jpg") == b"two"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (8, 1, "is encrypted"),
        (10, 14, "method 14 (LZMA)"),
        (10, 77, "method 77 (unknown)"),
        (10, 99, "is encrypted"),
    ],
)
def test_members_that_cannot_be_read_name_the_reason(
    tmp_path: Path, field: int, value: int, message: str
) -> None:
    archive = Path(write_zip(tmp_path / "x.zip", {"a.jpg": b"one"}))
    data = bytearray(archive.read_bytes())
    struct.pack_into("<H", data, data.rfind(b"PK\x01\x02") + field, value)
    archive.write_bytes(data)
    assert message in fails(StorageError, archive, "a.jpg")


def test_a_symbolic_link_is_an_error(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("a.jpg")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert "symbolic link" in fails(StorageError, tmp_path / "x.zip", "a.jpg")


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    archive = Path(write_zip(tmp_path / "x.zip", {"a.jpg": b"one", "b.jpg": b"two"}))
    whole = archive.read_bytes()
    for content, message in (
        (b"", "not a zip archive"),
        (b"no zip", "not a zip archive"),
        (whole[:-30], "not a zip archive"),
        (whole.replace(b"PK\x01\x02", b"PK\x00\x00"), "central directory is damaged"),
        (whole[:60] + whole[90:], "central directory is damaged"),
    ):
        archive.write_bytes(content)
        with pytest.raises(StorageError, match=message):
            ZipArchive(str(archive))


def test_an_archive_in_a_store_is_read_by_ranges(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_file, "BLOCK_BYTES", 50_000)
    members = {f"{i}.jpg": bytes([i]) * 3000 for i in range(99)}
    with open(write_zip(tmp_path / "x.zip", members), "rb") as file:
        s3.upload_fileobj(file, BUCKET, "x.zip")
    names = [f"zip://{url('x.zip')}#{name}" for name in members]
    assert list(image_files.read_ahead(names)) == list(members.values())
