"""Paired differences: metrics of scikit-learn, intervals of the bootstrap over rows."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from imgcls.metrics.multilabel import (
    MultiLabelCounts,
    RankingCounts,
    compute_multilabel_metrics,
)
from imgcls.metrics.multilabel.paired import PairedMetrics, RunCells, compare_multilabel_cells

CLASSES = ("ant", "bee", "cat", "dog")


def draw(
    rows: int, seed: int, *, unknown: float = 0.0
) -> tuple[NDArray[np.int8], RunCells, RunCells]:
    """Labels with dependent cells, and two models with common errors; B is the better one."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(rows, 4)) + rng.normal(size=(rows, 1)) + [-2, -1, 0, -1.5]
    targets = (rng.random(signal.shape) < 1 / (1 + np.exp(-2 * signal))).astype(np.int8)
    targets[rng.random(signal.shape) < unknown] = -1
    error = rng.normal(size=signal.shape)
    runs = []
    for noise in (1.2, 0.9):
        logits = signal + noise * (error + 0.5 * rng.normal(size=signal.shape))
        scores = (1 / (1 + np.exp(-logits))).astype(np.float16)
        runs.append(RunCells(scores, scores >= 0.5))
    return targets, *runs


def take(cells: RunCells, rows: NDArray[np.int64]) -> RunCells:
    return RunCells(cells.scores[rows], cells.predicted[rows])


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_the_metrics_are_those_of_scikit_learn(unknown: float) -> None:
    from sklearn.metrics import average_precision_score, f1_score

    targets, *runs = draw(500, 0, unknown=unknown)
    found = compare_multilabel_cells(targets, *runs)
    known = targets >= 0
    for name, run in zip("ab", runs, strict=True):
        precisions, f1 = [], []
        for c in range(4):
            at = known[:, c]
            precisions.append(average_precision_score(targets[at, c], run.scores[at, c]))
            f1.append(f1_score(targets[at, c], run.predicted[at, c]))
            assert getattr(found.average_precision[c], name) == pytest.approx(precisions[c])
            assert getattr(found.f1[c], name) == pytest.approx(f1[c])
        assert getattr(found.mean_average_precision, name) == pytest.approx(np.mean(precisions))
        assert getattr(found.f1_macro, name) == pytest.approx(np.mean(f1))
        micro = f1_score(targets[known], run.predicted[known])
        assert getattr(found.f1_micro, name) == pytest.approx(micro)


def test_the_metrics_are_those_of_an_evaluation() -> None:
    targets, *runs = draw(500, 0, unknown=0.3)
    found = compare_multilabel_cells(targets, *runs)
    for name, run in zip("ab", runs, strict=True):
        metrics = compute_multilabel_metrics(
            MultiLabelCounts.from_arrays(targets, run.predicted, CLASSES),
            ranking=RankingCounts.from_arrays(targets, run.scores, CLASSES),
            resamples=0,
        )
        values = {metric.name: metric.value for metric in metrics}
        for metric in ("mean_average_precision", "f1_macro", "f1_micro"):
            assert getattr(getattr(found, metric), name) == pytest.approx(values[metric])


def collect(found: PairedMetrics) -> list[float]:
    means = (found.mean_average_precision, found.f1_macro, found.f1_micro)
    by_class = (found.average_precision[0], found.f1[0])
    assert all(means)
    assert all(by_class)
    return [each.difference for each in (*means, *by_class) if each is not None]


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_the_intervals_are_as_wide_as_those_of_the_paired_bootstrap(unknown: float) -> None:
    targets, a, b = draw(1_500, 1, unknown=unknown)
    found = compare_multilabel_cells(targets, a, b)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(300):
        rows = rng.integers(0, len(targets), len(targets))
        drawn.append(collect(compare_multilabel_cells(targets[rows], take(a, rows), take(b, rows))))
    spread = 1.96 * np.std(drawn, axis=0)
    means = (found.mean_average_precision, found.f1_macro, found.f1_micro)
    for each, wide in zip((*means, found.average_precision[0], found.f1[0]), spread, strict=True):
        assert each is not None
        assert (each.upper - each.lower) / 2 == pytest.approx(wide, rel=0.12)


def test_the_interval_contains_the_difference_of_many_rows_in_95_of_100_samples() -> None:
    targets, a, b = draw(100_000, 2)
    true = collect(compare_multilabel_cells(targets, a, b))[:3]
    hits = np.zeros(3)
    for part in range(200):
        rows = np.arange(part * 500, (part + 1) * 500)
        found = compare_multilabel_cells(targets[rows], take(a, rows), take(b, rows))
        means = (found.mean_average_precision, found.f1_macro, found.f1_micro)
        hits += [
            m is not None and m.lower <= t <= m.upper for m, t in zip(means, true, strict=True)
        ]
    assert (hits / 200 >= 0.9).all()


def test_equal_runs_have_no_difference() -> None:
    targets, a, _ = draw(100, 3)
    found = compare_multilabel_cells(targets, a, a).mean_average_precision
    assert found is not None
    assert (found.difference, found.lower, found.upper) == (0, 0, 0)


def test_undefined_metrics_are_none() -> None:
    targets = np.array([[1, -1, 0], [1, -1, 0]], np.int8)
    scores = np.full((2, 3), 0.5, np.float16)
    run = RunCells(scores, scores > 0.6)
    found = compare_multilabel_cells(targets, run, run)
    assert found.average_precision == [None, None, None]
    assert found.mean_average_precision is None
    assert [None if each is None else each.a for each in found.f1] == [0, None, 0]
    # as in evaluation: the mean over the classes with a known cell
    counts = MultiLabelCounts.from_arrays(targets, run.predicted, ["a", "b", "c"])
    assert (counts.known > 0).tolist() == [True, False, True]
