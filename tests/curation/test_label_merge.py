"""A person's label has a value for each class, and keeps who gave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.curation.import_labels import import_labels
from tests.curation.label_imports import merge, write_labels, write_manifest


def merge_classes(
    tmp_path: Path, columns: dict[str, Any], labels: dict[str, list[str]], **settings: Any
) -> tuple[Any, list[dict[str, Any]]]:
    onto = tmp_path / "train.parquet"
    count = len(columns["cat"])
    pq.write_table(pa.table({"path": [f"/{each}.jpg" for each in range(count)], **columns}), onto)
    rows = [(path, names, "ann", 1) for path, names in labels.items()]
    done = import_labels(
        export=write_labels(tmp_path, rows, several=True),
        onto={"path": str(onto), "label_columns": "cat,dog"},
        output=tmp_path / "out" / "new.parquet", **settings,
    )  # fmt: skip
    return done, pq.read_table(done.output).to_pylist()


def column(*values: int | None) -> pa.Array:
    return pa.array(values, pa.int8())


def test_a_class_that_a_person_did_not_choose_is_negative(tmp_path: Path) -> None:
    columns = {"cat": column(1, 0, 1, None), "dog": column(None, None, 0, 1)}
    labels = {"/0.jpg": ["cat"], "/1.jpg": [], "/2.jpg": ["cat"], "/3.jpg": ["cat"]}
    done, rows = merge_classes(tmp_path, columns, labels)
    assert [(row["cat"], row["dog"]) for row in rows] == [(1, 0), (0, 0), (1, 0), (1, 0)]
    assert (done.labeled, done.confirmed, done.replaced) == (2, 1, 1)
    assert all(row["labeled_by"] == "ann" for row in rows)


def test_unknown_classes_are_filled_where_the_manifest_keeps_its_labels(tmp_path: Path) -> None:
    columns = {"cat": column(1, 0, 0), "dog": column(None, None, 1)}
    labels = {"/0.jpg": ["cat", "dog"], "/1.jpg": ["cat", "dog"], "/2.jpg": ["cat"]}
    done, rows = merge_classes(tmp_path, columns, labels, existing="keep")
    assert [(row["cat"], row["dog"]) for row in rows] == [(1, 1), (0, 1), (0, 1)]
    assert (done.labeled, done.kept) == (1, 2)
    assert [row["labeled_by"] for row in rows] == ["ann", None, None]
    assert pq.read_table(done.history)["used"].to_pylist() == [True, False, False]


@pytest.mark.parametrize("kind", [pa.null(), pa.bool_(), pa.float64(), pa.string()])
def test_columns_of_classes_keep_their_type(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"cat": column(1, 0), "dog": pa.nulls(2, kind)}
    _, rows = merge_classes(tmp_path, columns, {"/0.jpg": ["dog"]})
    expected = {pa.bool_(): (False, True), pa.string(): (0, "1")}.get(kind, (0, 1))
    assert (rows[0]["cat"], rows[0]["dog"]) == (0, expected[1])
    assert (rows[1]["cat"], rows[1]["dog"]) == (0, None)


def test_a_confirmation_without_a_name_keeps_who_gave_the_label(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog", "/c.jpg": "cat"})
    first = merge(tmp_path, write_labels(tmp_path, [("/a.jpg", "dog", "ann", 1)]), onto)
    before = pq.read_table(first.output).to_pylist()
    export = tmp_path / "labels.csv"
    export.write_text("path,label\n/a.jpg,dog\n/b.jpg,cat\n")
    second = merge(tmp_path, export, Path(first.output), output=tmp_path / "out" / "2.parquet")
    rows = pq.read_table(second.output).to_pylist()
    assert rows[0] == before[0]
    assert (rows[1]["label"], rows[1]["label_source"]) == ("cat", "csv")
    named = write_labels(tmp_path, [("/a.jpg", "dog", "bob", 5)])
    third = merge(tmp_path, named, Path(second.output), output=tmp_path / "out" / "3.parquet")
    assert pq.read_table(third.output)["labeled_by"].to_pylist() == ["bob", None, None]
