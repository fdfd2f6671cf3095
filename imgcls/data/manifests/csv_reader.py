"""CSV reader: streams Arrow record batches in which every value is text, as written in the file.

Detects delimiter, encoding and compression. Arrow parses the values; `csv_stream` decodes the bytes
and checks the quoting. Memory is bounded, and a ManifestError names the file, the line and the fix.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import pyarrow as pa
import pyarrow.csv as pa_csv

from imgcls.data.manifests.csv_stream import Unescaper, Utf8Stream, open_decompressed, read_block
from imgcls.data.manifests.foreign_formats import detect_foreign_format
from imgcls.data.manifests.options import ReadOptions
from imgcls.errors import ManifestError, one_line

_BLOCK_BYTES = 8 << 20
_MAX_ROW_BYTES = 128 << 20
_HEAD_BYTES = 1 << 20
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_JSON_START = re.compile(r'\s*(\{\s*"|\[\s*\{?\s*"|[\[{]\s*$)')


@dataclass(frozen=True)
class CsvHeader:
    """Column names, delimiter and encoding of a CSV file."""

    names: list[str]
    delimiter: str
    encoding: str

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in self.names])


def read_csv_schema(file: str, options: ReadOptions) -> pa.Schema:
    """The columns of a CSV file, all of them text; raises as `read_csv_header`."""
    return read_csv_header(file, options).schema


def read_csv_header(file: str, options: ReadOptions) -> CsvHeader:
    """Column names, delimiter and encoding of a CSV file, from its first MiB.

    Raises ManifestError where the file is not CSV or the header cannot be read.
    """
    place = f"manifest {file}"
    with open_decompressed(file) as stream:
        head = read_block(stream, _HEAD_BYTES, file)
    if (found := detect_foreign_format(head, options.keys)) is not None:
        raise ManifestError(f"{place}: contains binary data, not CSV: it is {found}")
    encoding = _detect_encoding(head, options, place)
    whole = len(head) < _HEAD_BYTES
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
        text = decoder.decode(head, final=whole).lstrip("\ufeff\r\n")
    except UnicodeError as error:
        raise _build_encoding_error(place, encoding, options, error) from error
    first_line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    _check_first_line(first_line, place, options)
    if not whole and not re.search(r"[\r\n]", text):
        raise ManifestError(f"{place}: its first line is longer than 1 MiB; it must name columns")
    delimiter = _detect_delimiter(text, options)
    if options.escape is not None:
        text = Unescaper(delimiter, options.escape).add(text.encode(), last=True).decode()
    try:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ManifestError(f"{place}: the header cannot be read: {error}") from error
    return CsvHeader(names, delimiter, encoding)


def read_csv_batches(file: str, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """Stream the rows of a CSV file; an unquoted empty value is null, any other value is text.

    A row may be up to 128 MiB long. Raises ManifestError where the text cannot be decoded, a row
    has too many or too few values, or a quote is misplaced.
    """
    table = _CsvFile(file, options, read_csv_header(file, options))
    done = 0
    for block_bytes in (_BLOCK_BYTES, _MAX_ROW_BYTES):
        try:
            start = 0
            for batch in table.read_batches(block_bytes):
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
                table.raise_parse_error(error)
    table.check_quotes()
    raise ManifestError(
        f"manifest {file}: the row after row {done:,} is longer than 128 MiB; write long values "
        "to separate files and use their paths"
    )


class _CsvFile:
    """One CSV file whose header is known."""

    def __init__(self, file: str, options: ReadOptions, header: CsvHeader) -> None:
        self._file, self._options, self._header = file, options, header
        self._place = f"manifest {file}"
        self._has_valid_quotes = False

    def read_batches(self, block_bytes: int) -> Iterator[pa.RecordBatch]:
        """Stream the rows; raises pa.ArrowInvalid where Arrow cannot parse them."""
        with self._open_stream() as stream:
            try:
                reader = pa_csv.open_csv(
                    stream,
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
                    if not stream.quotes.is_regular:
                        self.check_quotes()
                    if batch.num_rows:
                        yield batch
            except UnicodeError as error:
                raise self._build_decode_error(error) from error
            if not stream.quotes.is_complete():
                self.check_quotes()

    def raise_parse_error(self, error: pa.ArrowInvalid) -> NoReturn:
        """Raise the ManifestError for an error of Arrow's parser."""
        if "UTF8" in str(error):
            raise self._build_decode_error(error) from error
        self.check_quotes()
        raise ManifestError(
            f"{self._place}: {one_line(error)}; fix the row, or quote values that contain the "
            "delimiter"
        ) from error

    def check_quotes(self) -> None:
        """Raise a ManifestError for the first misplaced quote, if there is one.

        Slow (about 50 MB/s), so it runs only on a file that fails `QuoteChecker`.
        """
        if self._has_valid_quotes:
            return
        with self._open_stream() as stream, _raise_field_limit():
            lines = _RowLines(stream)
            rows = csv.reader(lines, delimiter=self._header.delimiter, strict=True)
            try:
                for _ in rows:
                    lines.start_row()
            except csv.Error as error:
                if "field larger" in str(error):
                    return  # the caller reports the length
                raise self._build_quote_error(error, lines) from error
        self._has_valid_quotes = True

    def _build_quote_error(self, error: csv.Error, lines: _RowLines) -> ManifestError:
        fix = "double it"
        if not self._options.escape:
            option = self._options.keys.option("escape")
            fix += (
                f", or pass {option} '\\' if quotes inside values are written \\\" (as Spark does)"
            )
        start = one_line("".join(lines.row))
        if "unexpected end" in str(error):
            return ManifestError(
                f"{self._place}: a quote is opened and never closed in the row that begins on line "
                f"{lines.row_line:,}: {start!r}; close it, or {fix} where it is part of a value"
            )
        return ManifestError(
            f"{self._place}: the row that begins on line {lines.row_line:,} has a quote inside a "
            f"quoted value: {start!r}; {fix}"
        )

    def _build_decode_error(self, error: Exception) -> ManifestError:
        option = self._options.keys.option("encoding")
        return ManifestError(f"{self._place}: {one_line(error)}; set {option}")

    @contextlib.contextmanager
    def _open_stream(self) -> Iterator[Utf8Stream]:
        with open_decompressed(self._file) as stream:
            yield Utf8Stream(
                stream,
                self._file,
                encoding=self._header.encoding,
                delimiter=self._header.delimiter,
                escape=self._options.escape,
            )


class _RowLines:
    """Iterator over the lines of a file with their ends; remembers the lines of the current row."""

    def __init__(self, stream: Utf8Stream) -> None:
        self._lines = self._split(stream)
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
    def _split(stream: Utf8Stream) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        rest = ""
        while block := stream.read(_HEAD_BYTES):
            lines = list(io.StringIO(rest + decoder.decode(block), newline=""))
            rest = lines.pop() if lines else ""
            yield from lines
        if rest:
            yield rest


@contextlib.contextmanager
def _raise_field_limit() -> Iterator[None]:
    before = csv.field_size_limit(_MAX_ROW_BYTES * 2)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _detect_encoding(head: bytes, options: ReadOptions, place: str) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    try:
        "a".encode(options.encoding)  # fails for a codec that does not encode text
        if codecs.lookup(options.encoding).name not in ("utf-8", "utf-8-sig"):
            return options.encoding
    except (LookupError, UnicodeError) as error:
        raise _build_encoding_error(place, options.encoding, options, error) from error
    start = re.split(rb"[\r\n]", head[:64], maxsplit=1)[0].ljust(2, b"x")
    for encoding, zeros, others in (
        ("utf-16-le", start[1::2], start[::2]),
        ("utf-16-be", start[::2], start[1::2]),
    ):
        if zeros.count(0) > len(zeros) // 2 and not others.count(0):
            raise ManifestError(
                f"{place}: looks like UTF-16 without a byte order mark; pass "
                f"{options.keys.option('encoding')} {encoding}"
            )
    return options.encoding


def _build_encoding_error(
    place: str, encoding: str, options: ReadOptions, error: Exception
) -> ManifestError:
    remedy = f"set {options.keys.option('encoding')}"
    if "BOM" in str(error):
        remedy += f" {encoding}-le or {encoding}-be"
    return ManifestError(f"{place}: not {encoding} text ({error}); {remedy}")


def _check_first_line(line: str, place: str, options: ReadOptions) -> None:
    if not line.strip():
        raise ManifestError(f"{place}: is empty; the first line must name the columns")
    if "\x00" in line:
        raise ManifestError(
            f"{place}: contains binary data, not CSV; pass {options.keys.option('format')} parquet "
            "if it is a Parquet file"
        )
    if _JSON_START.match(line):
        raise ManifestError(
            f"{place}: is JSON, not CSV (it begins with {line[:40]!r}); convert it to CSV or "
            "Parquet, for example with pandas.read_json(..., lines=True).to_parquet(...)"
        )
    if re.fullmatch(r'"?sep=.?"?', line.strip(), re.IGNORECASE):
        raise ManifestError(
            f"{place}: begins with {line.strip()!r}, which is a line for Excel; remove this line"
        )


def _detect_delimiter(text: str, options: ReadOptions) -> str:
    header = re.split(r"[\r\n]", re.sub(r'"[^"]*"', "", text), maxsplit=1)[0]
    counts = {mark: header.count(mark) for mark in (",", ";", "\t", "|")}
    best = max(counts, key=lambda mark: counts[mark])
    delimiter = options.delimiter or (best if counts[best] else ",")
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n':
        raise ManifestError(
            f"{options.keys.key('delimiter')}: {delimiter!r} must be one ASCII character, such as "
            ", or ; or a tab"
        )
    escape = options.escape
    if escape is not None and (
        len(escape) != 1 or not escape.isascii() or escape in '"\r\n' or escape == delimiter
    ):
        raise ManifestError(
            f"{options.keys.key('escape')}: {escape!r} must be one ASCII character other than the "
            "quote and the delimiter, such as a backslash"
        )
    return delimiter
