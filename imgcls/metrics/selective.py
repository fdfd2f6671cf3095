"""Selective prediction: accuracy of the accepted predictions against their share (coverage).

Counts labeled predictions by predicted class and by a fixed grid of thresholds, which is fine near
1, where confident models put most predictions. Counts are exact at every threshold of the grid;
thresholds between grid points are not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from imgcls.metrics.columns import Bools, Floats, Ints, OkRows
from imgcls.metrics.counts import CORRECT, UNLABELED, WRONG
from imgcls.metrics.intervals import (
    Interval,
    bootstrap_intervals,
    union_interval,
    wilson_interval,
)

THRESHOLD_GRID: Floats = np.unique(
    np.float32(np.concatenate([np.arange(100) / 100, 1 - np.logspace(-2, -6, 161)]))
).astype(np.float64)
"""(T,) increasing thresholds from 0: every hundredth, then 40 per decade up to 1 - 1e-6.

They are float32 numbers, like confidences, so that `confidence >= threshold` gives the same result
in float32 and float64.
"""

_CURVE_SCHEMA = pa.schema(
    [
        *(pa.field(n, pa.float64()) for n in ("threshold", "coverage", "accuracy")),
        *(pa.field(n, pa.float64()) for n in ("lower", "upper")),
        *(pa.field(n, pa.int64()) for n in ("accepted", "judged")),
    ]
)


@dataclass(frozen=True)
class Threshold:
    """Confidence threshold and statistics of the predictions that it accepts.

    Attributes
    ----------
    label : str or None
        Predicted class to which the threshold applies; None for all.
    threshold : float or None
        Smallest accepted confidence; None if no threshold reaches the target.
    precision, lower, upper : float or None
        Share of the accepted labeled predictions that are correct, and its 95% Wilson interval.
    coverage : float
        Share of the predictions that are accepted, labeled or not.
    support : int
        Accepted labeled predictions.
    """

    label: str | None
    threshold: float | None
    precision: float | None
    lower: float | None
    upper: float | None
    coverage: float
    support: int


@dataclass(frozen=True, eq=False)
class SelectiveCounts:
    """Predictions by outcome, predicted class and threshold; C classes, T thresholds.

    Attributes
    ----------
    classes : tuple of str
        Class names.
    counts : ndarray of int64, shape (3, C, T)
        Rows by outcome (CORRECT, WRONG, UNLABELED); [..., t] counts confidences in
        [THRESHOLD_GRID[t], THRESHOLD_GRID[t + 1]).
    """

    classes: tuple[str, ...]
    counts: Ints

    @classmethod
    def empty(cls, classes: Sequence[str]) -> SelectiveCounts:
        """Counts of no rows."""
        return cls(tuple(classes), np.zeros((3, len(classes), len(THRESHOLD_GRID)), np.int64))

    @classmethod
    def from_rows(cls, rows: OkRows, classes: Sequence[str]) -> SelectiveCounts:
        """Count the rows that `columns.read_ok_rows` returned.

        Parameters
        ----------
        rows : OkRows
            Rows with a prediction.
        classes : sequence of str
            Class names, in the order of the class indices.

        Returns
        -------
        SelectiveCounts
        """
        outcome = np.where(
            rows.label < 0, UNLABELED, np.where(rows.label == rows.predicted, CORRECT, WRONG)
        )
        cell = np.maximum(np.searchsorted(THRESHOLD_GRID, rows.confidence, side="right") - 1, 0)
        shape = (3, len(classes), len(THRESHOLD_GRID))
        flat = np.ravel_multi_index((outcome, rows.predicted, cell), shape)
        counts = np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)
        return cls(tuple(classes), counts.astype(np.int64, copy=False))

    def __add__(self, other: SelectiveCounts) -> SelectiveCounts:
        """Counts of the rows of both. Raises ValueError if the classes differ."""
        if self.classes != other.classes:
            raise ValueError("cannot merge counts over different classes")
        return SelectiveCounts(self.classes, self.counts + other.counts)

    def count_accepted(self, label: str | None = None) -> Ints:
        """Rows that each threshold of the grid accepts.

        Parameters
        ----------
        label : str, optional
            Count only the predictions of this class.

        Returns
        -------
        ndarray of int64, shape (3, T)
            Rows by outcome with a confidence of at least the threshold.
        """
        rows = self.counts.sum(1) if label is None else self.counts[:, self.classes.index(label)]
        summed: Ints = rows[:, ::-1].cumsum(1)[:, ::-1]
        return summed


def build_coverage_curve(counts: SelectiveCounts) -> pa.Table:
    """Accuracy of the accepted predictions at every threshold that accepts a prediction.

    Parameters
    ----------
    counts : SelectiveCounts
        Counts of a run.

    Returns
    -------
    pyarrow.Table
        Columns threshold, coverage (share of all predictions), accuracy, lower, upper (float64;
        null if no accepted row is labeled), accepted, `judged` (int64; accepted rows, and those
        with a label). The first threshold accepts everything. A threshold that accepts the same
        predictions as the one before it is left out.

    Examples
    --------
    >>> build_coverage_curve(SelectiveCounts.empty(["cat", "dog"])).num_rows
    0
    """
    accepted = counts.count_accepted()
    total = int(accepted[:, 0].sum())
    rows: list[dict[str, Any]] = []
    for index, threshold in enumerate(THRESHOLD_GRID):
        correct, wrong, unlabeled = (int(n) for n in accepted[:, index])
        labeled, taken = correct + wrong, correct + wrong + unlabeled
        if taken == 0 or (rows and rows[-1]["accepted"] == taken):
            continue
        low, high = wilson_interval(correct, labeled)
        rows.append(
            {
                "threshold": float(threshold),
                "coverage": taken / total,
                "accuracy": correct / labeled if labeled else None,
                "lower": low if labeled else None,
                "upper": high if labeled else None,
                "accepted": taken,
                "judged": labeled,
            }
        )
    return pa.Table.from_pylist(rows, schema=_CURVE_SCHEMA)


def area_under_risk_coverage(cells: Ints) -> float | None:
    """Area under the risk-coverage curve: mean error rate over all coverages; lower is better.

    The mean over k = 1 to N of the error rate of the k most confident rows.

    Parameters
    ----------
    cells : ndarray of int64, shape (3, T)
        Rows by outcome and grid cell, in order of increasing confidence. Rows of one cell count as
        accepted in random order.

    Returns
    -------
    float or None
        Fraction in [0, 1]; None without a labeled row.

    Notes
    -----
    Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers",
    ICLR 2019.

    Examples
    --------
    The wrong prediction is the least confident one of two:

    >>> area_under_risk_coverage(np.array([[0, 1], [1, 0], [0, 0]]))
    0.25
    """
    cells = cells[:2, ::-1]
    # of the limits, mistakes are fractions of rows
    rows, wrong = np.rint(cells.sum(0)).astype(np.int64), cells[WRONG]
    if not rows.sum():
        return None
    rows, wrong = rows[rows > 0], wrong[rows > 0]
    before, wrong_before = rows.cumsum() - rows, wrong.cumsum() - wrong
    # of the j-th row of a cell: (wrong_before + share * j) / (before + j)
    share = wrong / rows
    reciprocals = _sum_reciprocals(before + rows) - _sum_reciprocals(before)
    risk = share * rows + (wrong_before - share * before) * reciprocals
    return float(risk.sum() / rows.sum())


def _sum_reciprocals(counts: Ints) -> Floats:
    """The harmonic numbers 1 + 1/2 + ... + 1/n of counts n; 0 for 0."""
    first = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, 101))])
    n = np.maximum(counts, 100).astype(np.float64)
    # Euler-Maclaurin; the error is below 1 / (120 n^4)
    far = np.log(n) + np.euler_gamma + 1 / (2 * n) - 1 / (12 * n**2)
    return np.where(counts <= 100, first[np.minimum(counts, 100)], far)


def estimate_aurc(counts: SelectiveCounts) -> tuple[float, Interval | None] | None:
    """Area under the risk-coverage curve with its 95% interval.

    Parameters
    ----------
    counts : SelectiveCounts
        Counts of a run.

    Returns
    -------
    value : float
        `area_under_risk_coverage` of the counts.
    interval : tuple of float
        Bootstrap interval united with the one that follows from the Wilson limits of the error
        rate. None is returned without a labeled row.

    Examples
    --------
    >>> estimate_aurc(SelectiveCounts.empty(["cat", "dog"])) is None
    True
    """
    cells = counts.counts.sum(1)
    area = area_under_risk_coverage(cells)
    if area is None:
        return None

    def compute(cells: Ints) -> dict[str, float]:
        value = area_under_risk_coverage(cells)
        return {} if value is None else {"area": value}

    drawn = bootstrap_intervals([cells], compute).get("area")
    return area, union_interval(drawn, _compute_aurc_limits(cells), low=0.0, high=1.0)


def _compute_aurc_limits(cells: Ints) -> Interval:
    """AURC if the error rate is at its Wilson limits, with mistakes distributed as counted.

    For the upper limit, correct rows of every confidence become mistakes at the same rate.
    """
    correct, wrong = cells[CORRECT].astype(float), cells[WRONG].astype(float)
    rows, errors = correct.sum() + wrong.sum(), wrong.sum()
    lower, upper = wilson_interval(errors, int(rows))
    fewer = wrong * (lower * rows / errors) if errors else wrong
    more = wrong + correct * ((upper * rows - errors) / correct.sum()) if correct.sum() else wrong
    low, high = (
        area_under_risk_coverage(np.stack([correct + wrong - each, each])) for each in (fewer, more)
    )
    assert low is not None
    assert high is not None
    return low, high


def choose_threshold(
    counts: SelectiveCounts, target: float, label: str | None = None, *, min_rows: int = 30
) -> Threshold:
    """Lowest threshold whose accepted predictions reach a target precision.

    Parameters
    ----------
    counts : SelectiveCounts
        Counts of a run.
    target : float
        Precision to reach, in (0, 1]. It is compared with the measured precision; the interval is
        part of the result.
    label : str, optional
        Choose for the predictions of this class only.
    min_rows : int, default 30
        Accepted labeled rows required, so that a few lucky rows do not decide.

    Returns
    -------
    Threshold
        Its `threshold` is None if no threshold reaches the target.

    Examples
    --------
    >>> choose_threshold(SelectiveCounts.empty(["cat", "dog"]), 0.95).threshold is None
    True
    """
    accepted = counts.count_accepted(label)
    correct, labeled = accepted[CORRECT], accepted[CORRECT] + accepted[WRONG]
    reaches: Bools = (correct >= target * labeled - 1e-9) & (labeled >= min_rows)
    if not reaches.any():
        return Threshold(label, None, None, None, None, 0.0, 0)
    return _describe_threshold(accepted, int(np.argmax(reaches)), label)


def _describe_threshold(accepted: Ints, index: int, label: str | None) -> Threshold:
    correct, labeled = int(accepted[CORRECT, index]), int(accepted[:2, index].sum())
    low, high = wilson_interval(correct, labeled)
    total = int(accepted[:, 0].sum())
    return Threshold(
        label=label,
        threshold=float(THRESHOLD_GRID[index]),
        precision=correct / labeled if labeled else None,
        lower=low if labeled else None,
        upper=high if labeled else None,
        coverage=int(accepted[:, index].sum()) / total if total else 0.0,
        support=labeled,
    )
