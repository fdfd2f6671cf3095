"""Images as bytes in the rows of Parquet tables.

The image of a row is a member of the table, see `containers`: its name is COLUMN/ROW/VERSION, where
ROW counts from the first row of the file, and VERSION from `Footer` makes the rows of a table that
was written again an error, never other images.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import contextlib
import hashlib
import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcls.data.containers.load_cache import LoadCache
from imgcls.data.containers.parquet_footer import ByteColumn, read_footer
from imgcls.data.containers.parquet_pages import ChunkPages, Segment
from imgcls.data.containers.parquet_values import Values, decode_dictionary, decode_segment
from imgcls.data.storage import filesystem
from imgcls.data.storage.error_details import shorten_url
from imgcls.data.storage.range_file import RangeFile, open_ranges
from imgcls.data.storage.readahead import ReadAllowance, too_large_error
from imgcls.errors import NotAnImage, StorageError, StorageMissing

_CACHE_BYTES = 128 << 20
"""Maximum size of the decoded pages that a process keeps, in addition to those in use."""
_LOCAL_SEGMENT_BYTES = 1 << 20
_STORE_SEGMENT_BYTES = 4 << 20
"""Size at which neighboring pages are read together: each request to a store has to wait."""
_LARGE_BYTES = 16 << 20
"""Above this, pages are decoded one at a time, since each may take several times its size."""


@dataclass(frozen=True)
class _OpenColumn:
    column: ByteColumn
    version: str
    chunks: tuple[ChunkPages, ...]


class ParquetImages:
    """A Parquet file with a column of images: one `members.Container`."""

    def __init__(self, url: str) -> None:
        self._file: RangeFile = open_ranges(url)
        self._is_store = not filesystem.is_local(url)
        self._columns: dict[str, _OpenColumn] = {}
        self._lock, self._large_lock = threading.Lock(), threading.Lock()

    def read(self, member: str, allowance: ReadAllowance) -> bytes:
        """The bytes of an image; see `members.Container.read`."""
        opened, row = self._find(member)
        value = self._read_value(member, opened, row)
        size = value.size * 3 // 4 if opened.column.is_text else value.size
        if allowance.is_exceeded_by(size):
            raise too_large_error(self._describe(member), allowance.max_bytes, size)
        allowance.reserve(size)
        data = value.to_pybytes()
        return self._decode_base64(data, member) if opened.column.is_text else data

    def get_size(self, member: str) -> int:
        """Size of an image in bytes, about that for base64; see `members.Container`."""
        opened, row = self._find(member)
        size: int = self._read_value(member, opened, row).size
        return size * 3 // 4 if opened.column.is_text else size

    def get_version(self, name: str) -> str:
        """The version in the members of a column; raises StorageError."""
        return self._open_column(name).version

    def find_null_rows(self, name: str) -> npt.NDArray[np.bool_]:
        """(rows,) whether the image of each row of the file is null; raises StorageError.

        Images are read only in pages that have nulls and others, and where neither the footer nor
        the header of the page counts the nulls.
        """
        opened = self._open_column(name)
        column = opened.column
        nulls = [np.zeros(0, np.bool_)]
        for group, chunk in enumerate(column.chunks):
            if column.levels == 0 or chunk.null_count in (0, chunk.rows):
                nulls.append(np.full(chunk.rows, column.levels > 0 and bool(chunk.null_count)))
                continue
            for segment in opened.chunks[group].iter_segments():
                for values in self._load_segment(name, opened, group, segment):
                    nulls.append(values.find_nulls())
        return np.concatenate(nulls)

    def _find(self, member: str) -> tuple[_OpenColumn, int]:
        """The column and the row of a member."""
        try:
            name, number, version = member.rsplit("/", 2)
            row = int(number)
        except ValueError as error:
            raise StorageMissing(
                f"{self._describe(member)}: names no row; write it as COLUMN/ROW/VERSION"
            ) from error
        opened = self._open_column(name)
        if version != opened.version:
            raise StorageMissing(
                f"{shorten_url(self._file.url)}: was written again after its rows were read; start "
                "over with --overwrite"
            )
        rows = opened.column.num_rows
        if not 0 <= row < rows:
            raise StorageMissing(f"{self._describe(member)}: the file has {rows:,} rows")
        return opened, row

    def _open_column(self, name: str) -> _OpenColumn:
        opened = self._columns.get(name)
        if opened is None:
            with self._lock:
                # the footer is not kept: that of a file with many row groups is large
                footer = read_footer(self._file)
                column = footer.find_column(name)
                size = _STORE_SEGMENT_BYTES if self._is_store else _LOCAL_SEGMENT_BYTES
                chunks = [ChunkPages(self._file, chunk, size) for chunk in column.chunks]
                opened = _OpenColumn(column, footer.version, tuple(chunks))
                opened = self._columns.setdefault(name, opened)
        return opened

    def _read_value(self, member: str, opened: _OpenColumn, row: int) -> pa.Buffer:
        name = member.rsplit("/", 2)[0]
        group = opened.column.find_group(row)
        row -= opened.column.first_row[group]
        with self._name_place(member):
            segment = opened.chunks[group].find(row)
            loaded = self._load_segment(name, opened, group, segment)
            at = bisect.bisect_right(loaded, row, key=lambda values: values.first_row) - 1
            value = loaded[at].get(row - loaded[at].first_row)
            if value is not None and loaded[at].is_indexed:
                index = int.from_bytes(value.to_pybytes(), "little")
                value = self._load_dictionary(name, opened, group).get(index)
            if value is None:
                raise StorageMissing("is null")
            return value

    def _load_segment(
        self, name: str, opened: _OpenColumn, group: int, segment: Segment
    ) -> list[Values]:
        """The decoded pages of a segment, from memory where they are."""
        codec, levels = opened.column.chunks[group].codec, opened.column.levels

        def load() -> list[Values]:
            with self._limit_memory(segment.end - segment.start):
                data = self._file.read(segment.start, segment.end)
                dictionary = opened.chunks[group].dictionary
                return decode_segment(data, segment, codec, levels, dictionary)

        return _decoded.get((*self._key(name, opened), group, segment.start), load)

    def _load_dictionary(self, name: str, opened: _OpenColumn, group: int) -> Values:
        page = opened.chunks[group].dictionary
        assert page is not None

        def load() -> list[Values]:
            with self._limit_memory(page.end - page.start):
                data = self._file.read(page.data_start, page.end)
                codec = opened.column.chunks[group].codec
                return [decode_dictionary(page, data, codec)]

        return _decoded.get((*self._key(name, opened), group, page.start), load)[0]

    def _key(self, name: str, opened: _OpenColumn) -> tuple[str, str | None, str, str]:
        return self._file.url, self._file.version, opened.version, name

    @contextlib.contextmanager
    def _limit_memory(self, size: int) -> Iterator[None]:
        with self._large_lock if size > _LARGE_BYTES else contextlib.nullcontext():
            yield

    def _decode_base64(self, data: bytes, member: str) -> bytes:
        text = b"".join(data.split())
        if b"-" in text or b"_" in text:
            text = text.translate(_FROM_URL_SAFE) if not set(b"+/") & set(text) else b"!"
        try:
            return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
        except binascii.Error as error:
            raise NotAnImage(f"{self._describe(member)}: the text is not base64") from error

    def _describe(self, member: str) -> str:
        name, row = member.rsplit("/", 2)[:2] if member.count("/") > 1 else (member, "?")
        return f"{shorten_url(self._file.url)}: column {name!r}, row {row}"

    @contextlib.contextmanager
    def _name_place(self, member: str) -> Iterator[None]:
        """Put the place of an image before the message of an error that does not have it."""
        try:
            yield
        except StorageError as error:
            if self._file.url in str(error):
                raise
            raise type(error)(f"{self._describe(member)}: {error}") from error


def hash_without_images(urls: Iterable[str], names: Collection[str]) -> str:
    """A digest of tables without reading their columns of images; raises StorageError.

    Of the size, the footer and the other columns of each, or of its footer and its version where
    it is in a store that has one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for url in urls:
        file = open_ranges(url)
        footer = read_footer(file)
        if not filesystem.is_local(url) and file.version is not None:
            digest.update(f"{footer.version} {file.version}\0".encode())
        else:
            digest.update(footer.hash_other_columns(names))
    return digest.hexdigest()


def _count_bytes(loaded: list[Values]) -> int:
    return sum(values.num_bytes for values in loaded)


_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_decoded: LoadCache[list[Values]] = LoadCache(_CACHE_BYTES, _count_bytes)
