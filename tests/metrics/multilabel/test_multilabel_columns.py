"""Label lists as matrices, for every Arrow type of a list."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.metrics.columns import take_scores
from imgcls.metrics.multilabel import MultiLabelCounts, encode_label_lists, read_multilabel_rows

CLASSES = ["cat", "dog", "caf\u00e9"]
LISTS = [["dog"], [], None, ["caf\u00e9", "cat"], ["cat", "fox"], [None, "dog"], ["", "cat"]]
PRESENT = [[0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
WORDS = pa.dictionary(pa.int32(), pa.string())


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.string()),
        pa.list_(pa.large_string()),
        pa.list_(WORDS),
        pa.large_list(WORDS),
    ],
    ids=str,
)
def test_every_kind_of_list_is_read(kind: pa.DataType) -> None:
    chunks = [pa.array(LISTS[a:b], kind) for a, b in ((0, 3), (3, 3), (3, 7))]
    for column in (pa.chunked_array(chunks), pa.array([["cat"], *LISTS], kind).slice(1)):
        found = encode_label_lists(column, CLASSES)
        assert found.present.astype(int).tolist() == PRESENT
        assert found.is_null.tolist() == [False, False, True, *[False] * 4]
        assert found.unknown_names.tolist() == [*[False] * 4, True, False, False]


def test_fixed_size_lists_numbers_and_columns_without_any_list() -> None:
    pairs = pa.array([["cat", "dog"], None, ["dog", "dog"]], pa.list_(pa.string(), 2))
    found = encode_label_lists(pairs, CLASSES)
    assert found.present.astype(int).tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert found.is_null.tolist() == [False, True, False]
    assert encode_label_lists(pa.array([[1], [0, 2]]), ["0", "1"]).present.tolist() == [
        [False, True],
        [True, False],
    ]
    assert encode_label_lists(pa.nulls(3), CLASSES).is_null.all()
    assert not encode_label_lists(pa.array([[], []]), CLASSES).present.any()
    assert encode_label_lists(pa.chunked_array([], pa.list_(pa.string())), CLASSES).present.shape[
        0
    ] == (0)


def test_names_are_compared_in_normal_form() -> None:
    column = pa.array([["cafe\u0301"], ["caf\u00e9"]])
    assert encode_label_lists(column, ["cafe\u0301"]).present.tolist() == [[True], [True]]


@given(
    st.lists(
        st.none() | st.lists(st.sampled_from([*CLASSES, "fox", "owl"]), max_size=4), max_size=30
    )
)
def test_the_matrix_has_what_the_lists_have(lists: list[list[str] | None]) -> None:
    found = encode_label_lists(pa.array(lists, pa.list_(pa.string())), CLASSES)
    for row, labels in enumerate(lists):
        assert found.is_null[row] == (labels is None)
        assert found.present[row].tolist() == [name in (labels or []) for name in CLASSES]
        assert found.unknown_names[row] == any(name not in CLASSES for name in labels or [])


def test_strings_instead_of_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="expected lists of strings"):
        encode_label_lists(pa.array(["cat;dog"]), CLASSES)


def make_table(**replaced: object) -> pa.Table:
    scores = pa.array([[0.9, 0.1, 0.8], None, [0.0, 0.0, 0.0], [0.5, 0.7, 0.2]])
    columns = {
        "predicted_labels": [["cat", "caf\u00e9"], None, [], ["dog", "cat"]],
        "accepted": pa.array([True, None, None, False]),
        "status": pa.array(["ok", "missing", "ok", "ok"]).dictionary_encode(),
        "is_ood": pa.array([True, None, None, False]),
        "scores": scores.cast(pa.list_(pa.float16(), 3)),
    }
    return pa.table(columns | replaced)


def test_rows_with_a_prediction_are_read() -> None:
    table = make_table()
    for source in (table, table.to_batches()[0]):
        rows = read_multilabel_rows(source, classes=CLASSES)
        assert rows.status == {"missing": 1, "ok": 3}
        assert rows.position.tolist() == [0, 2, 3]
        assert rows.predicted.astype(int).tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
        assert rows.accepted.tolist() == [True, False, False]
        assert rows.is_ood is not None
        assert rows.is_ood.tolist() == [True, False]
    scores = take_scores(table["scores"], rows.position)
    assert scores[2].tolist() == np.array([0.5, 0.7, 0.2], np.float16).tolist()
    assert read_multilabel_rows(table.drop(["is_ood"]), classes=CLASSES).is_ood is None
    counts = MultiLabelCounts.from_rows(rows, None, CLASSES)
    assert (counts.rows, counts.ok, counts.accepted, counts.ood_rows) == (4, 3, 1, 2)


def test_tables_of_another_kind_or_model_are_refused() -> None:
    with pytest.raises(ValueError, match="no column accepted"):
        read_multilabel_rows(make_table().drop(["accepted"]), classes=CLASSES)
    with pytest.raises(ValueError, match="'status' is null in 1 rows"):
        read_multilabel_rows(make_table(status=["ok", None, "ok", "ok"]), classes=CLASSES)
    with pytest.raises(ValueError, match="1 rows have status ok but no predicted_labels"):
        read_multilabel_rows(make_table(status=["ok"] * 4), classes=CLASSES)
    with pytest.raises(ValueError, match="another model"):
        read_multilabel_rows(make_table(), classes=["cat", "dog"])
