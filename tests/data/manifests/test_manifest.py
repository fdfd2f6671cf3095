"""Manifests: every row in order, every value as it came, and errors that name the place."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from imgcls.data.manifests.manifest import (
    ManifestConfig,
    find_label_variants,
    normalize_labels,
    open_manifest,
    resolve_path,
    resolve_paths,
)
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, RequestError
from tests.s3 import url


def open_at(path: object, **options: Any) -> Any:
    return open_manifest(ManifestConfig(path=str(path), **options))


def rows_of(path: object, **options: Any) -> list[dict[str, Any]]:
    manifest = open_at(path, **options)
    rows: list[dict[str, Any]] = []
    for batch in manifest.batches():
        assert batch.schema.equals(manifest.schema)
        rows += batch.to_pylist()
    return rows


def refused(path: object, **options: Any) -> str:
    """The error when the manifest is opened, or its rows are read."""
    with pytest.raises(ManifestError) as caught:
        rows_of(path, **options)
    return str(caught.value)


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of the test's folder."""

    def write(content: bytes | str, name: str = "rows.csv") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


Put = Callable[..., Path]


# ------------------------------------------------------------------------------ CSV


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", [True, False], ids=["ended", "unended"])
def test_csv_files_of_any_writer_are_read(
    put: Put, bom: bytes, newline: str, delimiter: str, end: bool
) -> None:
    lines = [["path", "label"], ["a.jpg", "cat"], ["b.jpg", "dog"]]
    text = newline.join(delimiter.join(line) for line in lines) + (newline if end else "")
    assert rows_of(put(bom + text.encode())) == [
        {"path": "a.jpg", "label": "cat"},
        {"path": "b.jpg", "label": "dog"},
    ]


def test_quotes_keep_delimiters_newlines_and_quotes_in_a_value(put: Put) -> None:
    path = put(
        'path,"la""bel","note\nline"\n"a,b.jpg","two\nlines","has ""hi"""\nc.jpg,"x\r\ny",\n'
    )
    assert rows_of(path) == [
        {"path": "a,b.jpg", 'la"bel': "two\nlines", "note\nline": 'has "hi"'},
        {"path": "c.jpg", 'la"bel': "x\r\ny", "note\nline": None},
    ]


@pytest.mark.parametrize(
    "value", ["007", "NA", "null", "None", "nan", "N/A", "-", "1e5", "true", " padded ", "#N/A"]
)
def test_a_value_is_not_changed(put: Put, value: str) -> None:
    (row,) = rows_of(put(f"path,label\n{value},{value}\n"))
    assert row == {"path": value, "label": value}


def test_only_an_unquoted_empty_value_is_null(put: Put) -> None:
    assert rows_of(put('path,label\n,\n"",""\n')) == [
        {"path": None, "label": None},
        {"path": "", "label": ""},
    ]


def test_blank_lines_are_no_rows(put: Put) -> None:
    assert rows_of(put("\n\npath,label\n\na.jpg,x\n\n\nb.jpg,y\n\n")) == [
        {"path": "a.jpg", "label": "x"},
        {"path": "b.jpg", "label": "y"},
    ]


def test_a_header_alone_is_a_manifest_without_rows(put: Put) -> None:
    assert rows_of(put("path,label")) == []
    assert rows_of(put("path,label\n")) == []


def test_the_delimiter_is_detected_in_the_header_only(put: Put) -> None:
    assert rows_of(put("path;label\na,b,c.jpg;x\n")) == [{"path": "a,b,c.jpg", "label": "x"}]
    assert rows_of(put('"path,really"|path\na|b\n')) == [{"path,really": "a", "path": "b"}]
    assert rows_of(put("path,label\na;b.jpg,x\n")) == [{"path": "a;b.jpg", "label": "x"}]


def test_the_delimiter_can_be_set(put: Put) -> None:
    path = put("path:label;really\na.jpg:x;y\n")
    assert rows_of(path, delimiter=":") == [{"path": "a.jpg", "label;really": "x;y"}]


@pytest.mark.parametrize("delimiter", ["->", "→", '"', "\n", "\r\n"])
def test_an_impossible_delimiter_is_refused(put: Put, delimiter: str) -> None:
    message = refused(put("path,label\na,b\n"), delimiter=delimiter)
    assert message.startswith(f"manifest.delimiter: {delimiter!r} must be one ASCII character")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_detected_by_its_mark(put: Put, encoding: str) -> None:
    text = 'path,größe\nä.jpg,"ü,\n→"\n猫.jpg,犬\n'
    mark = "" if encoding == "utf-16" else "\ufeff"
    assert rows_of(put((mark + text).encode(encoding))) == [
        {"path": "ä.jpg", "größe": "ü,\n→"},
        {"path": "猫.jpg", "größe": "犬"},
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "shift_jis", "utf-16-le"])
def test_any_other_encoding_can_be_set(put: Put, encoding: str) -> None:
    text = "猫.jpg,犬" if encoding == "shift_jis" else "ä.jpg,ü"
    path, label = text.split(",")
    found = rows_of(put(f"path,label\n{text}\n".encode(encoding)), encoding=encoding)
    assert found == [{"path": path, "label": label}]


def test_text_in_another_encoding_is_refused_with_the_option(put: Put) -> None:
    early = put("path,label\nä.jpg,x\n".encode("latin-1"))
    late = put(b"path,label\n" + b"a.jpg,x\n" * 300_000 + b"\xe4.jpg,x\n", "late.csv")
    for path in (early, late):
        message = refused(path)
        assert message.startswith(f"manifest {path}: ")
        assert message.endswith("set --manifest.encoding")
    assert "unknown encoding: klingon" in refused(early, encoding="klingon")


@pytest.mark.parametrize(
    ("text", "row", "found"),
    [
        ("path,label\na.jpg,x\nb.jpg,y,z\n", 3, "Expected 2 columns, got 3: b.jpg,y,z"),
        ("path,label\na.jpg,x\nb.jpg\n", 3, "Expected 2 columns, got 1: b.jpg"),
        ("path,label\na,b.jpg,x\n", 2, "Expected 2 columns, got 3"),
        ("path,label\n" + "a.jpg,x\n" * 2_000_000 + "b.jpg\n", 2_000_002, "got 1: b.jpg"),
    ],
    ids=["long", "short", "unquoted", "far"],
)
def test_a_ragged_row_is_refused_by_its_number(put: Put, text: str, row: int, found: str) -> None:
    path = put(text)
    message = refused(path)
    assert message.startswith(f"manifest {path}: ")
    assert f"Row #{row}:" in message
    assert found in message
    assert "fix the row, or quote values that contain the delimiter" in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_quote_that_is_never_closed_swallows_no_rows(put: Put, encoding: str) -> None:
    path = put('path,label\na.jpg,x\nb.jpg,"y\nc.jpg,z\nd.jpg,z\n'.encode(encoding))
    message = refused(path)
    assert message.startswith(f"manifest {path}: a quote is opened and never closed")
    assert "c.jpg,z" in message
    assert "path,label" in refused(put('"path,label\na.jpg,x\n', "header.csv"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\n"])
def test_a_quoted_newline_may_end_the_last_row(put: Put, encoding: str, end: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = put(f'{mark}path,label\na.jpg,"x\n"{end}'.encode(encoding))
    assert rows_of(path) == [{"path": "a.jpg", "label": "x\n"}]


def test_a_file_that_is_no_csv_is_refused(put: Put) -> None:
    assert "is empty; the first line must name the columns" in refused(put(b""))
    assert "is empty" in refused(put("\n\n\n"))
    assert "contains binary data, not CSV" in refused(put(b"PAR1\x00\x00\x15\x04,\x00\n"))
    assert "the header cannot be read" in refused(put("path," + "x" * 200_000 + "\na,b\n"))


# Parsed by Arrow, the delimiter detected by Python: any text in any column must come back equal

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_NAMES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=8),
    min_size=1,
    max_size=4,
    unique=True,
).filter(lambda names: "path" not in names and names[0].strip(" \t\r\n\x0b\x0c") == names[0] != "")


@st.composite
def _tables(draw: Any) -> tuple[list[str], list[list[str | None]]]:
    names = [*draw(_NAMES), "path"]
    row = st.lists(_TEXT, min_size=len(names), max_size=len(names))
    return names, draw(st.lists(row, max_size=8))


@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    table=_tables(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    newline=st.sampled_from(["\n", "\r\n"]),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_a_written_csv_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    table: tuple[list[str], list[list[str]]],
    quoting: Any,
    newline: str,
    delimiter: str,
    encoding: str,
) -> None:
    names, rows = table
    unquoted = quoting == csv.QUOTE_MINIMAL
    if unquoted and newline == "\n":  # Python's writer leaves a carriage return unquoted then
        names, *rows = [[v.replace("\r", "_") for v in row] for row in (names, *rows)]
        assume(len(set(names)) == len(names))
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=quoting, lineterminator=newline, delimiter=delimiter)
    writer.writerow(names)
    writer.writerows(rows)
    path = tmp_path_factory.getbasetemp() / "fuzzed.csv"
    path.write_bytes(text.getvalue().encode(encoding))
    found = rows_of(path, delimiter=delimiter)
    expected = [[None if unquoted and value == "" else value for value in row] for row in rows]
    assert [[row[name] for name in names] for row in found] == expected


@settings(max_examples=100)
@given(
    table=_tables(),
    group=st.integers(1, 5),
    kind=st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
)
def test_a_written_parquet_file_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    table: tuple[list[str], list[list[str | None]]],
    group: int,
    kind: pa.DataType,
) -> None:
    names, rows = table
    columns = [
        pa.array([row[i] for row in rows], pa.string()).cast(kind) for i in range(len(names))
    ]
    path = tmp_path_factory.getbasetemp() / "fuzzed.parquet"
    written = pa.table(dict(zip(names, columns, strict=True)))
    pq.write_table(written, path, row_group_size=group)
    assert rows_of(path) == written.to_pylist()


_MEMORY = """
import resource, sys
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
manifest = open_manifest(ManifestConfig(path=sys.argv[1]))
batches = manifest.batches()
rows = next(batches).num_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for batch in batches:
    rows += batch.num_rows
manifest.fingerprint()
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_two_million_rows_stream_in_bounded_memory(tmp_path: Path, format: str) -> None:
    count, path = 2_000_000, tmp_path / f"many.{format}"
    row = "s3://bucket/some/long/prefix/of/images/{:09d}.jpg,class {:03d},camera {:02d}\n"
    block = "".join(row.format(i, i % 1000, i % 60) for i in range(count // 20))
    if format == "csv":
        with path.open("w", encoding="utf-8") as stream:
            stream.write("path,label,camera\n")
            for _ in range(20):
                stream.write(block)
    else:
        columns = list(zip(*(line.split(",") for line in block.splitlines()), strict=True))
        part = pa.table(dict(zip(("path", "label", "camera"), map(list, columns), strict=True)))
        with pq.ParquetWriter(path, part.schema, use_dictionary=["label"]) as writer:
            for _ in range(20):
                writer.write_table(part)
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    rows, grown_kib = map(int, done.stdout.split())
    assert rows == count
    assert grown_kib < 150 * 1024


# ------------------------------------------------------------------------------ Parquet


def _pets(start: int = 0, **columns: Any) -> pa.Table:
    return pa.table(
        {"path": [f"{i}.jpg" for i in range(start, start + 3)], "label": ["cat", "dog", None]}
        | columns
    )


def test_a_parquet_folder_or_glob_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name, start in (("b.parquet", 3), ("a.parquet", 0), ("c.pq", 6)):
        pq.write_table(_pets(start), tmp_path / name)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".d.parquet.tmp").touch()
    six = [f"{i}.jpg" for i in range(6)]
    assert [row["path"] for row in rows_of(tmp_path)] == six
    assert [row["path"] for row in rows_of(f"{tmp_path}/*.parquet")] == six
    assert [row["path"] for row in rows_of(f"{tmp_path}/*.p*q*")][-1] == "8.jpg"
    assert [row["path"] for row in rows_of(tmp_path / "c.pq")] == ["6.jpg", "7.jpg", "8.jpg"]


def test_a_folder_of_csv_files_is_one_manifest(put: Put, tmp_path: Path) -> None:
    put("path,label\nb.jpg,y\n", "b.csv")
    put("path;label\na.jpg;x\n", "a.csv")
    assert [row["path"] for row in rows_of(tmp_path)] == ["a.jpg", "b.jpg"]


def test_columns_of_any_type_are_not_changed(tmp_path: Path) -> None:
    table = _pets(
        box=pa.array([{"x": 1, "tags": ["a"]}, None, {"x": None, "tags": []}]),
        vector=pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2)),
        seen=pa.array([1, 2, None], pa.timestamp("us", "UTC")),
        price=pa.array([1, None, 3]).cast(pa.decimal128(30, 2)),
        raw=pa.array([b"\x00\xff", None, b""]),
        camera=pa.array(["x", "y", "x"]).dictionary_encode(),
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    manifest = open_at(tmp_path / "rows.parquet")
    assert manifest.schema.equals(table.schema)
    assert pa.Table.from_batches(manifest.batches()).to_pylist() == table.to_pylist()


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_paths_may_be_text_of_any_arrow_type(tmp_path: Path, kind: pa.DataType) -> None:
    paths = pa.array(["a.jpg", None, "ä.jpg", "a.jpg"]).cast(kind)
    pq.write_table(pa.table({"path": paths}), tmp_path / "rows.parquet")
    found = [row["path"] for row in rows_of(tmp_path / "rows.parquet")]
    assert found == ["a.jpg", None, "ä.jpg", "a.jpg"]


@pytest.mark.parametrize(
    "paths", [pa.array([1, 2]), pa.array([b"a.jpg"]), pa.array([["a.jpg"]])], ids=str
)
def test_a_path_column_that_is_no_text_is_refused(tmp_path: Path, paths: pa.Array) -> None:
    pq.write_table(pa.table({"path": paths}), tmp_path / "rows.parquet")
    message = refused(tmp_path)
    assert "column 'path' is " in message
    assert ", not text" in message
    assert "--manifest.path-column" in message


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (_pets(extra=[1, 2, 3]), "its columns (path, label, extra) differ from (path, label)"),
        (_pets().select(["path"]), "its columns (path) differ from (path, label)"),
        (_pets(label=[1, 2, 3]), "its column 'label' is int64, and string in"),
    ],
    ids=["more", "fewer", "type"],
)
def test_tables_of_different_shapes_are_refused_by_name(
    tmp_path: Path, other: pa.Table, expected: str
) -> None:
    pq.write_table(_pets(), tmp_path / "a.parquet")
    pq.write_table(other, tmp_path / "b.parquet")
    message = refused(tmp_path)
    assert message.startswith(f"manifest {tmp_path / 'b.parquet'}: {expected}")
    assert str(tmp_path / "a.parquet") in message


def test_tables_of_one_shape_may_differ_in_order_and_width(tmp_path: Path) -> None:
    pq.write_table(
        _pets(note=pa.nulls(3), n=pa.array([1, 2, 3], pa.int8())), tmp_path / "a.parquet"
    )
    other = _pets(3, note=["x", None, "z"], n=[2**40, None, 5]).select(
        ["n", "note", "label", "path"]
    )
    pq.write_table(other, tmp_path / "b.parquet")
    manifest = open_at(tmp_path)
    assert manifest.schema.names == ["path", "label", "note", "n"]
    found = rows_of(tmp_path)
    assert [row["note"] for row in found] == [None, None, None, "x", None, "z"]
    assert [row["n"] for row in found] == [1, 2, 3, 2**40, None, 5]
    assert [row["path"] for row in found] == [f"{i}.jpg" for i in range(6)]


def test_another_format_named_parquet_is_refused_by_its_name(tmp_path: Path) -> None:
    feather.write_feather(_pets(), str(tmp_path / "a.parquet"), compression="uncompressed")
    assert (
        "is not a Parquet file but an Arrow IPC (Feather) file; convert it to Parquet"
        in refused(tmp_path / "a.parquet")
    )


def test_times_of_int96_are_right_or_refused(tmp_path: Path) -> None:
    def written(*seconds: int) -> Path:
        times = pa.array([each * 1_000_000 for each in seconds], pa.timestamp("us"))
        table = pa.table({"path": ["a"] * len(seconds), "seen": times})
        pq.write_table(table, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
        return tmp_path / "a.parquet"

    sound = [-9_000_000_000, -1, 0, 1_700_000_000, 9_000_000_000]
    batch = next(iter(open_at(written(*sound)).batches()))
    assert batch["seen"].cast(pa.int64()).to_pylist() == [each * 10**9 for each in sound]
    assert "column 'seen' has times outside the years 1677 to 2262" in refused(
        written(0, 253_402_300_799)  # 9999-12-31T23:59:59
    )


def test_a_dictionary_in_a_list_that_arrow_cannot_read_is_refused_by_column(tmp_path: Path) -> None:
    words = pa.array([f"w{i % 9}" for i in range(100)]).dictionary_encode()
    lists = pa.ListArray.from_arrays(pa.array(range(101), pa.int32()), words)
    table = pa.table({"path": [f"{i}.jpg" for i in range(100)], "tags": lists})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    message = refused(tmp_path / "a.parquet")
    assert "such as 'tags' (a dictionary inside a list, struct or map)" in message
    assert "leave it out, or write it as another type" in message


def test_metadata_is_no_difference_between_tables(tmp_path: Path) -> None:
    pq.write_table(_pets(), tmp_path / "a.parquet")
    pq.write_table(_pets(3).replace_schema_metadata({"made": "later"}), tmp_path / "b.parquet")
    assert len(rows_of(tmp_path)) == 6


def test_a_damaged_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(_pets(), path)
    whole = path.read_bytes()
    errors = []
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            rows_of(path)
        except ManifestError as error:
            errors.append(str(error))
    assert len(errors) > len(whole) // 4
    assert all(str(path) in message for message in errors)
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        assert str(path) in refused(path)


def test_text_that_is_not_utf_8_is_refused_and_no_later_crash(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xe4.jpg"]).buffers()[1:]])
    pq.write_table(pa.table({"path": broken}), tmp_path / "rows.parquet")
    message = refused(tmp_path)
    assert str(tmp_path / "rows.parquet") in message
    assert "UTF8" in message


# ------------------------------------------------------------------------------ folders of images


@pytest.fixture
def tree(put: Put, tmp_path: Path) -> Path:
    for name in (
        "pets/dog/2.JPG", "pets/dog/10.jpeg", "pets/cat/deep/er/1.png", "pets/cat/1.webp",
        "pets/cat/notes.txt", "pets/cat/.hidden.jpg", "pets/.trash/1.jpg", "pets/_other/1.tif",
        "pets/README.md",
    ):  # fmt: skip
        put(name.encode(), name)
    return tmp_path / "pets"


def test_a_folder_per_class_is_a_labeled_manifest(tree: Path) -> None:
    manifest = open_at(tree)
    assert (manifest.format, manifest.label_column) == ("tree", "label")
    assert rows_of(tree) == [
        {"path": "_other/1.tif", "label": "_other"},
        {"path": "cat/1.webp", "label": "cat"},
        {"path": "cat/deep/er/1.png", "label": "cat"},
        {"path": "dog/10.jpeg", "label": "dog"},
        {"path": "dog/2.JPG", "label": "dog"},
    ]
    for row in rows_of(tree):
        assert Path(manifest.resolve(row["path"]) or "").read_bytes().decode().endswith(row["path"])


def test_the_columns_of_a_tree_can_be_named(tree: Path) -> None:
    manifest = open_at(tree, path_column="file", label_column="animal")
    assert manifest.schema.names == ["file", "animal"]
    assert (manifest.path_column, manifest.label_column) == ("file", "animal")


def test_an_image_next_to_the_class_folders_is_refused_without_a_format(
    tree: Path, put: Put
) -> None:
    put(b"", "pets/zebra.jpg")
    assert "'zebra.jpg' is next to the class folders" in refused(tree, format="tree")
    assert "images next to its folders ('zebra.jpg') and in them ('_other/1.tif')" in refused(tree)
    manifest = open_at(tree, format="images")
    assert (manifest.format, manifest.label_column) == ("images", None)


def test_a_folder_or_glob_of_images_is_an_unlabeled_manifest(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_at(tree / "dog")
    assert (folder.format, folder.label_column) == ("images", None)
    assert rows_of(tree / "dog") == [{"path": "10.jpeg"}, {"path": "2.JPG"}]
    monkeypatch.chdir(tree)
    manifest = open_at("*/*.[jw]*")
    paths = ["cat/1.webp", "dog/10.jpeg"]
    assert [row["path"] for row in rows_of("*/*.[jw]*")] == paths
    monkeypatch.chdir("/")
    assert [manifest.resolve(path) for path in paths] == [str(tree / path) for path in paths]
    assert rows_of(tree / "dog" / "2.JPG") == [{"path": str(tree / "dog" / "2.JPG")}]


def test_a_glob_is_no_tree(tree: Path) -> None:
    assert "is not a folder" in refused(f"{tree}/*/*.jpeg", format="tree")


def test_a_folder_whose_name_looks_like_a_pattern_is_that_folder(put: Put, tmp_path: Path) -> None:
    put(b"", "set [1]/a.jpg")
    put(b"", "set 1/b.jpg")
    assert [row["path"] for row in rows_of(tmp_path / "set [1]")] == ["a.jpg"]


def test_links_are_followed_but_not_in_circles(tree: Path, tmp_path: Path) -> None:
    (tree / "cat" / "loop").symlink_to(tree)
    (tree / "horse").symlink_to(tree / "dog")
    paths = [row["path"] for row in rows_of(tree)]
    assert paths == [
        "_other/1.tif", "cat/1.webp", "cat/deep/er/1.png", "dog/10.jpeg", "dog/2.JPG",
        "horse/10.jpeg", "horse/2.JPG",
    ]  # fmt: skip


def test_a_dead_link_is_a_row_like_any_other(tree: Path) -> None:
    whole = open_at(tree).fingerprint()
    (tree / "dog" / "gone.jpg").symlink_to(tree / "nowhere.jpg")
    assert "dog/gone.jpg" in [row["path"] for row in rows_of(tree)]
    assert open_at(tree).fingerprint() != whole


def test_a_folder_without_an_image_is_refused(put: Put, tmp_path: Path) -> None:
    put("nothing", "empty/cat/notes.txt")
    message = refused(tmp_path / "empty")
    assert message.startswith(f"manifest {tmp_path / 'empty'}: contains no image")
    assert "*.jpg" in message


def test_a_file_name_that_is_not_utf_8_is_a_row_with_replacement_characters(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"a.jpg", b"\xe4.jpg"):
        with open(os.fsencode(folder) + b"/" + name, "wb"):
            pass
    manifest = open_manifest(ManifestConfig(path=str(folder)))
    table = pa.Table.from_batches(list(manifest.batches()), schema=manifest.schema)
    assert table["path"].to_pylist() == ["a.jpg", "\ufffd.jpg"]


# ------------------------------------------------------------------------------ columns and paths


def test_a_missing_column_is_refused_with_those_there(put: Put) -> None:
    path = put("file,label\na.jpg,x\n")
    assert refused(path) == (
        f"manifest {path}: no column 'path' (found: file, label); name it with "
        "--manifest.path-column"
    )
    message = refused(path, path_column="file", label_column="class")
    assert "no column 'class' (found: file, label); name it with --manifest.label-column" in message


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_a_dropped_column_is_not_read(put: Put, tmp_path: Path, format: str) -> None:
    path = put("path,label,status,width\na.jpg,x,success,256\n")
    if format == "parquet":
        path = tmp_path / "rows.parquet"
        row = {"path": "a.jpg", "label": "x", "status": "success", "width": 256}
        pq.write_table(pa.Table.from_pylist([row]), path)
    assert rows_of(path, drop_columns="status, width") == [{"path": "a.jpg", "label": "x"}]
    manifest = open_at(path, drop_columns=["label"])
    assert manifest.label_column is None
    assert "label" not in manifest.schema.names
    identities = [
        open_at(path, drop_columns=names).describe_identity() for names in ([], ["label"])
    ]
    assert "drop_columns" not in identities[0]
    assert identities[1] == {**identities[0], "label_column": None, "drop_columns": ["label"]}


def test_a_column_that_is_needed_or_missing_cannot_be_dropped(put: Put, tmp_path: Path) -> None:
    path = put("path,label,day\na.jpg,x,1\n")
    assert "column 'path' is read as that of the paths" in refused(path, drop_columns=["path"])
    message = refused(path, label_column="day", drop_columns=["day"])
    assert message == (
        f"manifest {path}: column 'day' is read as that of the labels; remove it from "
        "--manifest.drop-columns"
    )
    message = refused(path, drop_columns=["night"])
    assert "no column 'night' (found: path, label, day); name it with --manifest.drop-columns" in (
        message
    )


def test_the_labels_of_a_folder_can_be_dropped(tree: Path) -> None:
    labeled = rows_of(tree)
    paths = [{"path": row["path"]} for row in labeled]
    assert labeled != paths
    assert rows_of(tree, drop_columns=["label"]) == paths


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_a_duplicate_column_name_is_refused(put: Put, tmp_path: Path, format: str) -> None:
    if format == "csv":
        put("path,x,x\na,1,2\n")
    else:
        columns = [pa.array(["a"]), pa.array(["1"]), pa.array(["2"])]
        pq.write_table(pa.Table.from_arrays(columns, ["path", "x", "x"]), tmp_path / "rows.parquet")
    assert "column 'x' is in it twice" in refused(tmp_path)


def test_the_label_column_is_label_when_there_is_one(put: Put) -> None:
    assert open_at(put("path,label\n")).label_column == "label"
    assert open_at(put("path,class\n")).label_column is None
    assert open_at(put("path,label,class\n"), label_column="class").label_column == "class"


def test_a_manifest_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"no such file or folder relative to {tmp_path}" in refused("none.csv")
    assert "no such file or folder" in refused(tmp_path / "none.csv")
    assert "no file matches; check the pattern" in refused(f"{tmp_path}/*.csv")
    assert issubclass(ManifestError, RequestError)


def test_a_format_that_cannot_be_detected_must_be_passed(put: Put, tmp_path: Path) -> None:
    path = put("path,label\na.jpg,x\n", "rows")
    assert "pass --manifest.format csv, parquet, images, webdataset or zip" in refused(path)
    assert rows_of(path, format="csv") == [{"path": "a.jpg", "label": "x"}]
    assert "the folder contains no parquet file" in refused(tmp_path, format="parquet")
    assert "if it is CSV, pass --manifest.format csv" in refused(path, format="parquet")


def test_relative_paths_start_at_the_manifests_folder_or_at_the_root(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("path\nx\n", "lists/rows.csv")
    monkeypatch.chdir(tmp_path)
    default, elsewhere = open_at("lists/rows.csv"), open_at("lists/rows.csv", root="images")
    store = open_at("lists/rows.csv", root="s3://bucket/images/")
    monkeypatch.chdir("/")
    assert default.resolve("a/ b#?%20.jpg") == f"{tmp_path}/lists/a/ b#?%20.jpg"
    assert default.resolve("../a.jpg") == f"{tmp_path}/lists/../a.jpg"
    assert elsewhere.resolve("a.jpg") == f"{tmp_path}/images/a.jpg"
    assert store.resolve("a/b.jpg") == "s3://bucket/images/a/b.jpg"
    assert default.resolve(None) is None


@pytest.mark.parametrize(
    "path",
    [
        "/data/a.jpg",
        "s3://bucket/a.jpg",
        "gs://bucket/a.jpg",
        "https://host/a.jpg?x=1#y",
        "file:///data/a.jpg",
        "file:/data/a.jpg",
        "data:image/png;base64,AAAA",
    ],
)
def test_absolute_paths_and_urls_are_not_changed(path: str) -> None:
    assert resolve_path(path, "/root") == path
    assert resolve_path(path, "s3://other/root") == path


def test_paths_of_a_glob_start_at_the_folder_of_their_own_file(put: Put, tmp_path: Path) -> None:
    put("path,day\n0001.png,mon\n/data/a.png,mon\n,mon\n", "days/monday/m.csv")
    put("path,day\n0001.png,tue\nsub/b.png,tue\ns3://b/c.png,tue\n", "days/tuesday/m.csv")
    found = open_at(f"{tmp_path}/days/*/m.csv")
    paths = [row["path"] for row in rows_of(f"{tmp_path}/days/*/m.csv")]
    assert [found.resolve(path) for path in paths] == [
        f"{tmp_path}/days/monday/0001.png",
        "/data/a.png",
        None,
        f"{tmp_path}/days/tuesday/0001.png",
        f"{tmp_path}/days/tuesday/sub/b.png",
        "s3://b/c.png",
    ]
    assert found.root == f"{tmp_path}/days/monday"  # a run over absolute paths can be resumed
    given = open_at(f"{tmp_path}/days/*/m.csv", root="/images")
    assert given.resolve(next(iter(given.batches()))["path"][0].as_py()) == "/images/0001.png"


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_the_type_of_paths_in_several_folders_is_kept(tmp_path: Path, kind: pa.DataType) -> None:
    for day in ("monday", "tuesday"):
        (tmp_path / day).mkdir()
        paths = pa.array(["1.png", "2.png"]).cast(kind)
        pq.write_table(pa.table({"path": paths}), tmp_path / day / "m.parquet")
    assert open_at(f"{tmp_path}/*/*.parquet").schema.field("path").type == kind
    assert [row["path"] for row in rows_of(f"{tmp_path}/*/*.parquet")] == [
        f"{tmp_path}/{day}/{n}.png" for day in ("monday", "tuesday") for n in (1, 2)
    ]


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("./a.jpg", "s3://bucket/lists/a.jpg"),
        ("../a.jpg", "s3://bucket/a.jpg"),
        ("x/./y/../a.jpg", "s3://bucket/lists/x/a.jpg"),
        ("../../../a.jpg", "s3://bucket/a.jpg"),
        ("x//a.jpg", "s3://bucket/lists/x//a.jpg"),
        ("..a/.b.jpg", "s3://bucket/lists/..a/.b.jpg"),
        ("s3://bucket/./a.jpg", "s3://bucket/./a.jpg"),
        ("/data/./a.jpg", "/data/./a.jpg"),
        ("a b%20#?.jpg", "s3://bucket/lists/a b%20#?.jpg"),
        ("https://h/a.jpg?sig=a%2Fb+c%3D", "https://h/a.jpg?sig=a%2Fb+c%3D"),
    ],
)
def test_dots_in_a_relative_path_are_resolved_on_a_store(path: str, place: str) -> None:
    assert resolve_path(path, "s3://bucket/lists") == place
    column = pa.chunked_array([[path, "b.jpg", None]])
    assert resolve_paths(column, "s3://bucket/lists").to_pylist() == [
        place, "s3://bucket/lists/b.jpg", None,
    ]  # fmt: skip


# ------------------------------------------------------------------------------ labels


def test_a_label_column_whose_name_has_spaces_is_refused(put: Put) -> None:
    path = put("path, label\nx.png, cat\n")
    assert refused(path) == (
        f"manifest {path}: the name ' label' has spaces around it: remove the spaces next to the "
        "delimiters, in the header and in the rows; or pass --manifest.label-column ' label'"
    )
    assert open_at(path, label_column=" label").label_column == " label"
    assert "the name ' path' has spaces around it" in refused(put("label, path\ncat, x\n"))


def test_a_column_named_label_in_capitals_is_noted_and_not_used(
    put: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_at(put("path,Label\nx.png,cat\n")).label_column is None
    assert "column 'Label' is not read as labels; pass --manifest.label-column 'Label'" in (
        capsys.readouterr().out
    )


def test_the_option_for_a_delimiter_is_named_where_it_was_not_found(put: Put) -> None:
    assert "or the delimiter of 'path:label' with --manifest.delimiter" in refused(
        put("path:label\nx.png:cat\n")
    )


def test_decomposed_letters_and_blanks_are_one_label_and_none() -> None:
    labels = pa.array(["caf\u00e9", "cafe\u0301", " ", "", "\u3000", " x", None])
    assert normalize_labels(labels).to_pylist() == ["caf\u00e9"] * 2 + [None] * 3 + [" x", None]
    wide = pa.chunked_array(
        [
            pa.DictionaryArray.from_arrays(
                pa.array(range(100), pa.int8()), [f"{n}-{i}" for i in range(100)]
            )
            for n in range(3)
        ]
    )
    assert normalize_labels(wide).to_pylist() == [f"{n}-{i}" for n in range(3) for i in range(100)]


def test_labels_that_differ_only_by_case_or_spaces_are_found_with_their_counts() -> None:
    counts = {"cat": 120, "Cat": 3, "cat ": 1, "dog": 5, "ﬁsh": 2, "fish": 2}
    assert find_label_variants(counts) == [
        "'Cat' (3 rows) and 'cat' (120 rows) and 'cat ' (1 row)",
        "'fish' (2 rows) and 'ﬁsh' (2 rows)",
    ]
    assert find_label_variants({"Dog": 2, "bird": 1}, ["dog", "cat", "Cat"]) == [
        "'Dog' (2 rows) and class 'dog'"
    ]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (pa.array(["cat", None, "007"]), ["cat", None, "007"]),
        (pa.array(["cat", None]).cast(pa.large_string()), ["cat", None]),
        (pa.array(["cat", None]).cast(pa.string_view()), ["cat", None]),
        (pa.array(["cat", None, "cat"]).dictionary_encode(), ["cat", None, "cat"]),
        (pa.array([3, None, -1]), ["3", None, "-1"]),
        (pa.array([3, None], pa.uint8()), ["3", None]),
        (pa.array([3.0, None, float("nan"), -0.0, 2.5]), ["3", None, None, "0", "2.5"]),
        (pa.array([float("inf"), float("-inf"), 1e300]), ["inf", "-inf", str(int(1e300))]),
        (pa.array([3.0, 0.5], pa.float32()), ["3", "0.5"]),
        (pa.array([1.0, None, 2.0]).dictionary_encode(), ["1", None, "2"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array([None, None]), [None, None]),
        (pa.array([b"cat", None]), ["cat", None]),
        (pa.array([], pa.int64()), []),
        (pa.chunked_array([["a"], ["b", None]]), ["a", "b", None]),
        (pa.chunked_array([], pa.string()), []),
    ],
    ids=lambda value: str(value.type) if hasattr(value, "type") else "",
)
def test_labels_of_any_plain_type_become_text(labels: Any, text: list[str | None]) -> None:
    found = normalize_labels(labels)
    assert found.type == pa.string()
    assert found.to_pylist() == text


@pytest.mark.parametrize("labels", [pa.array([["cat"]]), pa.array([{"a": 1}]), pa.array([b"\xff"])])
def test_labels_that_are_no_names_are_refused(labels: pa.Array) -> None:
    with pytest.raises(ManifestError, match=r"name another --manifest\.label-column"):
        normalize_labels(labels)


# ------------------------------------------------------------------------------ fingerprints


@settings(max_examples=50)
@given(data=st.data())
def test_a_fingerprint_changes_with_any_byte_of_the_table(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("prints", numbered=True)
    whole = b"path,label\n" + b"".join(b"%d.jpg,cat\n" % i for i in range(50))
    path = folder / "rows.csv"
    path.write_bytes(whole)
    before = open_at(path).fingerprint()
    assert open_at(path).fingerprint() == before
    position = data.draw(st.integers(len(b"path,label\n"), len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[position]))
    path.write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
    assert open_manifest(ManifestConfig(path=str(path), encoding="latin-1")).fingerprint() != before


def test_a_fingerprint_is_the_same_on_a_disk_and_on_a_store(tmp_path: Path, s3: Any) -> None:
    """Of more than one block, which a store is asked for one by one."""
    data = b"path\n" + b"".join(b"%07d.jpg\n" % row for row in range(400_000))
    assert len(data) > filesystem.BLOCK_BYTES
    (tmp_path / "rows.csv").write_bytes(data)
    filesystem.write(url("rows.csv"), data)
    stored = open_manifest(ManifestConfig(path=url("rows.csv"))).fingerprint()
    digest = hashlib.blake2b(data + b"\x00end of file\x00", digest_size=16)
    assert stored == open_at(tmp_path / "rows.csv").fingerprint() == digest.hexdigest()


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(put: Put, tmp_path: Path) -> None:
    here, there = put("path\na\n", "here/rows.csv"), put("path\na\n", "there/rows.csv")
    assert open_at(here).fingerprint() == open_at(there).fingerprint()
    put("path\nb\n", "here/more.csv")
    assert open_at(tmp_path / "here").fingerprint() != open_at(here).fingerprint()
    one, other = put("path\na\nb\n", "x/1.csv"), put("path\na\n", "y/1.csv")
    put("path\nb\n", "y/2.csv")
    assert open_at(one.parent).fingerprint() != open_at(other.parent).fingerprint()


def test_the_fingerprint_of_a_folder_changes_with_any_name_or_size(tree: Path, put: Put) -> None:
    seen = {open_at(tree).fingerprint()}
    assert open_at(tree).fingerprint() in seen
    for change in (
        lambda: put(b"longer than before", "pets/cat/1.webp"),
        lambda: put(b"", "pets/cat/2.webp"),
        lambda: (tree / "cat/2.webp").rename(tree / "cat/3.webp"),
        (tree / "dog/2.JPG").unlink,
    ):
        change()
        print_ = open_at(tree).fingerprint()
        assert print_ not in seen
        seen.add(print_)
    (tree / "cat" / "notes.txt").write_text("changed")
    assert open_at(tree).fingerprint() in seen
