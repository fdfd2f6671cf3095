"""Multi-label counts: equal to direct sums, and the same for every partition of the rows."""

from __future__ import annotations

import functools
import itertools
import json
import operator
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    f1_score,
    hamming_loss,
    jaccard_score,
    multilabel_confusion_matrix,
    precision_score,
    recall_score,
)

from imgcls.metrics.multilabel import MultiLabelCounts, matrices
from imgcls.metrics.multilabel.counts import F1, JACCARD, PRECISION, RECALL
from tests.metrics.multilabel.rows import ADVERSARIAL, Rows, make_rows

FLOATS = ("sample_sums", "sample_square_sums")


def count(rows: Rows, **options) -> MultiLabelCounts:
    return MultiLabelCounts.from_arrays(rows.targets, rows.predicted, rows.classes, **options)


def assert_same(one: MultiLabelCounts, other: MultiLabelCounts) -> None:
    left, right = one.to_dict(), other.to_dict()
    for name in FLOATS:
        np.testing.assert_allclose(left.pop(name), right.pop(name), rtol=1e-12, atol=1e-12)
    assert left == right


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_complete_rows_equal_scikit_learn(name: str) -> None:
    rows = ADVERSARIAL[name]
    counts, number = count(rows), len(rows.targets)
    if len(rows.classes) > 1:  # scikit-learn takes a single column for a binary problem
        expected = multilabel_confusion_matrix(rows.targets, rows.predicted)
        assert counts.true_negatives.tolist() == expected[:, 0, 0].tolist()
        assert counts.false_positives.tolist() == expected[:, 0, 1].tolist()
        assert counts.false_negatives.tolist() == expected[:, 1, 0].tolist()
        assert counts.true_positives.tolist() == expected[:, 1, 1].tolist()
        options = {"average": "samples", "zero_division": 0}
        for position, metric in (
            (F1, f1_score),
            (PRECISION, precision_score),
            (RECALL, recall_score),
            (JACCARD, jaccard_score),
        ):
            value = metric(rows.targets, rows.predicted, **options)
            assert counts.sample_sums[position] / number == pytest.approx(value, abs=1e-9)
    assert counts.exact == (rows.targets == rows.predicted).all(axis=1).sum()
    loss = hamming_loss(rows.targets, rows.predicted)
    assert counts.wrong_cells / counts.known_cells == pytest.approx(loss)
    assert counts.labeled == counts.complete == counts.ok == number
    assert counts.label_sum == rows.targets.sum()
    assert counts.label_square_sum == (rows.targets.sum(axis=1) ** 2).sum()
    assert counts.predicted_counts.tolist() == rows.predicted.sum(axis=0).tolist()
    assert counts.predicted_square_sum == (rows.predicted.sum(axis=1) ** 2).sum()


@given(
    rows=st.integers(0, 700),
    classes=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    unknown=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=40)
def test_unknown_cells_count_nowhere(rows: int, classes: int, seed: int, unknown: float) -> None:
    data = make_rows(rows, classes, seed=seed, unknown=unknown)
    counts = count(data)
    known, called = data.targets >= 0, data.predicted
    kinds = (data.targets == 1) & called, (data.targets == 0) & called
    kinds += (data.targets == 1) & ~called, (data.targets == 0) & ~called
    names = ("true_positives", "false_positives", "false_negatives", "true_negatives")
    for name, cells in zip(names, kinds, strict=True):
        assert getattr(counts, name).tolist() == cells.sum(axis=0).tolist()
    per_row = np.stack([cells.sum(axis=1) for cells in kinds])
    assert counts.cell_moments.tolist() == (per_row @ per_row.T).tolist()
    assert counts.cells.tolist() == per_row.sum(axis=1).tolist()
    assert counts.known.tolist() == known.sum(axis=0).tolist()
    assert counts.labeled == known.any(axis=1).sum()
    assert counts.complete == known.all(axis=1).sum()
    right = (data.targets == called).all(axis=1)
    assert counts.exact == right.sum()
    tp, fp, fn, _ = per_row
    f1 = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
    np.testing.assert_allclose(counts.sample_sums[F1], f1.sum())
    np.testing.assert_allclose(counts.sample_square_sums[F1], (f1**2).sum())


@given(cuts=st.lists(st.integers(0, 300), max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_any_partition_in_any_order_gives_the_same_counts(cuts: list[int], seed: int) -> None:
    rows = make_rows(300, 6, seed=seed, unknown=0.2)
    ends = [0, *sorted(cuts), 300]
    parts = [
        count(Rows(*(array[a:b] for array in rows)), status={"ok": b - a, "missing": a})
        for a, b in itertools.pairwise(ends)
    ]
    np.random.default_rng(seed).shuffle(parts)
    merged = functools.reduce(operator.add, parts, MultiLabelCounts.empty(rows.classes))
    missing = sum(ends[:-1])
    status = {"missing": missing, "ok": 300} if missing else {"ok": 300}
    assert_same(merged, count(rows, status=status))


def test_blocks_of_rows_are_counted_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(2000, 7, unknown=0.01)
    whole = count(rows)
    monkeypatch.setattr(matrices.split_rows, "__defaults__", (700,))
    assert_same(count(rows), whole)


def test_counts_survive_json_and_pickle() -> None:
    rows = make_rows(200, 5, unknown=0.1)
    counts = count(rows, status={"missing": 3, "ok": 200}, accepted=rows.predicted[:, 0])
    restored = MultiLabelCounts.from_dict(json.loads(json.dumps(counts.to_dict())))
    assert restored.to_dict() == counts.to_dict()
    assert restored.cell_moments.dtype == np.int64
    assert restored.sample_sums.dtype == np.float64
    assert pickle.loads(pickle.dumps(counts)).to_dict() == counts.to_dict()
    assert_same(restored + counts, counts + counts)


def test_a_dict_with_other_keys_is_refused() -> None:
    data = MultiLabelCounts.empty(["cat"]).to_dict()
    del data["exact"]
    with pytest.raises(ValueError, match="exact"):
        MultiLabelCounts.from_dict(data)


def test_rows_are_labeled_or_unlabeled_whatever_other_names_they_have() -> None:
    rows = make_rows(50, 4)
    rows.targets[:20] = -1
    ood = np.array([True, False, True])
    counts = count(
        rows,
        status={"truncated": 2, "ok": 50},
        accepted=np.arange(50) < 10,
        is_ood=ood,
        unknown_label=5,
    )
    assert (counts.labeled, counts.unlabeled, counts.unknown_label) == (30, 20, 5)
    assert (counts.rows, counts.ok, counts.error_rows) == (52, 50, 2)
    assert (counts.accepted, counts.ood, counts.ood_rows) == (10, 2, 3)
    assert list(counts.status) == ["ok", "truncated"]


def test_a_run_without_labels_has_predictions_only() -> None:
    rows = make_rows(50, 4)
    counts = MultiLabelCounts.from_arrays(None, rows.predicted, rows.classes)
    assert counts.unlabeled == 50
    assert counts.known_cells == counts.labeled == 0
    assert counts.predicted_counts.tolist() == rows.predicted.sum(axis=0).tolist()


def test_wrong_input_is_refused() -> None:
    rows = make_rows(10, 3)
    with pytest.raises(ValueError, match="expected int8"):
        count(rows._replace(targets=rows.targets.astype(np.int64)))
    with pytest.raises(ValueError, match="expected bool"):
        count(rows._replace(predicted=rows.scores))
    with pytest.raises(ValueError, match=r"expected int8 \(10, 3\)"):
        count(rows._replace(targets=rows.targets[:9]))
    with pytest.raises(ValueError, match=r"expected 1 \(the class"):
        count(rows._replace(targets=rows.targets * 2))
    with pytest.raises(ValueError, match="no classes"):
        MultiLabelCounts.from_arrays(None, np.zeros((2, 0), bool), [])
    with pytest.raises(ValueError, match="repeated: cat"):
        MultiLabelCounts.empty(["cat", "cat"])
    with pytest.raises(ValueError, match="9 ok rows"):
        count(rows, status={"ok": 9})
    with pytest.raises(ValueError, match="one per row"):
        count(rows, accepted=np.ones(9, bool))
    with pytest.raises(ValueError, match="from one bundle"):
        MultiLabelCounts.empty(["cat"]) + MultiLabelCounts.empty(["dog"])
