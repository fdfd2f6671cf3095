"""CSV files as a stream of Arrow record batches in which every value is text, as it came.

Owns delimiter, encoding, compression and quoting. Values are parsed by Arrow, from a byte stream
that is decoded and checked here, since Arrow accepts some malformed quoting without an error.
Promises bounded memory, and a ManifestError that names the file, the line and the fix.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NoReturn, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from imgcls.data import filesystem
from imgcls.errors import ManifestError

_BLOCK_BYTES = 8 << 20
_MAX_ROW_BYTES = 128 << 20
_HEAD_BYTES = 1 << 20
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
_COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_DECOMPRESSORS = (gzip.GzipFile, bz2.BZ2File, lzma.LZMAFile, pa.CompressedInputStream)
_DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError, OSError, pa.ArrowException)

_FOREIGN_MAGIC = {
    b"PAR1": "a Parquet file; say --manifest.format parquet",
    b"PARE": "an encrypted Parquet file; decrypt it first",
    b"ARROW1": "an Arrow IPC (Feather) file; convert it to Parquet",
    b"\xff\xff\xff\xff": "an Arrow IPC stream; convert it to Parquet",
    b"ORC": "an ORC file; convert it to Parquet",
    b"Obj\x01": "an Avro file; convert it to Parquet",
    b"\x89HDF": "an HDF5 file; convert it to Parquet",
    b"SQLite format 3\0": "an SQLite database; export the table as CSV or Parquet",
    b"PK\x03\x04": "a ZIP archive (or an Excel workbook); extract it, or export it as CSV",
    b"7z\xbc\xaf": "a 7-Zip archive; extract it first",
    b"\x04\x22\x4d\x18": "compressed with LZ4; decompress it first, or use gzip or zstd",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; export it as CSV",
    b"\x80\x04\x95": "a Python pickle; write it as CSV or Parquet",
    b"\x80\x05\x95": "a Python pickle; write it as CSV or Parquet",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` to fetch the file",
}

_JSON_START = re.compile(r'\s*(\{\s*"|\[\s*\{?\s*"|[\[{]\s*$)')


@dataclass(frozen=True)
class CsvDialect:
    """How the CSV files of a manifest are written, as far as it is given.

    delimiter: one ASCII character; found in the header line when None
    encoding:  text encoding of files without a byte order mark
    escape:    character before a quote that is part of a quoted value; None where quotes are
               doubled (RFC 4180)
    """

    delimiter: str | None = None
    encoding: str = "utf-8"
    escape: str | None = None


@dataclass(frozen=True)
class CsvHeader:
    """What the first bytes of a CSV file show."""

    names: list[str]
    delimiter: str
    encoding: str

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in self.names])


def detect_foreign_format(head: bytes) -> str | None:
    """What a file is whose first bytes are those of another format, and what to do with it."""
    return next((what for magic, what in _FOREIGN_MAGIC.items() if head.startswith(magic)), None)


def read_csv_header(file: str, dialect: CsvDialect) -> CsvHeader:
    """Column names, delimiter and encoding of a CSV file, from its first MiB.

    Raises ManifestError where the file is not CSV or the header cannot be read.
    """
    place = f"manifest {file}"
    with _open_decompressed(file) as stream:
        head = _read_block(stream, _HEAD_BYTES, place)
    if (what := detect_foreign_format(head)) is not None:
        raise ManifestError(f"{place}: holds binary data, not CSV: it is {what}")
    encoding = _detect_encoding(head, dialect, place)
    whole = len(head) < _HEAD_BYTES
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
        text = decoder.decode(head, final=whole).lstrip("\ufeff\r\n")
    except (UnicodeDecodeError, LookupError) as error:
        raise ManifestError(
            f"{place}: not {encoding} text ({error}); say --manifest.encoding"
        ) from error
    first_line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    if not first_line.strip():
        raise ManifestError(f"{place}: is empty; the first line must name the columns")
    if "\x00" in first_line:
        raise ManifestError(
            f"{place}: holds binary data, not CSV; say --manifest.format parquet if it is"
        )
    if not whole and not re.search(r"[\r\n]", text):
        raise ManifestError(f"{place}: its first line is longer than 1 MiB; it must name columns")
    _check_first_line(first_line, place)
    delimiter = _detect_delimiter(text, dialect)
    if dialect.escape is not None:
        text = _Unescaper(delimiter, dialect.escape).add(text.encode(), last=True).decode()
    try:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ManifestError(f"{place}: the header cannot be read: {error}") from error
    return CsvHeader(names, delimiter, encoding)


def read_csv_batches(file: str, dialect: CsvDialect) -> Iterator[pa.RecordBatch]:
    """The rows of a CSV file; an unquoted empty value is null, any other value is text.

    A row may be up to 128 MiB long. Raises ManifestError where the text cannot be decoded, a row
    has too many or too few values, or a quote is misplaced.
    """
    reading = _CsvFile(file, dialect, read_csv_header(file, dialect))
    done = 0
    for block_bytes in (_BLOCK_BYTES, _MAX_ROW_BYTES):
        try:
            start = 0
            for batch in reading.batches(block_bytes):
                new = batch.slice(max(0, done - start))
                start += batch.num_rows
                if new.num_rows:
                    done += new.num_rows
                    yield new
            return
        except pa.ArrowInvalid as error:
            # a header or row longer than a block: the file is read again in larger blocks
            empty = "Empty CSV" in str(error)
            if empty and block_bytes == _MAX_ROW_BYTES:
                return
            if not empty and "straddling" not in str(error):
                reading.raise_parse_error(error)
    reading.check_quotes()
    raise ManifestError(
        f"manifest {file}: the row after row {done:,} is longer than 128 MiB; write long values "
        "to files of their own and give their paths"
    )


class _CsvFile:
    """One CSV file that is being read."""

    def __init__(self, file: str, dialect: CsvDialect, header: CsvHeader) -> None:
        self._file, self._dialect, self._header = file, dialect, header
        self._place = f"manifest {file}"
        self._checked = False

    def batches(self, block_bytes: int) -> Iterator[pa.RecordBatch]:
        with self._open_stream() as blocks:
            try:
                reader = pa_csv.open_csv(
                    blocks,
                    read_options=pa_csv.ReadOptions(block_size=block_bytes, use_threads=False),
                    parse_options=pa_csv.ParseOptions(
                        delimiter=self._header.delimiter, newlines_in_values=True
                    ),
                    convert_options=pa_csv.ConvertOptions(
                        column_types=self._header.schema,
                        null_values=[""],
                        strings_can_be_null=True,
                        quoted_strings_can_be_null=False,
                    ),
                )
                if reader.schema.names != self._header.names:
                    raise ManifestError(
                        f"{self._place}: the header can be read in two ways, as "
                        f"{self._header.names} and as {reader.schema.names}; quote its names"
                    )
                for batch in reader:
                    if not blocks.quotes.regular:
                        self.check_quotes()
                    if batch.num_rows:
                        yield batch
            except UnicodeDecodeError as error:
                raise ManifestError(
                    f"{self._place}: {_one_line(error)}; say --manifest.encoding"
                ) from error
            if not blocks.quotes.is_complete():
                self.check_quotes()

    def raise_parse_error(self, error: pa.ArrowInvalid) -> NoReturn:
        """Raise what an error of Arrow's means for the file."""
        if "UTF8" in str(error):
            raise ManifestError(
                f"{self._place}: {_one_line(error)}; say --manifest.encoding"
            ) from error
        self.check_quotes()
        raise ManifestError(
            f"{self._place}: {_one_line(error)}; mend the row, or quote values that hold the "
            "delimiter"
        ) from error

    def check_quotes(self) -> None:
        """Raise a ManifestError for the first quote that is misplaced, if there is one.

        Slow (about 50 MB/s), so only for a file with quotes that the fast check does not know: a
        quote inside an unquoted value is unusual, and right.
        """
        if self._checked:
            return
        escape = self._dialect.escape
        remedy = (
            "double it"
            if escape
            else "double it, or pass --manifest.escape '\\' if quotes inside "
            'values are written \\" (as Spark does)'
        )
        with self._open_stream() as blocks, _raise_field_limit():
            lines = _RowLines(blocks)
            rows = csv.reader(lines, delimiter=self._header.delimiter, strict=True)
            try:
                for _ in rows:
                    lines.start_row()
            except csv.Error as error:
                if "field larger" in str(error):
                    return  # the caller names the length
                start = _one_line("".join(lines.row))
                if "unexpected end" in str(error):
                    raise ManifestError(
                        f"{self._place}: a quote is opened and never closed in the row that begins "
                        f"on line {lines.row_line:,}: {start!r}; close it, or {remedy} where it is "
                        "part of a value"
                    ) from error
                raise ManifestError(
                    f"{self._place}: the row that begins on line {lines.row_line:,} has a quote "
                    f"inside a quoted value: {start!r}; {remedy}"
                ) from error
        self._checked = True

    @contextlib.contextmanager
    def _open_stream(self) -> Iterator[_Utf8Stream]:
        with _open_decompressed(self._file) as stream:
            yield _Utf8Stream(stream, self._header, self._dialect.escape, self._place)


class _Utf8Stream(io.RawIOBase):
    """A CSV file as UTF-8 without byte order marks; no block ends between CR and LF.

    Arrow drops an LF at the start of a block after a CR at the end of the one before, also inside
    a quoted value, where it is part of the value (Arrow 26).
    """

    def __init__(
        self, stream: IO[bytes], header: CsvHeader, escape: str | None, place: str
    ) -> None:
        super().__init__()
        self._stream, self._place = stream, place
        utf8 = codecs.lookup(header.encoding).name in ("utf-8", "utf-8-sig")
        self._decoder = None if utf8 else codecs.getincrementaldecoder(header.encoding)()
        self._unescape = None if escape is None else _Unescaper(header.delimiter, escape)
        self._kept = b""
        self._begun = self._ended = False
        self.quotes = _QuoteChecker(header.delimiter)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next block, of about `size` bytes; empty at the end."""
        block = b""
        while not block and not self._ended:
            data = _read_block(self._stream, size, self._place)
            self._ended = not data
            block = self._kept + self._decode(data)
            self._kept = b""
            if block.endswith(b"\r") and not self._ended:
                block, self._kept = block[:-1], b"\r"
        self.quotes.add(block)
        return block

    def _decode(self, data: bytes) -> bytes:
        if self._decoder is not None:
            data = self._decoder.decode(data, final=self._ended).encode()
        if not self._begun:
            while data.startswith((codecs.BOM_UTF8, b"\r", b"\n")):
                data = data.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n")
            self._begun = bool(data)
        return data if self._unescape is None else self._unescape.add(data, last=self._ended)


class _QuoteChecker:
    """Whether every quote so far opens or closes a value, or is one of a doubled pair.

    That is what RFC 4180 allows. All else is left to a slower check.
    """

    def __init__(self, delimiter: str) -> None:
        self.regular = True
        self._edges = np.zeros(256, bool)
        self._edges[[*b'\r\n"', ord(delimiter)]] = True
        self._open = False
        self._before = ord("\n")
        self._closed_last = False

    def add(self, block: bytes) -> None:
        if not block or not self.regular:
            return
        if self._closed_last and not self._edges[block[0]]:
            self.regular = False
        self._closed_last = False
        if b'"' in block:
            values = np.frombuffer(block, np.uint8)
            places = np.flatnonzero(values == ord('"'))
            opening, closing = places[int(self._open) :: 2], places[int(not self._open) :: 2]
            before = values[opening - 1]
            if len(opening) and opening[0] == 0:
                before[0] = self._before
            last = len(closing) > 0 and closing[-1] == len(values) - 1
            after = values[(closing[:-1] if last else closing) + 1]
            self.regular &= bool(self._edges[before].all() and self._edges[after].all())
            self._open ^= bool(len(places) % 2)
            self._closed_last = bool(last)
        self._before = block[-1]

    def is_complete(self) -> bool:
        """Whether the file may end here."""
        return self.regular and not self._open


class _Unescaper:
    """Rewrites escaped quotes inside quoted values as doubled quotes, and doubled escapes as one.

    An escape before any other character is part of the value, as it is to Spark.
    """

    def __init__(self, delimiter: str, escape: str) -> None:
        mark, comma = re.escape(escape.encode()), re.escape(delimiter.encode())
        self._escape = escape.encode()
        # from an opening quote to the closing one, or to the end of the data
        start = rb"(?:\A|(?<=[\r\n" + comma + rb"]))"
        inside = rb'(?:[^"' + mark + rb"]++|" + mark + rb'.|"")*+'
        self._quoted = re.compile(start + rb'"' + inside + rb'(?:"|' + mark + rb"?\Z)", re.DOTALL)
        self._escaped = re.compile(mark + rb'(["' + mark + rb"])")
        self._waiting = b""

    def add(self, data: bytes, *, last: bool) -> bytes:
        """The rows that are complete by now, rewritten; the start of the next one waits."""
        data = self._waiting + data
        end = len(data) if last else self._find_end_of_rows(data)
        self._waiting = data[end:]
        return self._quoted.sub(
            lambda found: self._escaped.sub(self._unescape, found[0]), data[:end]
        )

    def _find_end_of_rows(self, data: bytes) -> int:
        at = end = 0
        for found in self._quoted.finditer(data):
            end = max(end, 1 + _find_last_newline(data, at, found.start()))
            at = found.end()
        return max(end, 1 + _find_last_newline(data, at, len(data)))

    def _unescape(self, found: re.Match[bytes]) -> bytes:
        return b'""' if found[1] == b'"' else self._escape


class _RowLines:
    """The lines of a file with their ends, and which of them the present row consists of."""

    def __init__(self, blocks: _Utf8Stream) -> None:
        self._lines = self._split(blocks)
        self.row: list[str] = []
        self.row_line = 1

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.row.append(line)
        return line

    def start_row(self) -> None:
        self.row_line += len(self.row)
        self.row.clear()

    @staticmethod
    def _split(blocks: _Utf8Stream) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        waiting = ""
        while block := blocks.read(_HEAD_BYTES):
            lines = list(io.StringIO(waiting + decoder.decode(block), newline=""))
            waiting = lines.pop() if lines else ""
            yield from lines
        if waiting:
            yield waiting


@contextlib.contextmanager
def _raise_field_limit() -> Iterator[None]:
    before = csv.field_size_limit(_MAX_ROW_BYTES * 2)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _find_last_newline(data: bytes, start: int, end: int) -> int:
    return max(data.rfind(b"\n", start, end), data.rfind(b"\r", start, end))


@contextlib.contextmanager
def _open_decompressed(file: str) -> Iterator[IO[bytes]]:
    """The file as a binary stream, decompressed if its first bytes are those of a compression."""
    with filesystem.open_read(file) as raw:
        head = raw.read(8)
        raw.seek(0)
        kind = next(
            (kind for magic, kind in _COMPRESSION_MAGIC.items() if head.startswith(magic)), None
        )
        stream: Any = raw
        if kind == "gzip":
            stream = gzip.GzipFile(fileobj=raw)
        elif kind == "bz2":
            stream = bz2.BZ2File(raw)
        elif kind == "xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115
        elif kind == "zstd":
            stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        yield cast(IO[bytes], stream)


def _read_block(stream: IO[bytes], size: int, place: str) -> bytes:
    if not isinstance(stream, _DECOMPRESSORS):
        with filesystem.translate_os_errors(place.removeprefix("manifest ")):
            return stream.read(size)
    try:
        return stream.read(size)
    except _DECOMPRESSION_ERRORS as error:
        raise ManifestError(
            f"{place}: cannot be decompressed ({_one_line(error)}); the file is damaged or cut "
            "off, "
            "write it again"
        ) from error


def _detect_encoding(head: bytes, dialect: CsvDialect, place: str) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    try:
        if codecs.lookup(dialect.encoding).name not in ("utf-8", "utf-8-sig"):
            return dialect.encoding
    except LookupError as error:
        raise ManifestError(
            f"{place}: not {dialect.encoding} text ({error}); say --manifest.encoding"
        ) from error
    start = re.split(rb"[\r\n]", head[:64], maxsplit=1)[0].ljust(2, b"x")
    for encoding, zeros, others in (
        ("utf-16-le", start[1::2], start[::2]),
        ("utf-16-be", start[::2], start[1::2]),
    ):
        if zeros.count(0) > len(zeros) // 2 and not others.count(0):
            raise ManifestError(
                f"{place}: looks like UTF-16 without a byte order mark; pass --manifest.encoding "
                f"{encoding}"
            )
    return dialect.encoding


def _check_first_line(line: str, place: str) -> None:
    if _JSON_START.match(line):
        raise ManifestError(
            f"{place}: is JSON, not CSV (it begins with {line[:40]!r}); convert it to CSV or "
            "Parquet, for example with pandas.read_json(..., lines=True).to_parquet(...)"
        )
    if re.fullmatch(r'"?sep=.?"?', line.strip(), re.IGNORECASE):
        raise ManifestError(
            f"{place}: begins with {line.strip()!r}, which is a line for Excel; remove this line"
        )


def _detect_delimiter(text: str, dialect: CsvDialect) -> str:
    header = re.split(r"[\r\n]", re.sub(r'"[^"]*"', "", text), maxsplit=1)[0]
    counts = {mark: header.count(mark) for mark in (",", ";", "\t", "|")}
    best = max(counts, key=lambda mark: counts[mark])
    delimiter = dialect.delimiter or (best if counts[best] else ",")
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n':
        raise ManifestError(
            f"manifest.delimiter: {delimiter!r} must be one ASCII character, as , or ; or a tab"
        )
    escape = dialect.escape
    if escape is not None and (
        len(escape) != 1 or not escape.isascii() or escape in '"\r\n' or escape == delimiter
    ):
        raise ManifestError(
            f"manifest.escape: {escape!r} must be one ASCII character other than the quote and the "
            "delimiter, such as a backslash"
        )
    return delimiter


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
