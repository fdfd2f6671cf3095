"""Byte stream of a CSV file for Arrow: decompressed, decoded to UTF-8, with its quoting checked.

Arrow accepts some malformed quoting without an error, so the quotes are checked here, in one pass
with the decoding.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa

from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, one_line

_COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd",
}  # fmt: skip
_DECOMPRESSORS = (gzip.GzipFile, bz2.BZ2File, lzma.LZMAFile, pa.CompressedInputStream)
_DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError, OSError, pa.ArrowException)


@contextlib.contextmanager
def open_decompressed(file: str) -> Iterator[IO[bytes]]:
    """Open a file as a binary stream; a compression is recognized by the first bytes."""
    with filesystem.open_read(file) as raw:
        head = raw.read(8)
        raw.seek(0)
        kind = next((kind for m, kind in _COMPRESSION_MAGIC.items() if head.startswith(m)), None)
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


def read_block(stream: IO[bytes], size: int, file: str) -> bytes:
    """Read up to `size` bytes; raises ManifestError where they cannot be decompressed."""
    if not isinstance(stream, _DECOMPRESSORS):
        with filesystem.translate_os_errors(file):
            return stream.read(size)
    try:
        return stream.read(size)
    except _DECOMPRESSION_ERRORS as error:
        raise ManifestError(
            f"manifest {file}: cannot be decompressed ({one_line(error)}); the file is "
            "damaged or cut off, write it again"
        ) from error


class Utf8Stream(io.RawIOBase):
    """A CSV file as UTF-8 without byte order marks; no block ends between CR and LF.

    Arrow drops an LF at the start of a block after a CR at the end of the previous block, also
    inside a quoted value, where it is part of the value (Arrow 26).
    """

    def __init__(
        self, stream: IO[bytes], file: str, *, encoding: str, delimiter: str, escape: str | None
    ) -> None:
        super().__init__()
        self._stream, self._file = stream, file
        is_utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
        self._decoder = None if is_utf8 else codecs.getincrementaldecoder(encoding)()
        self._unescaper = None if escape is None else Unescaper(delimiter, escape)
        self._carry = b""
        self._has_begun = self._has_ended = False
        self.quotes = QuoteChecker(delimiter)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next block, of about `size` bytes; empty at the end."""
        block = b""
        while not block and not self._has_ended:
            data = read_block(self._stream, size, self._file)
            self._has_ended = not data
            block = self._carry + self._decode(data)
            self._carry = b""
            if block.endswith(b"\r") and not self._has_ended:
                block, self._carry = block[:-1], b"\r"
        self.quotes.add(block)
        return block

    def _decode(self, data: bytes) -> bytes:
        if self._decoder is not None:
            data = self._decoder.decode(data, final=self._has_ended).encode()
        if not self._has_begun:
            while data.startswith((codecs.BOM_UTF8, b"\r", b"\n")):
                data = data.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n")
            self._has_begun = bool(data)
        return data if self._unescaper is None else self._unescaper.add(data, last=self._has_ended)


class QuoteChecker:
    """Checks that every quote opens or closes a value, or is one of a doubled pair (RFC 4180).

    Vectorized over a block. A file that fails is checked again by a slower parser, which finds the
    row: a quote inside an unquoted value is unusual but valid.
    """

    def __init__(self, delimiter: str) -> None:
        self.is_regular = True
        self._edges = np.zeros(256, bool)
        self._edges[[*b'\r\n"', ord(delimiter)]] = True
        self._is_open = False
        self._previous = ord("\n")
        self._closed_last = False

    def add(self, block: bytes) -> None:
        """Check the quotes of the next block."""
        if not block or not self.is_regular:
            return
        if self._closed_last and not self._edges[block[0]]:
            self.is_regular = False
        self._closed_last = False
        if b'"' in block:
            values = np.frombuffer(block, np.uint8)
            places = np.flatnonzero(values == ord('"'))
            opening, closing = places[int(self._is_open) :: 2], places[int(not self._is_open) :: 2]
            before = values[opening - 1]
            if len(opening) and opening[0] == 0:
                before[0] = self._previous
            last = len(closing) > 0 and closing[-1] == len(values) - 1
            after = values[(closing[:-1] if last else closing) + 1]
            self.is_regular &= bool(self._edges[before].all() and self._edges[after].all())
            self._is_open ^= bool(len(places) % 2)
            self._closed_last = bool(last)
        self._previous = block[-1]

    def is_complete(self) -> bool:
        """Whether the file may end here."""
        return self.is_regular and not self._is_open


class Unescaper:
    """Rewrites escaped quotes inside quoted values as doubled quotes, and doubled escapes as one.

    An escape before any other character is part of the value, as Spark reads it.
    """

    def __init__(self, delimiter: str, escape: str) -> None:
        mark, comma = re.escape(escape.encode()), re.escape(delimiter.encode())
        self._escape = escape.encode()
        # from an opening quote to the closing one, or to the end of the data
        start = rb"(?:\A|(?<=[\r\n" + comma + rb"]))"
        inside = rb'(?:[^"' + mark + rb"]++|" + mark + rb'.|"")*+'
        self._quoted = re.compile(start + rb'"' + inside + rb'(?:"|' + mark + rb"?\Z)", re.DOTALL)
        self._escaped = re.compile(mark + rb'(["' + mark + rb"])")
        self._carry = b""

    def add(self, data: bytes, *, last: bool) -> bytes:
        """Return the rows that are complete, rewritten; the start of the next row is kept."""
        data = self._carry + data
        end = len(data) if last else self._find_end_of_rows(data)
        self._carry = data[end:]
        return self._quoted.sub(
            lambda found: self._escaped.sub(self._unescape, found[0]), data[:end]
        )

    def _find_end_of_rows(self, data: bytes) -> int:
        start = end = 0
        for found in self._quoted.finditer(data):
            end = max(end, 1 + _find_last_newline(data, start, found.start()))
            start = found.end()
        return max(end, 1 + _find_last_newline(data, start, len(data)))

    def _unescape(self, found: re.Match[bytes]) -> bytes:
        return b'""' if found[1] == b'"' else self._escape


def _find_last_newline(data: bytes, start: int, end: int) -> int:
    return max(data.rfind(b"\n", start, end), data.rfind(b"\r", start, end))
