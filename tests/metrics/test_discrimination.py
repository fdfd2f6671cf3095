"""AUROC, average precision and Brier against scikit-learn: equal, or within the reported bound."""

from __future__ import annotations

import functools
import itertools
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from imgcls.metrics.discrimination import (
    ScoreCounts,
    brier_score,
    build_discrimination_table,
    compute_discrimination,
)


def softmax(rows: int, classes: int, seed: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)) * scale
    label = rng.integers(0, classes, rows)
    logits[np.arange(rows), label] += scale
    scores = np.exp(logits - logits.max(1, keepdims=True))
    return (scores / scores.sum(1, keepdims=True)).astype(np.float16), label


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


@given(
    rows=st.integers(1, 60),
    classes=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 0.5, 3.0, 40.0]),
)
def test_few_classes_are_exact_ties_and_absent_classes_included(
    rows: int, classes: int, seed: int, scale: float
) -> None:
    scores, label = softmax(rows, classes, seed, scale)
    label[label == 2] = 0  # a class that never occurs
    found = compute_discrimination(ScoreCounts.from_scores(scores, label, names(classes)))
    for c in range(classes):
        truth = label == c
        if truth.all() or not truth.any():
            assert np.isnan(found.auroc[c])
            assert np.isnan(found.average_precision[c])
            continue
        exact = scores[:, c].astype(np.float64)
        assert found.auroc[c] == pytest.approx(roc_auc_score(truth, exact), abs=1e-9)
        expected = average_precision_score(truth, exact)
        assert found.average_precision[c] == pytest.approx(expected, abs=1e-9)
        assert found.auroc_bound[c] == found.average_precision_bound[c] == 0


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 4.0]))
def test_many_classes_stay_within_the_reported_bound(seed: int, scale: float) -> None:
    classes = 70
    scores, label = softmax(200, classes, seed, scale)
    found = compute_discrimination(ScoreCounts.from_scores(scores, label, names(classes)))
    for c in np.unique(label)[::3]:
        exact = scores[:, c].astype(np.float64)
        off = abs(found.auroc[c] - roc_auc_score(label == c, exact))
        assert off <= found.auroc_bound[c] + 1e-9
        off = abs(found.average_precision[c] - average_precision_score(label == c, exact))
        assert off <= found.average_precision_bound[c] + 1e-9
    assert np.nanmax(found.auroc_bound) > 0


def test_brier_is_the_squared_distance_from_the_truth() -> None:
    scores, label = softmax(500, 7, 1, 1.0)
    truth = np.eye(7)[label]
    expected = ((scores.astype(np.float64) - truth) ** 2).sum(1).mean()
    assert brier_score(ScoreCounts.from_scores(scores, label, names(7))) == pytest.approx(
        expected, abs=1e-9
    )
    assert brier_score(ScoreCounts.empty(names(7))) is None


@given(cuts=st.lists(st.integers(0, 300), max_size=5), seed=st.integers(0, 1000))
def test_any_partition_in_any_order_gives_the_same_counts(cuts: list[int], seed: int) -> None:
    scores, label = softmax(300, 66, seed, 2.0)
    ends = [0, *sorted(cuts), 300]
    parts = [
        ScoreCounts.from_scores(scores[a:b], label[a:b], names(66))
        for a, b in itertools.pairwise(ends)
    ]
    np.random.default_rng(seed).shuffle(parts)  # type: ignore[arg-type]
    merged = functools.reduce(operator.add, parts, ScoreCounts.empty(names(66)))
    whole = ScoreCounts.from_scores(scores, label, names(66))
    np.testing.assert_array_equal(merged.positive, whole.positive)
    np.testing.assert_array_equal(merged.negative, whole.negative)
    assert merged.rows == whole.rows
    assert merged.brier_sum == pytest.approx(whole.brier_sum, abs=1e-9)


def test_the_table_leaves_undefined_figures_null() -> None:
    scores, label = softmax(40, 3, 0, 1.0)
    got = build_discrimination_table(
        ScoreCounts.from_scores(scores, np.where(label == 1, 0, label), names(3))
    ).to_pylist()
    assert got[1]["auroc"] is None
    assert 0 <= got[0]["auroc"] <= 1


@pytest.mark.parametrize("wrong", [-0.5, 1.5, np.nan])
def test_logits_are_refused(wrong: float) -> None:
    scores = np.array([[wrong, 0.5]], np.float16)
    with pytest.raises(ValueError, match="softmax, not logits"):
        ScoreCounts.from_scores(scores, np.array([0]), names(2))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected float16"):
        ScoreCounts.from_scores(np.zeros((2, 3), np.float16), np.zeros(2, int), names(4))
    with pytest.raises(ValueError, match="different classes"):
        ScoreCounts.empty(names(2)) + ScoreCounts.empty(names(3))
