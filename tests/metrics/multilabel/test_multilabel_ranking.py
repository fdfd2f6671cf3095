"""Score bins and label rankings: equal to scikit-learn on the float16 scores."""

from __future__ import annotations

import functools
import itertools
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    coverage_error,
    label_ranking_average_precision_score,
    label_ranking_loss,
    log_loss,
    roc_auc_score,
)

from imgcls.metrics.calibration import expected_calibration_error
from imgcls.metrics.discrimination import compute_discrimination
from imgcls.metrics.multilabel import RankingCounts, matrices, ranking, scores
from tests.metrics.multilabel.rows import ADVERSARIAL, Rows, make_rows

RANKINGS = (coverage_error, label_ranking_average_precision_score, label_ranking_loss)


def count(rows: Rows) -> RankingCounts:
    return RankingCounts.from_arrays(rows.targets, rows.scores, rows.classes)


def assert_same(one: RankingCounts, other: RankingCounts) -> None:
    for name in ("positive", "negative"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("rows", "positive_rows", "complete", "positive_square_sum"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("ranking_sums", "ranking_square_sums"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-12)


def assert_rankings_equal_scikit_learn(rows: Rows) -> None:
    values = count(rows).ranking_sums / len(rows.targets)
    if len(rows.classes) == 1:  # scikit-learn refuses a single column
        assert values.tolist() == [rows.targets.mean(), 1.0, 0.0]
        return
    exact = rows.scores.astype(np.float64)
    for value, metric in zip(values, RANKINGS, strict=True):
        assert value == pytest.approx(metric(rows.targets, exact), abs=1e-9)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_rankings_equal_scikit_learn(name: str) -> None:
    assert_rankings_equal_scikit_learn(ADVERSARIAL[name])


@given(
    rows=st.integers(1, 60),
    classes=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    density=st.sampled_from([0.02, 0.3, 0.95]),
    ties=st.sampled_from([0, 1, 3, 10]),
)
@settings(max_examples=60)
def test_rankings_of_random_rows_equal_scikit_learn(
    rows: int, classes: int, seed: int, density: float, ties: int
) -> None:
    assert_rankings_equal_scikit_learn(
        make_rows(rows, classes, seed=seed, density=density, ties=ties)
    )


def assert_classes_equal_scikit_learn(rows: Rows) -> None:
    counts = count(rows)
    found = compute_discrimination(counts)
    errors = scores.compute_calibration_bins(counts).errors
    for c in range(len(rows.classes)):
        known = rows.targets[:, c] >= 0
        truth, exact = rows.targets[known, c], rows.scores[known, c].astype(np.float64)
        if len(truth):
            expected = expected_calibration_error(exact, truth > 0)
            assert errors[c] == pytest.approx(expected, abs=1e-9)
        if not 0 < truth.sum() < len(truth):
            assert np.isnan(found.auroc[c])
            assert np.isnan(found.average_precision[c])
            continue
        assert found.auroc[c] == pytest.approx(roc_auc_score(truth, exact), abs=1e-9)
        expected = average_precision_score(truth, exact)
        assert found.average_precision[c] == pytest.approx(expected, abs=1e-9)
    known = rows.targets >= 0
    truth, exact = rows.targets[known], rows.scores[known].astype(np.float64)
    brier = scores.estimate_multilabel_brier(counts)
    assert brier is not None
    assert brier[0] == pytest.approx(brier_score_loss(truth, exact, labels=[0, 1]), abs=1e-9)
    # a score of 0 or 1 counts as what is just rounded to it
    own = np.where(truth, np.maximum(exact, 2.0**-25), np.maximum(1 - exact, 2.0**-12))
    expected = log_loss(np.ones(len(own)), own, labels=[0, 1])
    loss = scores.estimate_log_loss(counts)
    assert loss is not None
    assert loss[0] == pytest.approx(expected, rel=1e-5, abs=1e-12)
    micro = scores.estimate_micro_average_precision(counts)
    if 0 < truth.sum() < len(truth):
        assert micro is not None
        assert micro.value == pytest.approx(average_precision_score(truth, exact), abs=1e-9)
        assert micro.bound == 0
    else:
        assert micro is None


@pytest.mark.parametrize("classes", [5, 300])
def test_losses_are_those_of_the_scores_before_they_are_rounded(classes: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, classes)) * 9
    targets = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    targets[rng.random(targets.shape) < 0.05] = -1
    stored = (1 / (1 + np.exp(-logits))).astype(np.float32)
    counts = RankingCounts.from_arrays(targets, stored, [f"c{code}" for code in range(classes)])
    known = targets >= 0
    truth, exact = targets[known], np.clip(stored[known].astype(np.float64), 1e-12, 1 - 1e-12)
    loss, brier = scores.estimate_log_loss(counts), scores.estimate_multilabel_brier(counts)
    assert loss is not None
    assert brier is not None
    assert loss[0] == pytest.approx(log_loss(truth, exact), rel=1e-4)
    assert brier[0] == pytest.approx(brier_score_loss(truth, exact), rel=1e-4)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_classes_equal_scikit_learn(name: str) -> None:
    assert_classes_equal_scikit_learn(ADVERSARIAL[name])


@given(
    rows=st.integers(20, 200),
    seed=st.integers(0, 10**6),
    unknown=st.sampled_from([0.2, 0.9]),
    ties=st.sampled_from([0, 3]),
)
@settings(max_examples=25)
def test_partial_labels_equal_scikit_learn_on_the_known_cells(
    rows: int, seed: int, unknown: float, ties: int
) -> None:
    data = make_rows(rows, 4, seed=seed, unknown=unknown, ties=ties)
    assert_classes_equal_scikit_learn(data)
    complete = (data.targets >= 0).all(axis=1)
    counts = count(data)
    assert counts.complete == complete.sum()
    assert counts.rows == (data.targets >= 0).any(axis=1).sum()
    assert counts.positive_rows == (data.targets > 0).any(axis=1).sum()
    whole = count(Rows(*(array[complete] for array in data)))
    np.testing.assert_allclose(counts.ranking_sums, whole.ranking_sums)


def test_many_classes_stay_within_the_reported_bound() -> None:
    rows = make_rows(300, 300, density=0.05, seed=3)
    counts = count(rows)
    assert counts.positive.shape == (300, 961)
    found = compute_discrimination(counts)
    exact = rows.scores.astype(np.float64)
    for c in range(0, 300, 30):
        off = abs(
            found.average_precision[c] - average_precision_score(rows.targets[:, c], exact[:, c])
        )
        assert off <= found.average_precision_bound[c] + 1e-9
    assert np.nanmax(found.average_precision_bound) > 0
    brier = scores.estimate_multilabel_brier(counts)
    assert brier is not None
    assert brier[0] == pytest.approx(((exact - rows.targets) ** 2).mean(), abs=1e-3)
    assert_rankings_equal_scikit_learn(rows)  # which need no bins


@given(cuts=st.lists(st.integers(0, 200), max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_any_partition_in_any_order_gives_the_same_counts(cuts: list[int], seed: int) -> None:
    rows = make_rows(200, 5, seed=seed, unknown=0.1)
    ends = [0, *sorted(cuts), 200]
    parts = [count(Rows(*(array[a:b] for array in rows))) for a, b in itertools.pairwise(ends)]
    np.random.default_rng(seed).shuffle(parts)
    merged = functools.reduce(operator.add, parts, RankingCounts.empty(rows.classes))
    assert_same(merged, count(rows))


def test_blocks_of_rows_are_counted_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(400, 7, unknown=0.01)
    whole = count(rows)
    monkeypatch.setattr(ranking, "_BIN_CELLS", 700)
    monkeypatch.setattr(ranking, "_RANKED_LABELS", 9)
    monkeypatch.setattr(matrices.split_rows, "__defaults__", (100,))
    assert_same(count(rows), whole)


def test_float32_scores_are_rounded_to_float16() -> None:
    rows = make_rows(50, 4)
    exact = rows.scores.astype(np.float32) * np.float32(1.0001)
    assert_same(
        count(rows._replace(scores=exact)), count(rows._replace(scores=exact.astype(np.float16)))
    )
    whole = np.asfortranarray(rows.scores)
    assert_same(count(rows._replace(scores=whole)), count(rows))


def test_no_rows() -> None:
    assert_same(count(make_rows(0, 3)), RankingCounts.empty(make_rows(0, 3).classes))


@pytest.mark.parametrize("wrong", [-0.5, 1.5, np.nan])
def test_logits_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="not logits"):
        RankingCounts.from_arrays(
            np.zeros((1, 2), np.int8), np.array([[wrong, 0.5]], np.float16), ["cat", "dog"]
        )


def test_wrong_input_is_refused() -> None:
    rows = make_rows(10, 3)
    with pytest.raises(ValueError, match=r"expected float16 \(10, 3\)"):
        count(rows._replace(scores=rows.scores[:9]))
    with pytest.raises(ValueError, match="expected float16"):
        count(rows._replace(scores=rows.predicted))
    with pytest.raises(ValueError, match="expected int8"):
        count(rows._replace(targets=rows.predicted))
    with pytest.raises(ValueError, match=r"expected 1 \(the class"):
        count(rows._replace(targets=rows.targets * 2))
    with pytest.raises(ValueError, match="no classes"):
        RankingCounts.from_arrays(np.zeros((1, 0), np.int8), np.zeros((1, 0), np.float16), [])
    with pytest.raises(ValueError, match="different classes"):
        RankingCounts.empty(["cat"]) + RankingCounts.empty(["dog"])
