"""Ratios of cells, such as micro recall, with 95% intervals for rows drawn at random.

The cells of a row are dependent: one difficult image gives several wrong cells. The design effect
measures how much this widens an interval, and is computed from the second moments of the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from imgcls.metrics.columns import Floats
from imgcls.metrics.intervals import (
    Z_95,
    Interval,
    mover_interval,
    wilson_interval,
    wilson_limits,
)
from imgcls.metrics.limits import f1_limits
from imgcls.metrics.multilabel.counts import MultiLabelCounts

_MIN_ROWS = 30  # fewer rows do not show how dependent their cells are


class Ratio(NamedTuple):
    """Weights of the kinds of cells (TP, FP, FN, TN) above and below the fraction line."""

    top: tuple[int, int, int, int]
    bottom: tuple[int, int, int, int]


PRECISION = Ratio((1, 0, 0, 0), (1, 1, 0, 0))
RECALL = Ratio((1, 0, 0, 0), (1, 0, 1, 0))
JACCARD = Ratio((1, 0, 0, 0), (1, 1, 1, 0))
FALLOUT = Ratio((0, 1, 0, 0), (0, 1, 0, 1))
HAMMING = Ratio((0, 1, 1, 0), (1, 1, 1, 1))


def estimate_ratio(counts: MultiLabelCounts, ratio: Ratio) -> tuple[float, Interval] | None:
    """Ratio of the cells of all classes, with its 95% interval.

    Parameters
    ----------
    counts : MultiLabelCounts
        Counts of a run.
    ratio : Ratio
        Kinds of cells to divide.

    Returns
    -------
    tuple of (float, Interval) or None
        0 if there is nothing to divide by, as in scikit-learn; None without a known cell.

    Notes
    -----
    Wilson's interval for the number of cells divided by the design effect: Korn, Graubard, Survey
    Methodology 24 (1998).

    Examples
    --------
    >>> targets, predicted = np.ones((50, 2), np.int8), np.ones((50, 2), np.bool_)
    >>> counts = MultiLabelCounts.from_arrays(targets, predicted, ["cat", "dog"])
    >>> value, (low, high) = estimate_ratio(counts, RECALL)  # as sure as of 50 cells
    >>> value, round(low, 3), high
    (1.0, 0.929, 1.0)
    """
    if not counts.known_cells:
        return None
    top, bottom = (int(counts.cells @ np.array(weights)) for weights in ratio)
    if not bottom:
        return 0.0, (0.0, 1.0)
    effect = compute_design_effect(counts, ratio)
    return top / bottom, _widened_wilson(top, bottom, effect)


def estimate_micro_f1(counts: MultiLabelCounts) -> tuple[float, Interval] | None:
    """F1 of the cells of all classes, with its 95% interval.

    Parameters
    ----------
    counts : MultiLabelCounts
        Counts of a run.

    Returns
    -------
    tuple of (float, Interval) or None
        From the Jaccard index J of all cells: F1 = 2 J / (1 + J). None without a known cell.
    """
    found = estimate_ratio(counts, JACCARD)
    if found is None:
        return None
    value, (low, high) = found
    return 2 * value / (1 + value), (2 * low / (1 + low), 2 * high / (1 + high))


def compute_design_effect(counts: MultiLabelCounts, ratio: Ratio) -> float:
    """Variance of a ratio when rows are drawn, divided by its variance when cells are drawn.

    Parameters
    ----------
    counts : MultiLabelCounts
        Counts of a run.
    ratio : Ratio
        Kinds of cells to divide.

    Returns
    -------
    float
        At least 1. For fewer than 30 rows, or a ratio of 0 or 1, the largest possible value: all
        cells of a row are taken for equal.

    Examples
    --------
    >>> targets = np.ones((50, 2), np.int8)
    >>> predicted = np.repeat(np.arange(50) < 40, 2).reshape(50, 2)  # both cells right, or both not
    >>> counts = MultiLabelCounts.from_arrays(targets, predicted, ["cat", "dog"])
    >>> round(compute_design_effect(counts, RECALL), 2)
    2.04
    """
    top, bottom = (np.array(weights, dtype=np.float64) for weights in ratio)
    moments = counts.cell_moments.astype(np.float64)
    cells = float(counts.cells @ bottom)
    if not cells:
        return 1.0
    value = float(counts.cells @ top) / cells
    if counts.labeled < _MIN_ROWS or not 0 < value < 1:
        return max(1.0, float(bottom @ moments @ bottom) / cells)
    residual = top - value * bottom
    rows = counts.labeled / (counts.labeled - 1)
    return max(1.0, rows * float(residual @ moments @ residual) / (value * (1 - value) * cells))


def _widened_wilson(top: int, bottom: int, effect: float) -> Interval:
    low, high = wilson_interval(top / effect, bottom / effect)
    value = top / bottom
    return min(low, value), max(high, value)  # they may differ by rounding


class ClassRates(NamedTuple):
    """A rate of each class, its 95% limits and its variance, each of shape (C,)."""

    value: Floats
    lower: Floats
    upper: Floats
    variance: Floats


def compute_class_rates(counts: MultiLabelCounts) -> dict[str, ClassRates]:
    """Precision, recall and F1 of each class, with Wilson limits.

    Parameters
    ----------
    counts : MultiLabelCounts
        Counts of a run.

    Returns
    -------
    dict of str to ClassRates
        Keys "precision", "recall" and "f1". A rate whose denominator is 0 is 0, with limits 0
        and 1. Each row has one cell of a class, so the cells of a class are independent.
    """
    hits, support = counts.true_positives, counts.support
    called = hits + counts.false_positives
    either = np.maximum(support + called - hits, 1)
    jaccard = hits / either
    precision, recall = hits / np.maximum(called, 1), hits / np.maximum(support, 1)
    # of F1 = 2 J / (1 + J), with its derivative
    f1_variance = (2 / (1 + jaccard) ** 2) ** 2 * jaccard * (1 - jaccard) / either
    return {
        "precision": ClassRates(
            precision,
            *wilson_limits(hits, called),
            precision * (1 - precision) / np.maximum(called, 1),
        ),
        "recall": ClassRates(
            recall, *wilson_limits(hits, support), recall * (1 - recall) / np.maximum(support, 1)
        ),
        "f1": ClassRates(
            2 * hits / np.maximum(support + called, 1),
            *f1_limits(hits, support, called),
            f1_variance,
        ),
    }


def estimate_class_mean(counts: MultiLabelCounts, rate: str) -> tuple[float, Interval] | None:
    """Mean of a rate over the classes with a known cell, with its 95% interval.

    Parameters
    ----------
    counts : MultiLabelCounts
        Counts of a run.
    rate : {"precision", "recall", "f1"}
        Rate of each class. It is 0 for a class without positives and predictions, as in
        scikit-learn.

    Returns
    -------
    tuple of (float, Interval) or None
        Normal interval, united with the limits of the classes, which have a width even if all
        cells are right (`intervals.mover_interval`). Both are widened by the design effect of the
        cells. None without a known cell.

    Examples
    --------
    >>> targets = np.array([[1, 0], [1, 1]], np.int8)
    >>> counts = MultiLabelCounts.from_arrays(targets, targets > 0, ["cat", "dog"])
    >>> value, (low, high) = estimate_class_mean(counts, "f1")
    >>> value, round(low, 2), high
    (1.0, 0.47, 1.0)
    """
    known = counts.known > 0
    if not known.any():
        return None
    rates = ClassRates(*(each[known] for each in compute_class_rates(counts)[rate]))
    ratio = {"precision": PRECISION, "recall": RECALL, "f1": JACCARD}[rate]
    weight = float(np.sqrt(compute_design_effect(counts, ratio))) / int(known.sum())
    value = float(rates.value.mean())
    spread = Z_95 * weight * float(np.sqrt(rates.variance.sum()))
    low, high = mover_interval(
        value, weight * (rates.value - rates.lower), weight * (rates.upper - rates.value)
    )
    low, high = min(low, value - spread), max(high, value + spread)
    return value, (max(low, 0.0), min(high, 1.0))
