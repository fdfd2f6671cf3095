"""Footers of Parquet files: where the values of one column are.

Arrow reads a row group from its start; finding single pages needs the positions of the footer.
Source: github.com/apache/parquet-format, src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from imgcls.data.containers import thrift_compact
from imgcls.data.containers.thrift_compact import Struct
from imgcls.data.storage.error_details import shorten_url
from imgcls.data.storage.range_file import RangeFile
from imgcls.errors import StorageError

_TAIL_BYTES = 64 << 10
_MAGIC = b"PAR1"
_BYTE_ARRAY = 6
_OPTIONAL, _REPEATED = 1, 2
_CODECS = frozenset({0, 1, 2, 4, 5, 6, 7})  # all but LZO
_DELTA_BYTE_ARRAY = 7


@dataclass(frozen=True)
class ColumnChunk:
    """The values of a column in one row group.

    start, end:   where its pages are in the file
    rows:         number of rows, which is that of the values
    null_count:   None where the file does not have it
    offset_index: where the positions of the pages are; None where the file does not have them
    """

    start: int
    end: int
    rows: int
    codec: int
    null_count: int | None
    offset_index: tuple[int, int] | None


@dataclass(frozen=True)
class ByteColumn:
    """A column of bytes or text.

    levels:    number of optional levels: 1 for a nullable column, 2 for one in a nullable struct
    is_text:   whether the file declares its values as text
    chunks:    by row group
    first_row: first row of each row group
    """

    levels: int
    is_text: bool
    chunks: tuple[ColumnChunk, ...]
    first_row: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows of the file."""
        return self.first_row[-1] + self.chunks[-1].rows if self.chunks else 0

    def find_group(self, row: int) -> int:
        """The row group of a row."""
        return bisect.bisect_right(self.first_row, row) - 1


@dataclass(frozen=True)
class Footer:
    """The footer of an opened file.

    num_rows: of the file
    version:  short text that differs when the footer or the size of the file does
    fields:   FileMetaData
    """

    file: RangeFile
    num_rows: int
    version: str
    fields: Struct

    def find_column(self, name: str) -> ByteColumn:
        """A column of bytes or text, or the field `bytes` of a struct.

        Raises StorageError with the reason where it cannot be read page by page.
        """
        place = f"{shorten_url(self.file.url)}: column {name!r}"
        try:
            return self._find_column(name, place)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise StorageError(f"{place}: the Parquet footer is damaged") from error

    def _find_column(self, name: str, place: str) -> ByteColumn:
        index, path = self._find_leaf(name, place)
        if any(element.get(3) == _REPEATED for element in path):
            raise StorageError(f"{place} contains lists; write one image per row")
        leaf = path[-1]
        if leaf.get(1) != _BYTE_ARRAY:
            raise StorageError(f"{place} does not contain bytes of any length; write it as binary")
        groups = [group for group in self.fields[4] if group[3]]
        chunks = tuple(_read_chunk(group[1][index], group[3], place) for group in groups)
        rows = itertools.accumulate((chunk.rows for chunk in chunks), initial=0)
        return ByteColumn(
            levels=sum(element.get(3) == _OPTIONAL for element in path),
            is_text=leaf.get(6) == 0 or 1 in leaf.get(10, {}),
            chunks=chunks,
            first_row=tuple(rows)[:-1],
        )

    def hash_other_columns(self, names: Collection[str]) -> bytes:
        """A digest of size, footer and all bytes but those in the columns of the given names."""
        digest = hashlib.blake2b(self.version.encode(), digest_size=16)
        leaves = list(self._iter_leaf_names())
        for group in self.fields[4]:
            for (first, *inner), column in zip(leaves, group[1], strict=True):
                if first not in names or (inner and inner[-1] != "bytes"):
                    start, end = _find_pages(column[3])
                    digest.update(self.file.read(start, end))
        return digest.digest()

    def _find_leaf(self, name: str, place: str) -> tuple[int, list[Struct]]:
        """Number of a column among those with values, and the schema elements on its path."""
        leaves = zip(self._iter_leaves(), self._iter_leaf_names(), strict=True)
        for index, (path, names) in enumerate(leaves):
            if names in ([name], [name, "bytes"]):
                return index, path
        raise StorageError(f"{place} is not in the file, or contains no bytes")

    def _iter_leaf_names(self) -> Iterator[list[str]]:
        for path in self._iter_leaves():
            yield [element[4].decode("utf-8", "replace") for element in path]

    def _iter_leaves(self) -> Iterator[list[Struct]]:
        elements = iter(self.fields[2])
        root = next(elements)
        yield from _iter_leaves(elements, root.get(5, 0), [])


def read_footer(file: RangeFile) -> Footer:
    """Read a footer; raises StorageError where the file is not Parquet, or damaged."""
    tail_start = max(0, file.size - _TAIL_BYTES)
    tail = file.read(tail_start, file.size)
    if tail[-4:] != _MAGIC:
        raise StorageError(f"{shorten_url(file.url)}: is not a Parquet file")
    end = file.size - 8
    start = end - int.from_bytes(tail[-8:-4], "little")
    if start < len(_MAGIC):
        raise StorageError(f"{shorten_url(file.url)}: its Parquet footer is damaged")
    data = tail[start - tail_start : -8] if start >= tail_start else file.read(start, end)
    digest = hashlib.blake2b(str(file.size).encode() + b"\0" + data, digest_size=6)
    try:
        fields, _ = thrift_compact.read_struct(data)
        return Footer(file, fields[3], digest.hexdigest(), fields)
    except (thrift_compact.ThriftError, KeyError) as error:
        raise StorageError(f"{shorten_url(file.url)}: its Parquet footer is damaged") from error


def _iter_leaves(
    elements: Iterator[Struct], count: int, above: list[Struct]
) -> Iterator[list[Struct]]:
    for element in itertools.islice(elements, count):
        path = [*above, element]
        if children := element.get(5):
            yield from _iter_leaves(elements, children, path)
        else:
            yield path


def _read_chunk(column: Struct, rows: int, place: str) -> ColumnChunk:
    if 8 in column or 3 not in column:
        raise StorageError(f"{place} is encrypted; decrypt the file first")
    if 1 in column:
        raise StorageError(f"{place} is in another file; pass the file with the values")
    meta = column[3]
    if meta[4] not in _CODECS:
        raise StorageError(f"{place} is compressed with LZO; write it with snappy or zstd")
    if _DELTA_BYTE_ARRAY in meta[2]:
        raise StorageError(
            f"{place} is encoded as DELTA_BYTE_ARRAY, which does not suit images; write it as PLAIN"
        )
    start, end = _find_pages(meta)
    index = (column[4], column[4] + column[5]) if 4 in column and 5 in column else None
    return ColumnChunk(start, end, rows, meta[4], meta.get(12, {}).get(3), index)


def _find_pages(meta: Struct) -> tuple[int, int]:
    # some writers set the position of a dictionary that they did not write to 0
    start = min(meta[9], meta.get(11) or meta[9])
    return start, start + meta[7]
