"""Thresholds: exact counts at every grid point, and the lowest one that reaches the target."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.metrics import selective
from imgcls.metrics.columns import NULL_LABEL, OkRows
from imgcls.metrics.selective import THRESHOLD_GRID, SelectiveCounts

NAMES = ("ant", "bee", "cat")


def rows_of(
    confidence: Any, right: Any, predicted: Any | None = None, labeled: Any | None = None
) -> OkRows:
    confidence = np.asarray(confidence, np.float32).astype(np.float64)
    size = len(confidence)
    predicted = np.zeros(size, np.int64) if predicted is None else np.asarray(predicted)
    label = np.where(np.asarray(right, bool), predicted, (predicted + 1) % 3)
    if labeled is not None:
        label = np.where(labeled, label, NULL_LABEL)
    return OkRows(
        {"ok": size}, np.arange(size), predicted, label, confidence, np.ones(size, bool),
        np.full(size, np.nan), np.zeros(0, np.int64),
    )  # fmt: skip


@given(
    rows=st.lists(
        st.tuples(st.floats(0, 1, width=32), st.booleans(), st.integers(0, 2), st.booleans()),
        min_size=1,
        max_size=60,
    )
)
def test_counts_at_every_threshold_are_those_of_the_comparison(rows: list[Any]) -> None:
    confidence, right, predicted, labeled = (np.array(c) for c in zip(*rows, strict=True))
    counts = SelectiveCounts.from_rows(rows_of(confidence, right, predicted, labeled), NAMES)
    accepted = counts.count_accepted()
    for place, threshold in enumerate(THRESHOLD_GRID):
        taken = np.float32(confidence) >= np.float32(threshold)
        assert accepted[0, place] == (taken & right & labeled).sum()
        assert accepted[1, place] == (taken & ~right & labeled).sum()
        assert accepted[2, place] == (taken & ~labeled).sum()
    halves = [
        SelectiveCounts.from_rows(
            rows_of(*(c[s] for c in (confidence, right, predicted, labeled))), NAMES
        )
        for s in (slice(None, 7), slice(7, None))
    ]
    np.testing.assert_array_equal((halves[1] + halves[0]).counts, counts.counts)


def test_the_chosen_threshold_is_the_lowest_that_reaches_the_target() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    right = rng.random(20_000) < confidence  # calibrated
    counts = SelectiveCounts.from_rows(rows_of(confidence, right), NAMES)
    found = selective.choose_threshold(counts, 0.9)
    assert found.threshold is not None
    assert found.threshold == pytest.approx(0.8, abs=0.02)  # the mean of [0.8, 1] is 0.9
    assert found.precision is not None
    assert found.precision >= 0.9
    assert found.coverage == pytest.approx(0.2, abs=0.02)
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower < found.precision < found.upper
    right_below, wrong_below, _ = counts.count_accepted()[
        :, np.flatnonzero(found.threshold > THRESHOLD_GRID)[-1]
    ]
    assert right_below / (right_below + wrong_below) < 0.9


def test_a_few_lucky_rows_decide_nothing() -> None:
    counts = SelectiveCounts.from_rows(
        rows_of([0.99] * 5 + [0.5] * 100, [1] * 5 + [0, 1] * 50), NAMES
    )
    assert selective.choose_threshold(counts, 0.95).threshold is None
    few = selective.choose_threshold(counts, 0.95, min_rows=5)
    assert few.threshold is not None
    assert few.support == 5


def test_classes_have_thresholds_of_their_own() -> None:
    predicted = np.repeat([0, 1], 100)
    confidence = np.tile(np.linspace(0.5, 0.99, 100), 2)
    right = np.concatenate([np.ones(100), np.arange(100) >= 60])
    counts = SelectiveCounts.from_rows(rows_of(confidence, right, predicted), NAMES)
    ant, bee, cat = (selective.choose_threshold(counts, 0.95, name) for name in NAMES)
    assert ant.threshold == 0
    assert bee.threshold is not None
    assert bee.threshold > 0.7
    assert cat.threshold is None
    assert bee.coverage == pytest.approx(0.42, abs=0.02)


def test_the_curve_ends_at_accuracy_and_its_area_is_the_mean_risk() -> None:
    confidence, right = np.linspace(0.1, 0.999, 1000), np.arange(1000) >= 500
    counts = SelectiveCounts.from_rows(rows_of(confidence, right), NAMES)
    curve = selective.build_coverage_curve(counts).to_pylist()
    assert curve[0]["coverage"] == 1.0
    assert curve[0]["accuracy"] == 0.5
    assert [row["coverage"] for row in curve] == sorted(
        (row["coverage"] for row in curve), reverse=True
    )
    order = right[::-1]
    risk = (np.cumsum(~order) / np.arange(1, 1001)).mean()
    assert selective.area_under_risk_coverage(counts.counts.sum(1)) == pytest.approx(risk, abs=0.01)
    assert selective.area_under_risk_coverage(np.zeros((3, len(THRESHOLD_GRID)), int)) is None


@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_the_area_of_few_rows_is_their_mean_risk(rows: int) -> None:
    rng = np.random.default_rng(rows)
    for _ in range(20):
        cells = np.zeros((3, 40), int)  # one row at most in each
        chosen, wrong = rng.permutation(40)[:rows], rng.integers(0, 2, rows)
        cells[wrong, chosen] = 1
        ranked = wrong[np.argsort(-chosen)]
        risk = (np.cumsum(ranked == selective.WRONG) / np.arange(1, rows + 1)).mean()
        assert selective.area_under_risk_coverage(cells) == pytest.approx(risk)


def test_rows_of_one_cell_count_in_random_order() -> None:
    cells = np.zeros((3, 4), int)
    cells[:, 3], cells[:, 1] = (3, 1, 0), (1, 2, 0)
    orders = [
        [*first, *last]
        for first in set(itertools.permutations([0, 0, 0, 1]))
        for last in set(itertools.permutations([0, 1, 1]))
    ]
    risks = [(np.cumsum(order) / np.arange(1, 8)).mean() for order in orders]
    assert selective.area_under_risk_coverage(cells) == pytest.approx(np.mean(risks))


def test_the_grid_holds_float32_numbers_from_0_to_nearly_1() -> None:
    assert THRESHOLD_GRID[0] == 0
    assert THRESHOLD_GRID[-1] < 1
    assert (np.float32(THRESHOLD_GRID).astype(np.float64) == THRESHOLD_GRID).all()
    assert (np.diff(THRESHOLD_GRID) > 0).all()
