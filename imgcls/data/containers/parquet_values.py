"""Decoding of the pages of a Parquet column of bytes.

Pages of plain values without nulls, which those of images mostly are, are taken apart here, since
their values need no copy. Arrow decodes all others. As it decodes whole files only, the pages are
put into a file of their own in memory, with a footer for just these pages.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls.data.containers import thrift_compact as thrift
from imgcls.data.containers.parquet_pages import (
    DATA_PAGE,
    DATA_PAGE_V2,
    DICTIONARY_PAGE,
    Page,
    Segment,
    iter_data_pages,
)
from imgcls.errors import StorageError, one_line

_PLAIN = 0
_MAGIC = b"PAR1"
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_LZ4_OF_HADOOP = 5


class Values(Protocol):
    """The values of neighboring pages.

    first_row:  counted from the start of the row group
    is_indexed: whether each value is an index into the dictionary, as 4 bytes in little-endian
                order
    num_bytes:  memory that they take
    """

    @property
    def first_row(self) -> int: ...

    @property
    def is_indexed(self) -> bool: ...

    @property
    def num_bytes(self) -> int: ...

    def get(self, index: int) -> pa.Buffer | None:
        """A value without a copy, counted from the first row; None for a null."""

    def find_nulls(self) -> npt.NDArray[np.bool_]:
        """(rows,) whether each value is null."""


@dataclass(frozen=True)
class PlainValues:
    """Values in a buffer, each after its size. starts, sizes: (rows,) in bytes"""

    buffer: pa.Buffer
    starts: list[int]
    sizes: list[int]
    first_row: int = 0
    is_indexed: bool = False

    @property
    def num_bytes(self) -> int:
        return int(self.buffer.size) + 64 * len(self.starts)

    def get(self, index: int) -> pa.Buffer | None:
        return self.buffer.slice(self.starts[index], self.sizes[index])

    def find_nulls(self) -> npt.NDArray[np.bool_]:
        return np.zeros(len(self.starts), np.bool_)


@dataclass(frozen=True)
class ArrowValues:
    """Values that Arrow decoded. array: (rows,) large_binary"""

    array: pa.LargeBinaryArray
    first_row: int = 0
    is_indexed: bool = False

    @property
    def num_bytes(self) -> int:
        return int(self.array.nbytes)

    def get(self, index: int) -> pa.Buffer | None:
        value = self.array[index]
        return value.as_buffer() if value.is_valid else None

    def find_nulls(self) -> npt.NDArray[np.bool_]:
        nulls: npt.NDArray[np.bool_] = self.array.is_null().to_numpy(zero_copy_only=False)
        return nulls


def decode_segment(
    data: bytes, segment: Segment, codec: int, levels: int, dictionary: Page | None
) -> list[Values]:
    """Decode the pages of a segment, in row order.

    data:   the bytes of the segment
    levels: see `ByteColumn`
    Values in a dictionary stay indices, since a small page may repeat a large value many times.
    Raises StorageError for damaged pages.
    """
    view = memoryview(data)

    def read(start: int, end: int) -> bytes:
        return data[start - segment.start : end - segment.start]

    found: list[Values] = []
    pages = list(iter_data_pages(read, segment.start, segment.end))
    if sum(page.num_values for page in pages) != segment.rows:
        raise StorageError("the pages do not have as many rows as the file declares")
    row = segment.first_row
    for page in pages:
        whole = view[page.start - segment.start : page.end - segment.start]
        body = whole[page.data_start - page.start :]
        values: Values | None = None
        if not page.needs_dictionary:
            values = _decode_plain(page, body, row, codec, levels)
        if values is None:
            head = b""
            if page.needs_dictionary:
                if dictionary is None:
                    raise StorageError("the dictionary page is missing")
                head = _build_index_dictionary(dictionary.num_values, codec)
            array = _decode_by_arrow(whole, page.num_values, codec, levels, head)
            values = ArrowValues(array, row, page.needs_dictionary)
        found.append(values)
        row += page.num_values
    return found


def decode_dictionary(page: Page, data: bytes, codec: int) -> Values:
    """The values of a dictionary page. data: the bytes of the page without its header"""
    # its values are encoded as those of a data page without nulls
    header: thrift.Struct = {
        1: DATA_PAGE,
        2: page.header[2],
        3: len(data),
        5: {1: page.num_values, 2: _PLAIN},
    }
    if 4 in page.header:
        header[4] = page.header[4]
    as_data = Page(header, page.start, page.data_start, page.end)
    values = _decode_plain(as_data, memoryview(data), 0, codec, 0)
    if values is not None:
        return values
    numbers = [number for number in (1, 2, 3, 4) if number in header]
    fields: dict[int, thrift.Field] = {each: thrift.i32(header[each]) for each in numbers}
    fields[5] = thrift.struct({number: thrift.i32(value) for number, value in header[5].items()})
    whole = memoryview(thrift.encode_struct(fields) + data)
    return ArrowValues(_decode_by_arrow(whole, page.num_values, codec, 0, b""))


def _decode_plain(
    page: Page, body: memoryview, first_row: int, codec: int, levels: int
) -> PlainValues | None:
    """The values of a page of plain values without nulls; None for any other page."""
    if page.encoding != _PLAIN or codec == _LZ4_OF_HADOOP:
        return None
    if 4 in page.header and zlib.crc32(body) != page.header[4] & 0xFFFFFFFF:
        raise StorageError("a page is damaged (its checksum differs)")
    size, level_bytes = page.header[2], 0
    if page.kind == DATA_PAGE_V2:
        if page.null_count or page.has_repetitions:
            return None
        level_bytes = page.level_bytes
        body, size = body[level_bytes:], size - level_bytes
        codec = codec if page.is_compressed else 0
    buffer = _decompress(body, size, codec)
    start = 0
    if page.kind == DATA_PAGE and levels:
        view = memoryview(buffer)
        start = 4 + int.from_bytes(view[:4], "little")
        if not _is_one_run(bytes(view[4:start][:16]), levels, page.num_values):
            return None
    starts, sizes = _find_values(memoryview(buffer), start, page.num_values)
    return PlainValues(buffer, starts, sizes, first_row)


def _decompress(body: memoryview, size: int, codec: int) -> pa.Buffer:
    if not codec:
        if len(body) != size:
            raise StorageError("a page is damaged (its size differs)")
        return pa.py_buffer(body)
    try:
        return pa.Codec(_CODECS[codec]).decompress(body, size)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"a page is damaged ({one_line(error)})") from error


def _is_one_run(data: bytes, level: int, count: int) -> bool:
    """Whether definition levels are one run of the highest level: no value is null."""
    run = shift = 0
    for at, byte in enumerate(data):
        run |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return run & 1 == 0 and run >> 1 == count and data[at + 1 : at + 2] == bytes([level])
    return False


def _find_values(view: memoryview, at: int, count: int) -> tuple[list[int], list[int]]:
    """Where values are that each follow their size; raises StorageError where they do not fit."""
    starts, sizes = [], []
    for _ in range(count):
        size = int.from_bytes(view[at : at + 4], "little")
        at += 4
        starts.append(at)
        sizes.append(size)
        at += size
        if at > len(view):
            break
    if at != len(view) or len(starts) != count:
        raise StorageError("a page is damaged (the sizes of its values do not fit)")
    return starts, sizes


def _build_index_dictionary(count: int, codec: int) -> bytes:
    """A dictionary page that has its own indices as values."""
    values = np.empty((count, 2), "<u4")
    values[:, 0], values[:, 1] = 4, np.arange(count)
    data = values.tobytes()
    name = _CODECS.get(codec, "lz4_raw")  # Arrow also reads it where that of Hadoop is declared
    packed = pa.Codec(name).compress(data, asbytes=True) if codec else data
    details = {1: thrift.i32(count), 2: thrift.i32(_PLAIN)}
    header = {
        1: thrift.i32(DICTIONARY_PAGE),
        2: thrift.i32(len(data)),
        3: thrift.i32(len(packed)),
        7: thrift.struct(details),
    }
    return thrift.encode_struct(header) + packed


def _decode_by_arrow(
    pages: memoryview, rows: int, codec: int, levels: int, dictionary: bytes
) -> pa.Array:
    """Decode pages with Arrow, as the only column of a file with the levels of nulls."""
    parts: list[bytes | memoryview] = [_MAGIC, dictionary, pages]
    footer = _build_footer(len(pages), rows, codec, levels, len(dictionary))
    parts += [footer, len(footer).to_bytes(4, "little"), _MAGIC]
    try:
        source = pa.BufferReader(b"".join(parts))
        file = pq.ParquetFile(
            source, binary_type=pa.large_binary(), page_checksum_verification=True
        )
        column = file.read(use_threads=False).column(0)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"a page is damaged ({one_line(error)})") from error
    for _ in range(levels - 1):
        column = pc.struct_field(column, [0])
    if len(column) != rows:
        raise StorageError("a page has fewer values than it declares")
    return column.combine_chunks()


def _build_footer(size: int, rows: int, codec: int, levels: int, dictionary_size: int) -> bytes:
    depth = max(1, levels)
    root = {4: thrift.binary(b"root"), 5: thrift.i32(1)}
    groups = [
        {3: thrift.i32(1), 4: thrift.binary(b"v"), 5: thrift.i32(1)} for _ in range(depth - 1)
    ]
    leaf = {1: thrift.i32(6), 3: thrift.i32(min(1, levels)), 4: thrift.binary(b"v")}
    schema = [thrift.struct(element) for element in (root, *groups, leaf)]
    total = thrift.i64(size + dictionary_size)
    meta = {
        1: thrift.i32(6),
        2: thrift.sequence([thrift.i32(encoding) for encoding in (0, 3, 6, 8)]),
        3: thrift.sequence([thrift.binary(b"v")] * depth),
        4: thrift.i32(codec),
        5: thrift.i64(rows),
        6: total,
        7: total,
        9: thrift.i64(len(_MAGIC) + dictionary_size),
    }
    if dictionary_size:
        meta[11] = thrift.i64(len(_MAGIC))
    chunk = thrift.struct({2: thrift.i64(0), 3: thrift.struct(meta)})
    group = {1: thrift.sequence([chunk]), 2: total, 3: thrift.i64(rows)}
    return thrift.encode_struct(
        {
            1: thrift.i32(1),
            2: thrift.sequence(schema),
            3: thrift.i64(rows),
            4: thrift.sequence([thrift.struct(group)]),
        }
    )
