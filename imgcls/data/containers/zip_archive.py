"""Zip archives: members are found by the central directory, and read by ranges.

The standard library's `zipfile` keeps about 1 KB per member in memory, and reads a local header
by a seek of its own. Source of the format: PKWARE APPNOTE 6.3.10.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterator

from imgcls.data.containers import archive_index
from imgcls.data.containers.archive import Archive
from imgcls.data.containers.archive_index import ArchiveScan, Member
from imgcls.data.storage.error_details import shorten_url
from imgcls.data.storage.range_file import RangeFile, changed_error
from imgcls.data.storage.readahead import ReadAllowance, too_large_error
from imgcls.errors import ImageError, StorageError, StorageTooLarge

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT_BYTES = 65_535
_LOCAL_EXTRA_BYTES = 64
"""Extra fields that a local header may have and the central directory not, in most archives."""
_DIRECTORY_BLOCK_BYTES = 4 << 20
_STORED, _DEFLATED = 0, 8
_METHODS = {
    9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd",
}  # fmt: skip
_AES = 99
_ENCRYPTED, _UTF8 = 0x1, 0x800
_ZIP64, _UNICODE_PATH = 1, 0x7075
_UNIX, _WINDOWS = 3, (0, 10)
"""Systems that wrote a member; Windows writes the numbers of FAT and of NTFS."""


class ZipArchive(Archive):
    """An opened zip archive."""

    kind = "zip"

    @classmethod
    def scan(cls, file: RangeFile) -> ArchiveScan:
        return scan_zip(file)

    def read(self, member: str, allowance: ReadAllowance) -> bytes:
        """Read a member and verify its CRC-32; raises as `Container.read`."""
        found = self.find_member(member)
        place = f"{self.url}#{member}"
        if allowance.is_exceeded_by(found.size):
            raise too_large_error(place, allowance.max_bytes, found.size)
        if found.method == _STORED and found.stored != found.size:
            raise ImageError(f"{shorten_url(place)}: its two sizes differ; write the archive again")
        if allowance.is_exceeded_by(found.stored):
            raise too_large_error(place, allowance.max_bytes, found.stored)
        allowance.reserve(found.size + (found.stored if found.method == _DEFLATED else 0))
        data = self._read_stored(found)
        if found.method == _DEFLATED:
            data = _inflate(place, data, found.size)
        if zlib.crc32(data) != found.crc:
            raise ImageError(f"{shorten_url(place)}: is damaged (its checksum does not match)")
        return data

    def _read_stored(self, member: Member) -> bytes:
        """The bytes of a member as they are in the archive, after its local header."""
        start = member.offset
        guess = _LOCAL.size + len(member.name.encode()) + _LOCAL_EXTRA_BYTES
        data = self.file.read(start, min(self.file.size, start + guess + member.stored))
        if len(data) < _LOCAL.size or data[:4] != b"PK\x03\x04":
            raise changed_error(self.url)
        header = _LOCAL.unpack_from(data)
        at = _LOCAL.size + header[-2] + header[-1]
        end = at + member.stored
        if start + end > self.file.size:
            raise ImageError(f"{shorten_url(self.url)}#{member.name}: is cut in the archive")
        if end > len(data):
            data += self.file.read(start + len(data), start + end)
        return data[at:end]


def _inflate(place: str, data: bytes, size: int) -> bytes:
    """Decompress a member of `size` bytes; no more than that is decompressed."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflate.decompress(data, size + 1)
    except zlib.error as error:
        raise ImageError(f"{shorten_url(place)}: is damaged ({error})") from error
    if len(inflated) > size:
        raise StorageTooLarge(
            f"{shorten_url(place)}: decompresses to more than the {size:,} bytes that the archive "
            "declares"
        )
    if not inflate.eof:
        raise ImageError(f"{shorten_url(place)}: is damaged (its compressed data is incomplete)")
    return inflated


def scan_zip(file: RangeFile) -> ArchiveScan:
    """Find the members of a zip archive by its central directory.

    Raises StorageError for a file that is no zip archive, or whose directory is damaged.
    """
    return ArchiveScan(_iter_members(file))


def _iter_members(file: RangeFile) -> Iterator[Member]:
    start, size, count, shift = _find_directory(file)
    found = 0
    rest = b""
    at = start
    while found < count:
        if at >= start + size:
            raise _damage_error(file)
        block = file.read(at, min(start + size, at + _DIRECTORY_BLOCK_BYTES))
        at += len(block)
        data, position = rest + block, 0
        while found < count and (entry := _parse_entry(file, data, position, shift)) is not None:
            member, position = entry
            found += 1
            if member is not None:
                yield member
        rest = data[position:]


def _find_directory(file: RangeFile) -> tuple[int, int, int, int]:
    """(start, bytes, entries) of the central directory, and the bytes before the archive."""
    begin = max(0, file.size - _END.size - _MAX_COMMENT_BYTES - _END64_LOCATOR.size - _END64.size)
    tail = file.read(begin, file.size)
    at = _find_end(tail)
    if at < 0:
        raise StorageError(
            f"{shorten_url(file.url)}: is not a zip archive, or its end is missing; write it again"
        )
    _, disk, _, _, count, size, offset, _ = _END.unpack_from(tail, at)
    end = at
    locator = at - _END64_LOCATOR.size
    if locator >= _END64.size and tail[locator : locator + 4] == b"PK\x06\x07":
        end = locator - _END64.size
        if tail[end : end + 4] != b"PK\x06\x06":
            raise _damage_error(file)
        _, _, _, _, disk, _, _, count, size, offset = _END64.unpack_from(tail, end)
    start = begin + end - size
    if disk not in (0, 0xFFFF) or start < 0 or start < offset:
        raise _damage_error(file)
    return start, size, count, start - offset


def _find_end(tail: bytes) -> int:
    """Start of the end record, whose comment reaches to the end of the file; -1 for none."""
    at = tail.rfind(b"PK\x05\x06", 0, len(tail) - _END.size + 4)
    while at >= 0:
        if at + _END.size + _END.unpack_from(tail, at)[-1] == len(tail):
            return at
        at = tail.rfind(b"PK\x05\x06", 0, at)
    return -1


def _damage_error(file: RangeFile) -> StorageError:
    return StorageError(
        f"{shorten_url(file.url)}: its central directory is damaged, or it is one part of several; "
        "write it again as one file"
    )


def _parse_entry(
    file: RangeFile, data: bytes, at: int, shift: int
) -> tuple[Member | None, int] | None:
    """The member of an entry and the start of the next; None for an entry that is not complete.

    A folder is no member. shift: bytes before the archive, which its offsets do not count
    """
    if len(data) - at < _ENTRY.size:
        return None
    (
        magic, made_by, _, flags, method, _, _, crc, stored, size,
        name_bytes, extra_bytes, comment_bytes, _, _, mode, offset,
    ) = _ENTRY.unpack_from(data, at)  # fmt: skip
    if magic != b"PK\x01\x02":
        raise _damage_error(file)
    name_at = at + _ENTRY.size
    extra_at = name_at + name_bytes
    end = extra_at + extra_bytes + comment_bytes
    if end > len(data):
        return None
    raw, extra = data[name_at:extra_at], data[extra_at : extra_at + extra_bytes]
    host = made_by >> 8
    name, is_utf8 = _decode_name(raw, extra, is_utf8=bool(flags & _UTF8))
    # PowerShell 5.1 and old .NET separate folders by it; in Shift-JIS, characters contain its byte
    if is_utf8 and host in _WINDOWS and "/" not in name:
        name = name.replace("\\", "/")
    name = name.removeprefix("./")
    if name.endswith("/") or not name:
        return None, end
    if 0xFFFFFFFF in (size, stored, offset):
        size, stored, offset = _read_zip64(file, extra, size, stored, offset)
    is_link = host == _UNIX and stat.S_ISLNK(mode >> 16)
    problem = _find_problem(flags, method, is_link=is_link)
    if not problem and offset + shift + stored > file.size:
        problem = "truncated: the archive ends before the file does"
    return Member(name, offset + shift, size, stored, method, crc, problem), end


def _decode_name(raw: bytes, extra: bytes, *, is_utf8: bool) -> tuple[str, bool]:
    """The name of a member as text, and whether it is UTF-8.

    Info-ZIP and macOS write UTF-8 without the flag for it; Info-ZIP also writes the name in UTF-8
    to an extra field, whose CRC-32 is that of the name in the header.
    """
    if not is_utf8:
        field = _find_extra_field(extra, _UNICODE_PATH)
        if field is not None and field[1:5] == struct.pack("<L", zlib.crc32(raw)):
            raw, is_utf8 = field[5:], True
    raw = raw.partition(b"\0")[0]
    if is_utf8:
        return archive_index.decode_name(raw), True
    try:
        return raw.decode("utf-8"), True
    except UnicodeDecodeError:
        return raw.decode("cp437"), False


def _find_extra_field(extra: bytes, kind: int) -> bytes | None:
    at = 0
    while at + 4 <= len(extra):
        found, length = struct.unpack_from("<2H", extra, at)
        if found == kind:
            return extra[at + 4 : at + 4 + length]
        at += 4 + length
    return None


def _find_problem(flags: int, method: int, *, is_link: bool) -> str:
    if flags & _ENCRYPTED or method == _AES:
        return "unreadable: is encrypted; extract the archive with its password"
    if is_link:
        return "unreadable: is a symbolic link; write the archive without --symlinks"
    if method not in (_STORED, _DEFLATED):
        name = _METHODS.get(method, "unknown")
        return (
            f"unreadable: is compressed by method {method} ({name}); stored and deflated members "
            "are read"
        )
    return ""


def _read_zip64(
    file: RangeFile, extra: bytes, size: int, stored: int, offset: int
) -> tuple[int, int, int]:
    """(size, stored, offset): those that are 0xFFFFFFFF are in an extra field, in this order."""
    field = _find_extra_field(extra, _ZIP64)
    if field is None:
        return size, stored, offset
    values = [size, stored, offset]
    wide = [index for index, value in enumerate(values) if value == 0xFFFFFFFF]
    if len(field) < 8 * len(wide):
        raise _damage_error(file)
    for number, index in enumerate(wide):
        values[index] = struct.unpack_from("<Q", field, 8 * number)[0]
    return values[0], values[1], values[2]
