"""Pages of a Parquet column: where they are in the file."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from imgcls.data.containers import thrift_compact as thrift
from imgcls.data.containers.parquet_footer import ColumnChunk
from imgcls.data.containers.thrift_compact import Struct
from imgcls.data.storage.range_file import RangeFile
from imgcls.errors import StorageError

DATA_PAGE, _INDEX_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = range(4)
_DICTIONARY_ENCODINGS = (2, 8)
_HEADER_BYTES = 4 << 10
_MAX_HEADER_BYTES = 64 << 20

ReadRange = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Page:
    """A page: its header, and where it and its data start and end in the file."""

    header: Struct
    start: int
    data_start: int
    end: int

    @property
    def kind(self) -> int:
        kind: int = self.header[1]
        return kind

    @property
    def _details(self) -> Struct:
        details: Struct = self.header[
            {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}[self.kind]
        ]
        return details

    @property
    def num_values(self) -> int:
        """Number of values, nulls included: of rows, or of entries of a dictionary."""
        count: int = self._details[1]
        return count

    @property
    def null_count(self) -> int:
        """Number of nulls in a page of version 2; 0 in others, which do not have it."""
        count: int = self._details[2] if self.kind == DATA_PAGE_V2 else 0
        return count

    @property
    def encoding(self) -> int:
        """Encoding of the values."""
        encoding: int = self._details[4 if self.kind == DATA_PAGE_V2 else 2]
        return encoding

    @property
    def level_bytes(self) -> int:
        """Size of the definition levels before the values of a page of version 2."""
        size: int = self._details[5]
        return size

    @property
    def has_repetitions(self) -> bool:
        """Whether there are repetition levels before the values of a page of version 2."""
        return bool(self._details[6])

    @property
    def is_compressed(self) -> bool:
        """Whether the values of a page of version 2 are compressed by the codec of the column."""
        return bool(self._details.get(7, True))

    @property
    def needs_dictionary(self) -> bool:
        return self.kind != DICTIONARY_PAGE and self.encoding in _DICTIONARY_ENCODINGS


def iter_data_pages(read: ReadRange, start: int, end: int) -> Iterator[Page]:
    """The pages between two positions of a file; raises StorageError for a damaged header."""
    size = _HEADER_BYTES
    while start < end:
        data = read(start, min(end, start + size))
        try:
            header, length = thrift.read_struct(data)
            page = Page(header, start, start + length, start + length + header[3])
            is_right = page.data_start <= page.end <= end and (
                page.kind == _INDEX_PAGE or _is_right(page)
            )
        except thrift.ThriftTruncated as error:
            if start + size >= end or size >= _MAX_HEADER_BYTES:
                raise StorageError("a page header is damaged") from error
            size *= 8
            continue
        except (thrift.ThriftError, KeyError, TypeError, AttributeError) as error:
            raise StorageError("a page header is damaged") from error
        if not is_right:
            raise StorageError("a page header is damaged")
        size = _HEADER_BYTES
        if page.kind != _INDEX_PAGE:
            yield page
        start = page.end


def _is_right(page: Page) -> bool:
    """Whether a header is complete, and its numbers can be true."""
    least = 4 * page.num_values if page.kind == DICTIONARY_PAGE else 0
    is_known = isinstance(page.encoding, int) and (
        page.kind != DATA_PAGE_V2 or 0 <= page.level_bytes <= page.end - page.data_start
    )
    return is_known and 0 <= page.null_count <= page.num_values and least <= page.header[2] < 2**31


@dataclass(frozen=True)
class Segment:
    """Neighboring data pages, which are read together.

    first_row: counted from the start of the row group
    """

    start: int
    end: int
    first_row: int
    rows: int


class ChunkPages:
    """The segments of a column chunk, found as far as they are needed; threads may share it.

    segment_bytes: size at which a segment is complete
    """

    def __init__(self, file: RangeFile, chunk: ColumnChunk, segment_bytes: int) -> None:
        self._file, self._chunk, self._segment_bytes = file, chunk, segment_bytes
        self._segments: list[Segment] = []
        self._dictionary: Page | None = None
        self._at, self._row = chunk.start, 0
        self._lock = threading.Lock()

    @property
    def dictionary(self) -> Page | None:
        """The page of the dictionary, once a segment was found."""
        return self._dictionary

    def find(self, row: int) -> Segment:
        """The segment with a row of the row group; raises StorageError."""
        with self._lock:
            if not self._segments and self._chunk.offset_index is not None:
                self._read_index(*self._chunk.offset_index)
            while row >= self._row:
                self._walk()
        at = bisect.bisect_right(self._segments, row, key=lambda segment: segment.first_row) - 1
        return self._segments[at]

    def iter_segments(self) -> Iterator[Segment]:
        """All segments, in order; raises StorageError."""
        row = 0
        while row < self._chunk.rows:
            segment = self.find(row)
            yield segment
            row = segment.first_row + segment.rows

    def _walk(self) -> None:
        """Find the next segment by the headers of its pages."""
        at, rows, start = self._at, 0, None
        while start is None or at - start < self._segment_bytes:
            page = next(iter_data_pages(self._file.read, at, self._chunk.end), None)
            if page is None or (start is not None and self._is_large(page)):
                break
            if page.kind == DICTIONARY_PAGE:
                self._dictionary = page
            else:
                start = page.start if start is None else start
                rows += page.num_values
            at = page.end
        if start is None or self._row + rows > self._chunk.rows:
            raise StorageError("the pages do not have as many rows as the row group")
        self._add(Segment(start, at, self._row, rows))

    def _is_large(self, page: Page) -> bool:
        """Whether a page is not read together with smaller ones."""
        return page.end - page.start > 2 * self._segment_bytes

    def _read_index(self, start: int, end: int) -> None:
        """Find all segments by the positions that the file has."""
        try:
            index, _ = thrift.read_struct(self._file.read(start, end))
            pages = [(each[1], each[1] + each[2], each[3]) for each in index[1]]
        except (thrift.ThriftError, KeyError, TypeError) as error:
            raise StorageError("the offset index is damaged") from error
        starts = [first_row for _, _, first_row in pages]
        ends = [*starts[1:], self._chunk.rows]
        is_damaged = (
            not pages
            or starts[0] != 0
            or any(one >= other for one, other in zip(starts, ends, strict=True))
            or any(one[1] > other[0] for one, other in itertools.pairwise(pages))
            or not self._chunk.start <= pages[0][0] <= pages[-1][1] <= self._chunk.end
        )
        if is_damaged:
            raise StorageError("the offset index is damaged")
        if pages[0][0] > self._chunk.start:
            first = next(iter_data_pages(self._file.read, self._chunk.start, pages[0][0]), None)
            self._dictionary = first
        segment_start = pages[0][0]
        for at, ((_, page_end, _), end_row) in enumerate(zip(pages, ends, strict=True)):
            next_end = pages[at + 1][1] if at + 1 < len(pages) else page_end
            is_full = page_end - segment_start >= self._segment_bytes
            if is_full or next_end - page_end > 2 * self._segment_bytes or at + 1 == len(pages):
                self._add(Segment(segment_start, page_end, self._row, end_row - self._row))
                segment_start = page_end

    def _add(self, segment: Segment) -> None:
        self._segments.append(segment)
        self._at, self._row = segment.end, segment.first_row + segment.rows
