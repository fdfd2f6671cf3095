"""Differences of the metrics of two multi-label runs on the same rows, with 95% intervals.

The intervals are those of the infinitesimal jackknife: the variance of a metric is the sum of the
squared contributions of the rows, which is the limit of the paired bootstrap over rows, without
resampling. Source: Efron, "The Jackknife, the Bootstrap and Other Resampling Plans" (1982).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from imgcls.metrics.columns import Bools, Floats
from imgcls.metrics.intervals import Z_95
from imgcls.metrics.multilabel.matrices import Targets
from imgcls.metrics.score_bins import ONE, view_bits


class Difference(NamedTuple):
    """A metric of two runs on the same rows.

    Attributes
    ----------
    a, b : float
        The metric of each run.
    difference : float
        B minus A.
    lower, upper : float
        95% interval of the difference.
    """

    a: float
    b: float
    difference: float
    lower: float
    upper: float


class RunCells(NamedTuple):
    """Predictions of a run: scores (N, C) float16 and whether each label is predicted (N, C)."""

    scores: NDArray[np.float16]
    predicted: Bools


class PairedMetrics(NamedTuple):
    """Metrics of two runs.

    Attributes
    ----------
    mean_average_precision, f1_macro, f1_micro : Difference or None
        Means over classes as in `compute_multilabel_metrics`; None where they are undefined.
    average_precision, f1 : list of Difference or None
        Of each class; None without known cells of both kinds, or without known cells.
    """

    mean_average_precision: Difference | None
    f1_macro: Difference | None
    f1_micro: Difference | None
    average_precision: list[Difference | None]
    f1: list[Difference | None]


class _Value(NamedTuple):
    """A metric, and the contribution of each row to its error."""

    value: float
    contributions: Floats


def compare_multilabel_cells(targets: Targets, a: RunCells, b: RunCells) -> PairedMetrics:
    """Compare the metrics of two runs.

    Parameters
    ----------
    targets : ndarray of int8, shape (N, C)
        1: the class applies, 0: it does not, -1: unknown.
    a, b : RunCells
        Predictions of both runs for these rows.

    Returns
    -------
    PairedMetrics

    Notes
    -----
    The contribution of a row to an average precision is its empirical influence. With fewer than
    about 10 rows of a class, its interval is too narrow.

    Examples
    --------
    >>> targets = np.array([[1], [0], [1]], np.int8)
    >>> a, b = (np.array([[x], [0.5], [0.75]], np.float16) for x in (0.25, 1.0))
    >>> runs = [RunCells(scores, scores >= 0.5) for scores in (a, b)]
    >>> found = compare_multilabel_cells(targets, *runs).mean_average_precision
    >>> round(found.a, 3), found.b
    (0.833, 1.0)
    """
    precisions = [_Mean(len(targets)) for _ in range(2)]
    f1_means = [_Mean(len(targets)) for _ in range(2)]
    by_class: tuple[list[Difference | None], list[Difference | None]] = ([], [])
    for c in range(targets.shape[1]):
        target = targets[:, c]
        ranked = [_measure_precision(target, run.scores[:, c]) for run in (a, b)]
        decided = [_measure_f1(target[:, None], run.predicted[:, c, None]) for run in (a, b)]
        for found, means, into in zip(
            (ranked, decided), (precisions, f1_means), by_class, strict=True
        ):
            for value, mean in zip(found, means, strict=True):
                mean.add(value)
            into.append(_subtract(*found))
    micro = [_measure_f1(targets, run.predicted) for run in (a, b)]
    return PairedMetrics(
        _subtract(*(mean.finish() for mean in precisions)),
        _subtract(*(mean.finish() for mean in f1_means)),
        _subtract(*micro),
        *by_class,
    )


class _Mean:
    """Mean of a metric over the classes where it is defined."""

    def __init__(self, rows: int) -> None:
        self._total, self._classes = 0.0, 0
        self._contributions = np.zeros(rows)

    def add(self, found: _Value | None) -> None:
        if found is not None:
            self._total += found.value
            self._classes += 1
            self._contributions += found.contributions

    def finish(self) -> _Value | None:
        if not self._classes:
            return None
        return _Value(self._total / self._classes, self._contributions / self._classes)


def _measure_precision(target: NDArray[np.int8], scores: NDArray[np.float16]) -> _Value | None:
    """Average precision of a class; equal scores are ranked together."""
    bits = np.minimum(view_bits(np.ascontiguousarray(scores)), ONE)
    known, is_positive = target >= 0, target > 0
    own = np.bincount(bits[is_positive], minlength=ONE + 1)
    every = np.bincount(bits[known], minlength=ONE + 1)
    positives = int(own.sum())
    if not 0 < positives < int(every.sum()):
        return None
    # of the rows with at least the score of each bin
    hits, ranks = own[::-1].cumsum()[::-1], every[::-1].cumsum()[::-1]
    precision = hits / np.maximum(ranks, 1)
    value = float(own @ precision) / positives
    # a row changes the precision at each positive that has at most its score
    each = own / np.maximum(ranks, 1)
    gained, lost = each.cumsum(), (each * precision).cumsum()
    found = is_positive * (precision[bits] - value + gained[bits]) - lost[bits]
    return _Value(value, np.where(known, found, 0.0) / positives)


def _measure_f1(targets: Targets, predicted: Bools) -> _Value | None:
    """F1 of the known cells of (N, K); 0 without labels and predictions."""
    known = targets >= 0
    if not known.any():
        return None
    positive, called = targets > 0, predicted & known
    hits = 2 * (positive & called).sum(1)
    either = positive.sum(1) + called.sum(1)
    total = max(int(either.sum()), 1)
    value = float(hits.sum()) / total
    return _Value(value, (hits - value * either) / total)


def _subtract(a: _Value | None, b: _Value | None) -> Difference | None:
    if a is None or b is None:
        return None
    difference = b.value - a.value
    rows = len(a.contributions)
    variance = float(((b.contributions - a.contributions) ** 2).sum())
    spread = Z_95 * float(np.sqrt(variance * rows / max(rows - 1, 1)))
    lower, upper = max(-1.0, difference - spread), min(1.0, difference + spread)
    return Difference(a.value, b.value, difference, lower, upper)
