"""Tar archives: members are found by their headers, and read by ranges."""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator

from imgcls.data.containers import archive_index
from imgcls.data.containers.archive import TEXT_SUFFIXES, Archive
from imgcls.data.containers.archive_index import ArchiveScan, Member
from imgcls.data.storage import filesystem
from imgcls.data.storage.error_details import shorten_url
from imgcls.data.storage.range_file import RangeFile, changed_error
from imgcls.data.storage.readahead import ReadAllowance, too_large_error
from imgcls.errors import StorageError, one_line

_HEADER_BYTES = 512
_MAX_EXTENDED_BYTES = 1 << 20
_MAX_TEXT_BYTES = 64 << 10
_MAX_TEXTS_BYTES = 64 << 20
_COMPRESSED = {
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ\0": "unxz -k",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


class TarArchive(Archive):
    """An opened tar archive."""

    kind = "tar"

    @classmethod
    def scan(cls, file: RangeFile) -> ArchiveScan:
        return scan_tar(file)

    def read(self, member: str, allowance: ReadAllowance) -> bytes:
        """Read a member; raises as `Container.read`."""
        found = self.find_member(member)
        if allowance.is_exceeded_by(found.size):
            raise too_large_error(f"{self.url}#{member}", allowance.max_bytes, found.size)
        allowance.reserve(found.size)
        data = self.file.read(found.offset, found.offset + _HEADER_BYTES + found.size)
        # stores without versions do not report an archive that was replaced
        if zlib.crc32(data[:_HEADER_BYTES]) != found.crc:
            raise changed_error(self.url)
        return data[_HEADER_BYTES:]


def scan_tar(file: RangeFile) -> ArchiveScan:
    """Find the members of a tar archive by its headers.

    Raises StorageError for a file that is no tar archive, and for a compressed one.
    """
    stream = _HeaderStream(file)
    _check_uncompressed(file.url, stream)
    scan = ArchiveScan(iter(()), texts={})
    scan.members = _iter_members(file, stream, scan)
    return scan


def _check_uncompressed(url: str, stream: _HeaderStream) -> None:
    head = stream.read(8)
    for magic, command in _COMPRESSED.items():
        if head.startswith(magic):
            raise StorageError(
                f"{shorten_url(url)}: is compressed, so its members cannot be read one by one; "
                f"decompress it with `{command} {os.path.basename(url)}`"
            )


def _iter_members(file: RangeFile, stream: _HeaderStream, scan: ArchiveScan) -> Iterator[Member]:
    """The members of an archive; sets `damage`, `note` and `texts` of the scan."""
    tar = _HeaderReader(stream)
    kept = 0
    while True:
        start = tar.offset
        try:
            info = tar.read_header()
        except tarfile.HeaderError as error:
            scan.damage, scan.note = _explain_end(file, stream, start, error)
            return
        except (ValueError, OverflowError, RecursionError) as error:
            scan.damage = _describe_damage(file, start, error)
            return
        # the size of a sparse file is that of the extracted one
        end = tar.offset - _HEADER_BYTES + 1 if info.issparse() else info.offset_data + info.size
        is_cut = info.isreg() and end > file.size
        member = _build_member(info, stream, is_cut=is_cut)
        if member is None:
            continue
        if is_cut:
            scan.note = f"is cut: its last member {member.name!r} is not complete"
        elif member.name.lower().endswith(TEXT_SUFFIXES) and not member.problem:
            kept += member.size
            if member.size <= _MAX_TEXT_BYTES and kept <= _MAX_TEXTS_BYTES:
                assert scan.texts is not None
                scan.texts[member.name] = stream.read_at(info.offset_data, member.size)
        yield member
        if is_cut:
            return


class _HeaderReader(tarfile.TarFile):
    """The state that `tarfile.TarInfo.fromtarfile` reads headers with.

    `TarFile.next` ends silently at a damaged header, and keeps every header in memory.
    """

    def __init__(self, stream: _HeaderStream) -> None:
        self.fileobj = stream
        self.encoding, self.errors = "utf-8", "surrogateescape"
        self.pax_headers = {}
        self.offset = 0
        self.closed = True

    def read_header(self) -> tarfile.TarInfo:
        """The header at `offset`, which moves to the next one; raises tarfile.HeaderError."""
        assert self.fileobj is not None
        self.fileobj.seek(self.offset)
        info = tarfile.TarInfo.fromtarfile(self)
        if info.size < 0:
            raise tarfile.HeaderError("negative size")
        return info


def _build_member(info: tarfile.TarInfo, stream: _HeaderStream, *, is_cut: bool) -> Member | None:
    """A member by its header; None for folders and for entries that hold no file."""
    name = archive_index.decode_name(info.name.encode("utf-8", "surrogateescape"))
    offset = info.offset_data - _HEADER_BYTES
    problem = ""
    if info.issym():
        target = posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
        problem = _describe_link(target)
    elif info.islnk():
        problem = _describe_link(info.linkname)
    elif info.issparse():
        problem = "unreadable: is a sparse file; write the archive without --sparse"
    elif info.isdev():
        problem = "unreadable: is a device or a FIFO, not a file"
    elif not info.isreg():
        return None
    elif is_cut:
        problem = "truncated: the archive ends before the file does"
    crc = 0 if problem else zlib.crc32(stream.read_at(offset, _HEADER_BYTES))
    return Member(name, offset, info.size, info.size, crc=crc, problem=problem)


def _describe_link(target: str) -> str:
    return archive_index.describe_link(
        archive_index.decode_name(target.encode("utf-8", "surrogateescape"))
    )


def _explain_end(
    file: RangeFile, stream: _HeaderStream, start: int, error: tarfile.HeaderError
) -> tuple[str, str]:
    """(damage, note) of an archive whose headers end; raises StorageError for no archive."""
    kind = type(error).__name__
    if kind == "EOFHeaderError":
        # `tar --list` ends here too, but archives that were joined by cat have more members
        rest = stream.read_at(start, min(file.size - start, 1 << 20))
        if rest.strip(b"\0"):
            return (
                f"has data after its end at byte {start:,}, as archives that were joined by `cat` "
                "have; join them with `tar --concatenate`, or pass them as separate files"
            ), ""
        return "", ""
    if start == 0:
        what = "is empty" if file.size == 0 else "is not a tar archive"
        raise StorageError(f"{shorten_url(file.url)}: {what}; write it again")
    if kind == "EmptyHeaderError":
        return "", "has no end mark; if it was cut, its last members are missing"
    return _describe_damage(file, start, error), ""


def _describe_damage(file: RangeFile, start: int, error: Exception) -> str:
    if start == 0:
        raise StorageError(f"{shorten_url(file.url)}: is not a tar archive; write it again")
    return (
        f"has a damaged or cut header at byte {start:,} of {file.size:,} ({one_line(error)}); "
        "write it again"
    )


class _HeaderStream(io.RawIOBase):
    """The bytes of an archive for a scan, in windows: large ones where headers are near.

    near:  distance up to which the bytes between two headers are read too
    large: bytes of a window in a sequence
    small: bytes of a window at another place
    """

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        local = filesystem.is_local(file.url)
        self._near, self._large, self._small = (
            (16 << 10, 128 << 10, 2 << 10) if local else (1 << 20, 8 << 20, 64 << 10)
        )
        self._start, self._window = 0, b""
        self._position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_EXTENDED_BYTES:
            raise tarfile.HeaderError(f"an extended header of {size:,} bytes")
        data = self.read_at(self._position, size)
        self._position += len(data)
        return data

    def read_at(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start` on; fewer at the end of the file."""
        end = min(self._file.size, start + size)
        if end <= start:
            return b""
        window_end = self._start + len(self._window)
        if start < self._start or end > window_end:
            is_near = self._start <= start <= window_end + self._near
            wanted = self._large if is_near else self._small
            self._start = start
            self._window = self._file.read(start, min(self._file.size, max(end, start + wanted)))
        return self._window[start - self._start : end - self._start]
