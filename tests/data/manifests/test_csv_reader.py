"""CSV: every value as it was written, wherever a block ends; malformed quoting is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcls.data.manifests import csv_reader
from imgcls.data.manifests.csv_reader import read_csv_batches, read_csv_header
from imgcls.data.manifests.options import ReadOptions
from imgcls.errors import ManifestError


def rows_of(path: Path, **dialect: Any) -> list[list[str | None]]:
    """The values of a file, row by row."""
    found: list[list[str | None]] = []
    for batch in read_csv_batches(str(path), ReadOptions(**dialect)):
        found += [list(row.values()) for row in batch.to_pylist()]
    return found


def refused(path: Path, **dialect: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        rows_of(path, **dialect)
    assert str(caught.value).startswith(f"manifest {path}: ")
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.csv"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def use(size: int) -> None:
        monkeypatch.setattr(csv_reader, "_BLOCK_BYTES", size)

    return use


# ------------------------------------------------------------------------------ block borders


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "value", ["\r", "\n", "\r\n", "\n\r", "\r\r\n", "\r\n\r\n", 'x\r\n""\r\ny']
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_quoted_line_break_is_whole_at_every_place_of_a_block_border(
    file: Path, small_blocks: Callable[[int], None], encoding: str, value: str, newline: str
) -> None:
    written = value.replace('""', '"')
    rows = [["a.jpg", written], ["b.jpg", f"B{written}"], ["c.jpg", f"{written}E"], ["d.jpg", "p"]]
    lines = [
        "path,caption",
        *(f'{path},"{text.replace(chr(34), chr(34) * 2)}"' for path, text in rows),
    ]
    file.write_bytes((newline.join(lines) + newline).encode(encoding))
    for size in range(16, 24 + len(file.read_bytes())):
        small_blocks(size)
        assert rows_of(file) == rows, size


def test_a_quoted_line_break_is_whole_at_the_border_of_a_real_block(file: Path) -> None:
    head, before = b"path,caption\n", b'a.jpg,"'
    value = b"z" * ((8 << 20) - 1 - len(head) - len(before)) + b"\r\nB"
    file.write_bytes(head + before + value + b'"\nb.jpg,plain\n')
    assert rows_of(file) == [["a.jpg", value.decode()], ["b.jpg", "plain"]]


_VALUES = st.text(st.sampled_from('a,;"\r\n\\é \t'), max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(_VALUES, min_size=2, max_size=2), min_size=1, max_size=6),
    size=st.integers(64, 200),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_a_csv_of_python_is_read_in_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], size: int, newline: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator=newline)
    writer.writerows([["path", "x"], *rows])
    path = tmp_path_factory.getbasetemp() / "blocks.csv"
    path.write_bytes(text.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_reader, "_BLOCK_BYTES", size)
        assert rows_of(path) == rows


def test_a_row_longer_than_a_block_is_read_once(
    file: Path, small_blocks: Callable[[int], None]
) -> None:
    rows = [[f"{i}.jpg", "x" * (1000 if i % 40 == 39 else 3)] for i in range(200)]
    file.write_text("path,x\n" + "".join(f"{a},{b}\n" for a, b in rows))
    small_blocks(64)
    assert rows_of(file) == rows


def test_a_field_of_40_mb_is_read(file: Path) -> None:
    long = "data:image/png;base64," + "A" * 40_000_000
    file.write_text(f'path,label\na.jpg,cat\n"{long}",dog\n')
    assert rows_of(file) == [["a.jpg", "cat"], [long, "dog"]]


def test_a_row_that_is_too_long_is_refused_with_its_number_and_the_fix(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_reader, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(csv_reader, "_MAX_ROW_BYTES", 10_000)
    file.write_text("path,x\n" + "a,b\n" * 1000 + "c," + "x" * 30_000 + "\n")
    message = refused(file)
    assert "is longer than 128 MiB; write long values to separate files" in message


# ------------------------------------------------------------------------------ quotes


def test_quotes_that_spark_escapes_are_refused_unless_declared(file: Path) -> None:
    file.write_text('path,caption\na.jpg,"has \\"hi\\" now"\nb.jpg,plain\n')
    message = refused(file)
    assert "the row that begins on line 2 has a quote inside a quoted value" in message
    assert "--manifest.escape '\\'" in message
    assert rows_of(file, escape="\\") == [["a.jpg", 'has "hi" now'], ["b.jpg", "plain"]]


@pytest.mark.parametrize(
    "text",
    [
        'a.jpg,"\\"hi\\""\nb.jpg,x\n',
        'a.jpg,"a\\""\nb.jpg,"b\\""\n',
        'a.jpg,"x, \\"y\\", z"\n',
        'a.jpg,"5\\" disk"\n',
        'a.jpg,"one "two" three"\n',
        'a.jpg,"one,"two"\n',
        'a.jpg,"x" \n',
    ],
)
def test_no_malformed_quoting_is_read_as_something_else(file: Path, text: str) -> None:
    file.write_text("path,caption\n" + text)
    message = refused(file)
    assert "quote" in message
    assert "--manifest.escape" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('5" disk', '5" disk'),
        ('has "hi"', 'has "hi"'),
        ('"C:\\dir\\"', "C:\\dir\\"),
        ('"C:\\dir"', "C:\\dir"),
        ("C:\\dir\\", "C:\\dir\\"),
        ('""', ""),
        ('""""', '"'),
        ('"a""b"', 'a"b'),
        ('x""y', 'x""y'),
    ],
)
def test_valid_quotes_and_backslashes_are_not_changed(file: Path, text: str, value: str) -> None:
    file.write_text(f"path,x\na.jpg,{text}\nb.jpg,y\n")
    assert rows_of(file) == [["a.jpg", value], ["b.jpg", "y"]]


def _as_spark(value: str) -> str:
    """As Spark writes a value: quoted where it must be, with quotes and backslashes escaped."""
    if not any(mark in value for mark in ',"\r\n') and value:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(_VALUES.filter(bool), _VALUES.map(lambda text: text + "e")),
        min_size=1,
        max_size=6,
    ),
    size=st.integers(120, 300),
)
def test_a_csv_of_spark_is_read_with_its_escape(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], size: int
) -> None:
    lines = ["path,x", *(f"{_as_spark(a)},{_as_spark(b)}" for a, b in rows)]
    path = tmp_path_factory.getbasetemp() / "spark.csv"
    path.write_bytes(("\n".join(lines) + "\n").encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_reader, "_BLOCK_BYTES", size)
        assert rows_of(path, escape="\\") == [list(row) for row in rows]


@pytest.mark.parametrize("escape", ['"', ",", "\n", "ab", "é", ""])
def test_an_impossible_escape_is_refused(file: Path, escape: str) -> None:
    file.write_text("path,x\na,b\n")
    with pytest.raises(ManifestError, match=r"manifest\.escape: .* must be one ASCII character"):
        rows_of(file, escape=escape)


# ------------------------------------------------------------------------------ encodings


def test_several_byte_order_marks_are_no_part_of_the_first_name(file: Path) -> None:
    for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
        file.write_bytes('\ufeff\ufeff"path",x\na.jpg,b\n'.encode(encoding))
        assert read_csv_header(str(file), ReadOptions()).names == ["path", "x"]
        assert rows_of(file) == [["a.jpg", "b"]]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused_with_the_encoding_to_pass(
    file: Path, encoding: str
) -> None:
    file.write_bytes("path,größe\n犬猫犬猫犬猫犬猫犬猫犬猫犬猫犬猫犬猫.jpg,b\n".encode(encoding))
    message = refused(file)
    assert message.endswith(
        f"looks like UTF-16 without a byte order mark; pass --manifest.encoding {encoding}"
    )
    assert rows_of(file, encoding=encoding) == [["犬猫" * 9 + ".jpg", "b"]]


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        ("utf-16", "not start with BOM); set --manifest.encoding utf-16-le or utf-16-be"),
        ("utf-32", "; set --manifest.encoding"),
        ("rot13", "'rot13' is not a text encoding"),
        ("undefined", "not undefined text ("),
        ("punycode", "not punycode text ("),
    ],
)
def test_an_encoding_that_does_not_fit_is_refused(file: Path, encoding: str, reason: str) -> None:
    file.write_bytes("path,x\nä.jpg,b\n".encode("utf-16-le" if encoding == "utf-16" else "utf-8"))
    with pytest.raises(ManifestError) as caught:
        rows_of(file, encoding=encoding)
    assert reason in str(caught.value)


def test_utf_32_is_read_by_its_mark(file: Path) -> None:
    file.write_bytes("path,x\nä.jpg,犬\n".encode("utf-32"))
    assert rows_of(file) == [["ä.jpg", "犬"]]


@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        bz2.compress,
        lzma.compress,
        lambda data: pa.compress(data, "zstd", asbytes=True),
        lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),
    ],
    ids=["gzip", "bz2", "xz", "zstd", "two gzip members"],
)
def test_a_compressed_csv_is_read_and_one_that_is_cut_off_refused(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "rows.csv.gz"
    text = "path,x\n" + "".join(f"{i}.jpg,{i * 7919}\n" for i in range(1000))
    whole = compress(text.encode())
    path.write_bytes(whole)
    assert rows_of(path) == [[f"{i}.jpg", str(i * 7919)] for i in range(1000)]
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert "the file is damaged or cut off" in refused(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PAR1\x15\x04", "a Parquet file; pass --manifest.format parquet"),
        (b"ARROW1\0\0rest", "an Arrow IPC (Feather) file; convert it to Parquet"),
        (b"PK\x03\x04rest", "a ZIP archive"),
        (b"SQLite format 3\0rest", "an SQLite database"),
        (b'{"path": "a.jpg", "label": "x"}\n', "is JSON, not CSV"),
        (b'[{"path": "a.jpg"}]\n', "is JSON, not CSV"),
        (b"sep=;\npath;label\na;b\n", "a line for Excel; remove this line"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
        (b"path," + b"x" * (2 << 20) + b"\na,b\n", "its first line is longer than 1 MiB"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_another_format_is_named_with_the_fix(file: Path, content: bytes, what: str) -> None:
    file.write_bytes(content)
    assert what in refused(file)
