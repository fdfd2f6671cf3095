"""Labels of several classes per image: three forms, one meaning."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.data.manifests.label_columns import (
    NEGATIVE,
    POSITIVE,
    UNKNOWN,
    LabelColumns,
    build_name_lists,
    encode_lists,
    read_label_columns,
)
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import ManifestError
from tests.conftest import write_manifest
from tests.data.archives import write_tar

CLASSES = ["cat", "dog", "fox"]
LISTS = [["dog", "cat"], [], None, ["cat", "wolf"]]
TARGETS = [[1, 1, 0], [0, 0, 0], [-1, -1, -1], [1, 0, 0]]


def encode(values: pa.Array, columns: LabelColumns | None = None) -> list[list[int]]:
    """Targets of a column `tags`; the table and its first batch have the same ones."""
    columns = columns or LabelColumns("tags")
    table = pa.table({"tags": values})
    found = columns.encode(table, CLASSES).targets
    assert found.dtype == np.int8
    batch = pa.RecordBatch.from_arrays([table["tags"].combine_chunks()], ["tags"])
    assert columns.encode(batch, CLASSES).targets.tolist() == found.tolist()
    result: list[list[int]] = found.tolist()
    return result


# ------------------------------------------------------------------ lists

TYPES_OF_LISTS = [
    pa.list_(pa.string()),
    pa.large_list(pa.large_string()),
    pa.list_(pa.dictionary(pa.int32(), pa.string())),
    pa.list_(pa.string_view()),
]


@pytest.mark.parametrize("type", TYPES_OF_LISTS, ids=str)
def test_lists_of_any_type_have_the_same_labels(type: pa.DataType) -> None:
    values = pa.array(LISTS, type)
    assert encode(values) == TARGETS
    found = LabelColumns("tags").encode(pa.table({"tags": values}), CLASSES)
    assert found.has_unknown_name.tolist() == [False, False, False, True]
    assert encode(values[1:]) == TARGETS[1:]
    assert encode(values[2:4]) == TARGETS[2:4]
    assert encode(pa.chunked_array([values[:1], values[1:1], values[1:]])) == TARGETS
    assert encode(pa.chunked_array([], type)) == []
    assert encode(values[:0]) == []


def test_lists_of_fixed_size_may_be_null() -> None:
    values = pa.array([["cat", "dog"], None, ["fox", "fox"]], pa.list_(pa.string(), 2))
    expected = [[1, 1, 0], [-1, -1, -1], [0, 0, 1]]
    assert encode(values) == expected
    assert encode(values[1:]) == expected[1:]


def test_a_null_list_over_values_has_none_of_them() -> None:
    offsets = pa.array([0, 2, 3], pa.int32())
    names = pa.array(["cat", "dog", "fox"])
    values = pa.ListArray.from_arrays(offsets, names, mask=pa.array([True, False]))
    assert encode(values) == [[-1, -1, -1], [0, 0, 1]]
    assert encode(values[1:]) == [[0, 0, 1]]
    assert encode_lists(values, CLASSES).targets.tolist() == [[-1, -1, -1], [0, 0, 1]]


def test_names_are_compared_in_nfc_without_spaces_and_once() -> None:
    composed, decomposed = "caf\u00e9 noir", "cafe\u0301 noir"
    values = pa.array([[f" {decomposed}\t", composed, "", "  ", None]])
    table = pa.table({"tags": values})
    columns = LabelColumns("tags")
    for name in (composed, decomposed):
        assert columns.encode(table, [name]).targets.tolist() == [[1]]
    assert columns.read_names(table).to_pylist() == [[composed]]
    assert columns.count_names(table) == {composed: 1}
    assert columns.encode(table, [name]).has_unknown_name.tolist() == [False]


def test_numbers_in_lists_are_class_names() -> None:
    table = pa.table({"tags": [[3, 7], []]})
    assert LabelColumns("tags").read_names(table).to_pylist() == [["3", "7"], []]
    table = pa.table({"tags": [[3.0, 2.5, float("nan")]]})
    assert LabelColumns("tags").read_names(table).to_pylist() == [["3", "2.5"]]


def test_lists_of_structs_are_refused() -> None:
    table = pa.table({"tags": [[{"x": 1}]]})
    with pytest.raises(ManifestError, match=r"manifest m: column 'tags' has values of the type "
                                            r"struct<x: int64>; expected class names"):  # fmt: skip
        LabelColumns("tags").encode(table, CLASSES, "manifest m")


def test_names_keep_the_order_of_the_manifest() -> None:
    table = pa.table({"tags": pa.array(LISTS)})
    assert LabelColumns("tags").read_names(table).to_pylist() == LISTS
    assert LabelColumns("tags").count_names(table) == {"dog": 1, "cat": 2, "wolf": 1}
    assert LabelColumns("tags").count_names(table.slice(2, 1)) == {}


names = st.sampled_from(["cat", "dog", "fox", "wolf", "two words"])


@given(st.lists(st.none() | st.lists(names, max_size=4), max_size=12), st.data())
def test_a_slice_has_the_labels_of_its_rows(rows: list[list[str] | None], data: Any) -> None:
    values = pa.array(rows, pa.list_(pa.string()))
    start = data.draw(st.integers(0, len(rows)))
    whole = LabelColumns("tags").encode(pa.table({"tags": values}), CLASSES)
    part = LabelColumns("tags").encode(pa.table({"tags": values[start:]}), CLASSES)
    assert part.targets.tolist() == whole.targets[start:].tolist()
    assert part.has_unknown_name.tolist() == whole.has_unknown_name[start:].tolist()
    for row, targets in zip(rows, whole.targets.tolist(), strict=True):
        expected = [UNKNOWN if row is None else int(name in row) for name in CLASSES]
        assert targets == expected


# ------------------------------------------------------------------ text


@pytest.mark.parametrize(
    "type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_delimited_text_has_the_labels_of_lists(type: pa.DataType) -> None:
    values = pa.array(["dog; cat", ";", None, "cat;wolf;;cat"], pa.string()).cast(type)
    columns = LabelColumns("tags", ";")
    assert encode(values, columns) == TARGETS
    assert encode(values[1:], columns) == TARGETS[1:]
    assert columns.read_names(pa.table({"tags": values})).to_pylist() == LISTS


def test_blank_text_is_unlabeled_and_delimiters_alone_are_no_class() -> None:
    table = pa.table({"tags": ["", "  ", "|", " | | "]})
    names = LabelColumns("tags", "|").read_names(table).to_pylist()
    assert names == [None, None, [], []]


def test_a_delimiter_is_no_pattern_and_may_be_long() -> None:
    table = pa.table({"tags": ["a.b", "a, b c"]})
    assert LabelColumns("tags", ".").read_names(table).to_pylist() == [["a", "b"], ["a, b c"]]
    assert LabelColumns("tags", ", ").read_names(table).to_pylist() == [["a.b"], ["a", "b c"]]


def test_a_column_of_one_label_is_read_as_lists_of_one() -> None:
    columns = LabelColumns("tags")
    table = pa.table({"tags": ["cat", " dog ", "", None]})
    assert columns.read_names(table).to_pylist() == [["cat"], ["dog"], None, None]
    table = pa.table({"tags": [3.0, None, float("nan")]})  # as pandas has integers with a gap
    assert columns.read_names(table).to_pylist() == [["3"], None, None]
    assert columns.read_names(pa.table({"tags": [3, None]})).to_pylist() == [["3"], None]


# ------------------------------------------------------------------ class columns

CLASS_VALUES = [
    pa.array([True, False, None]),
    pa.array([1, 0, None], pa.int8()),
    pa.array([1, 0, None], pa.uint64()),
    pa.array([1.0, 0.0, float("nan")]),
    pa.array([1.0, 0.0, None], pa.float16()),
    pa.array(["1", "0", ""]),
    pa.array([" True", "FALSE", "  "], pa.large_string()),
    pa.array(["1.0", "0.0", None], pa.string_view()),
    pa.array(["1", "0", None]).dictionary_encode(),
]


@pytest.mark.parametrize("values", CLASS_VALUES, ids=lambda values: str(values.type))
def test_class_columns_of_any_type(values: pa.Array) -> None:
    columns = LabelColumns(per_class=("cat", "two words"))
    table = pa.table({"cat": values, "two words": values})
    for rows in (table, table.to_batches()[0]):
        found = columns.encode(rows, ["two words", "fox", "cat"])
        assert found.targets.tolist() == [[1, -1, 1], [0, -1, 0], [-1, -1, -1]]
        assert found.has_unknown_name.tolist() == [False] * 3
    assert columns.encode(table, ["fox"]).has_unknown_name.tolist() == [True, False, False]
    assert columns.encode(table.slice(1), ["cat"]).targets.tolist() == [[0], [-1]]
    assert columns.encode(table.slice(0, 0), ["cat"]).targets.shape == (0, 1)
    assert columns.read_names(table).to_pylist() == [["cat", "two words"], [], None]
    assert columns.count_names(table) == {"cat": 1, "two words": 1}


def test_a_class_column_without_values_is_unknown() -> None:
    table = pa.table({"cat": pa.nulls(2), "dog": [1, 0]})
    columns = LabelColumns(per_class=("cat", "dog"))
    assert columns.encode(table, ["cat", "dog"]).targets.tolist() == [[-1, 1], [-1, 0]]
    assert columns.read_names(table).to_pylist() == [["dog"], []]


@pytest.mark.parametrize(
    ("values", "shown"),
    [([1, 2], "2"), (["1", "yes"], "'yes'"), ([0.5, 1.0], "0.5"), ([float("inf")], "inf"),
     ([-1], "-1")],
)  # fmt: skip
def test_other_values_of_class_columns_are_refused(values: list[Any], shown: str) -> None:
    with pytest.raises(ManifestError) as caught:
        LabelColumns(per_class=("cat",)).encode(pa.table({"cat": values}), CLASSES, "manifest m")
    assert str(caught.value) == (
        f"manifest m: column 'cat' has the value {shown}; expected 1, 0, or no value where it is "
        "unknown; correct it"
    )


def test_a_class_column_of_lists_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"^manifest: column 'cat' is list<.*expected 1, 0"):
        LabelColumns(per_class=("cat",)).encode(pa.table({"cat": [[1]]}), CLASSES)


def test_class_columns_are_compared_in_nfc() -> None:
    decomposed = unicodedata.normalize("NFD", "é")
    columns = LabelColumns(per_class=(decomposed,))
    table = pa.table({decomposed: [1, 0]})
    assert columns.classes == ("é",)
    for name in ("é", decomposed):
        assert columns.encode(table, [name]).targets.tolist() == [[1], [0]]
    assert columns.count_names(table) == {"é": 1}
    assert columns.read_names(table).to_pylist() == [["é"], []]


def test_a_class_column_may_have_chunks() -> None:
    values = pa.chunked_array([["1", "0"], [], ["", "true"]], pa.string())
    columns = LabelColumns(per_class=("cat",))
    found = columns.encode(pa.table({"cat": values}), ["cat"]).targets
    assert found.tolist() == [[1], [0], [-1], [1]]


# ------------------------------------------------------------------ matrices


@given(st.lists(st.lists(st.sampled_from([NEGATIVE, POSITIVE]), min_size=3, max_size=3)))
def test_names_of_a_matrix_give_the_matrix(rows: list[list[int]]) -> None:
    targets = np.array(rows, np.int8).reshape(-1, 3)
    found = encode_lists(build_name_lists(targets, CLASSES), CLASSES)
    assert found.targets.tolist() == rows
    assert not found.has_unknown_name.any()


def test_a_row_of_unknown_classes_has_no_names() -> None:
    targets = np.array([[-1, -1], [-1, 0], [-1, 1]], np.int8)
    assert build_name_lists(targets, ["a", "b"]).to_pylist() == [None, [], ["b"]]
    assert build_name_lists(np.zeros((2, 0), np.int8), []).to_pylist() == [None, None]


# ------------------------------------------------------------------ description


@pytest.mark.parametrize(
    ("columns", "names", "text"),
    [
        (LabelColumns("tags"), ("tags",), "column 'tags'"),
        (LabelColumns("tags", ";"), ("tags",), "column 'tags'"),
        (LabelColumns(per_class=("a", "b")), ("a", "b"), "columns 'a', 'b'"),
        (LabelColumns(per_class=tuple("abcd")), tuple("abcd"), "columns 'a', 'b', 'c', ..."),
    ],
)
def test_columns_are_described_and_restored(
    columns: LabelColumns, names: tuple[str, ...], text: str
) -> None:
    assert columns.names == names
    assert columns.describe() == text
    stored = json.loads(json.dumps(columns.to_json()))
    assert LabelColumns.from_json(stored) == columns
    assert read_label_columns({"label_columns": stored}) == columns
    assert read_label_columns({}) is None


# ------------------------------------------------------------------ manifests


def refuse(path: Path, **options: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        open_manifest(ManifestConfig(path=str(path), **options))
    return str(caught.value)


def read(path: Path, **options: Any) -> tuple[LabelColumns | None, list[list[int]]]:
    manifest = open_manifest(ManifestConfig(path=str(path), **options))
    assert manifest.label_column is None
    columns = manifest.label_columns
    assert columns is not None
    assert manifest.find_label_columns() == columns
    found = [columns.encode(batch, CLASSES).targets for batch in manifest.batches()]
    return columns, np.concatenate(found).tolist()


def test_csv_parquet_and_tar_have_the_same_labels(tmp_path: Path) -> None:
    paths = [f"{number}.jpg" for number in range(4)]
    texts = ["dog;cat", ";", "", "cat;wolf"]
    pq.write_table(pa.table({"path": paths, "tags": LISTS}), tmp_path / "m.parquet")
    lists = {"label_column": "tags"}
    assert read(tmp_path / "m.parquet", **lists) == (LabelColumns("tags"), TARGETS)
    text = write_manifest(
        tmp_path / "t.csv", list(zip(paths, texts, strict=True)), ("path", "tags")
    )
    expected = (LabelColumns("tags", ";"), TARGETS)
    assert read(text, **lists, label_delimiter=";") == expected
    rows = [("", "", "") if row[0] < 0 else tuple(map(str, row)) for row in TARGETS]
    columns = write_manifest(
        tmp_path / "c.csv", [(p, *r) for p, r in zip(paths, rows, strict=True)], ("path", *CLASSES)
    )
    expected = (LabelColumns(per_class=tuple(CLASSES)), TARGETS)
    assert read(columns, label_columns=CLASSES) == expected
    members = {f"{i}.json": json.dumps({"tags": row}).encode() for i, row in enumerate(LISTS)}
    archive = Path(write_tar(tmp_path / "m.tar", members | dict.fromkeys(paths, b"")))
    assert read(archive, **lists) == (LabelColumns("tags"), TARGETS)


def test_default_columns_are_found(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    for name in ("label", "labels"):
        pq.write_table(pa.table({"path": ["a"], name: [["cat"]]}), path)
        assert read(path) == (LabelColumns(name), [[1, 0, 0]])
        text = write_manifest(tmp_path / f"{name}.csv", [("a", "cat|dog")], ("path", name))
        assert read(text, label_delimiter="|") == (LabelColumns(name, "|"), [[1, 1, 0]])


def test_a_column_of_one_label_is_before_lists(tmp_path: Path) -> None:
    table = pa.table({"path": ["a"], "label": ["cat"], "labels": [["cat", "dog"]]})
    pq.write_table(table, tmp_path / "m.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet")))
    assert (manifest.label_column, manifest.label_columns) == ("label", None)
    assert manifest.find_label_columns() == LabelColumns("label")


@pytest.mark.parametrize("values", [[[1, 2]], [[{"box": [0, 1]}]]])
def test_annotations_of_other_tasks_are_no_labels(tmp_path: Path, values: list[Any]) -> None:
    pq.write_table(pa.table({"path": ["a"], "labels": values}), tmp_path / "m.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet")))
    assert (manifest.label_column, manifest.label_columns) == (None, None)


def test_dropped_label_columns_leave_the_rows_unlabeled(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"path": ["a"], "label": [["cat"]], "n": [1], "cat": [1]}), path)
    manifest = open_manifest(ManifestConfig(path=str(path), drop_columns=["label"]))
    assert (manifest.label_column, manifest.label_columns) == (None, None)
    manifest = open_manifest(ManifestConfig(path=str(path), drop_columns=["n"]))
    assert manifest.label_columns == LabelColumns("label")
    message = refuse(path, drop_columns=["cat"], label_columns=["cat"])
    assert "column 'cat' is read as that of the labels; remove it from" in message
    manifest = open_manifest(
        ManifestConfig(path=str(path), drop_columns=["label"], label_columns=["cat"])
    )
    assert manifest.label_columns == LabelColumns(per_class=("cat",))


def test_options_that_contradict_each_other_or_the_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    table = {"path": ["a"], "label": ["cat"], "tags": [["cat"]], "n": [1], "é": [1]}
    pq.write_table(pa.table(table), path)
    classes = {"label_columns": ["n"]}
    for options, message in (
        ({**classes, "label_column": "label"},
         "--manifest.label-columns and --manifest.label-column are both given; pass one of them"),
        ({**classes, "label_delimiter": ";"},
         "--manifest.label-columns and --manifest.label-delimiter are both given"),
        ({"label_columns": ["n", "m"]},
         "no column 'm' (found: path, label, tags, n, é); correct --manifest.label-columns"),
        ({"label_columns": ["n", "n"]}, "--manifest.label-columns has 'n' twice; remove one"),
        ({"label_columns": ["path"]}, "column 'path' is read as that of the paths; remove it from"),
        ({"label_delimiter": ";", "label_column": "tags"},
         "column 'tags' has lists, which need no --manifest.label-delimiter; remove it"),
        ({"label_delimiter": ";", "label_column": "n"},
         "column 'n' is int64, not text that --manifest.label-delimiter ';' separates"),
        ({"label_delimiter": ""}, "--manifest.label-delimiter '' is blank; separate the labels by"),
        ({"label_delimiter": ";", "label_column": "none"}, "no column 'none'"),
    ):  # fmt: skip
        assert f"manifest {path}: {message}" in refuse(path, **options)
    unlabeled = write_manifest(tmp_path / "u.csv", [("a", "b")], ("path", "kind"))
    message = refuse(unlabeled, label_delimiter=";")
    assert "--manifest.label-delimiter ';': no column of labels (found: path, kind)" in message
    assert "name it with --manifest.label-column" in message
    decomposed = unicodedata.normalize("NFD", "é")
    both = write_manifest(tmp_path / "b.csv", [("a", "1", "0")], ("path", "é", decomposed))
    assert "has 'é' twice; remove one" in refuse(both, label_columns=["é", decomposed])


def test_the_identity_of_one_label_per_image_is_unchanged(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.csv", [("a", "cat")], ("path", "label"))
    config = ManifestConfig(path=str(tmp_path / "m.csv"))
    identity = open_manifest(config).describe_identity()
    assert list(identity) == ["fingerprint", "path_column", "label_column", "root"]
    assert identity["label_column"] == "label"
    several = config.model_copy(update={"label_delimiter": ";"})
    identity = open_manifest(several).describe_identity()
    assert identity["label_column"] is None
    assert read_label_columns(identity) == LabelColumns("label", ";")


def test_a_manifest_without_rows_has_label_columns(tmp_path: Path) -> None:
    schema = pa.schema([("path", pa.string()), ("label", pa.list_(pa.string()))])
    pq.write_table(schema.empty_table(), tmp_path / "m.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet")))
    assert manifest.label_columns == LabelColumns("label")
    table = pa.Table.from_batches(manifest.batches(), manifest.schema)
    assert manifest.label_columns.encode(table, CLASSES).targets.shape == (0, 3)
    assert manifest.label_columns.read_names(table).to_pylist() == []
    assert manifest.label_columns.count_names(table) == {}
