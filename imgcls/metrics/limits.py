"""Intervals of metrics that follow from Wilson limits, for confusion matrices and confidence bins.

They have a width even where a bootstrap has none, because no row of some kind is wrong (or right).
Each share moves to its own limits; the effects on the metric are combined by
`intervals.mover_interval`.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from imgcls.metrics.agreement import cohens_kappa
from imgcls.metrics.calibration import ece_by_chance
from imgcls.metrics.columns import Floats, Ints
from imgcls.metrics.confusion import ClassCounts, ClassRate, ClassWeighting
from imgcls.metrics.intervals import Interval, mover_interval, wilson_interval, wilson_limits


def class_mean_limits(
    rate: ClassRate, weighting: ClassWeighting
) -> Callable[[ClassCounts, float], Interval]:
    """Build the interval function of `confusion.class_mean`.

    Parameters
    ----------
    rate : {"recall", "precision", "f1"}
        Rate of each class. Recall and precision have Wilson limits. Those of F1 are the Wilson
        limits of J = correct / (support + predicted - correct), with F1 = 2 J / (1 + J).
    weighting : {"labeled", "occurring", "support"}
        Weights of the classes.

    Returns
    -------
    callable
        Maps class counts and the value of the metric to its 95% interval.

    Notes
    -----
    Lam, Gopal, Qian, "Confidence Intervals for the F1 Score" (arXiv 2309.14621, 2023), the Wilson
    indirect method.

    Examples
    --------
    >>> counts = ClassCounts(np.array([10, 10]), np.array([10, 10]), np.array([10, 10]))
    >>> low, high = class_mean_limits("recall", "labeled")(counts, 1.0)
    >>> round(low, 3), high
    (0.804, 1.0)
    """

    def compute_interval(counts: ClassCounts, value: float) -> Interval:
        lower, upper = _rate_limits(counts, rate)
        found = getattr(counts, rate)
        weight = counts.weigh_classes(weighting)
        return mover_interval(value, weight * (found - lower), weight * (upper - found))

    return compute_interval


def _rate_limits(counts: ClassCounts, rate: ClassRate) -> tuple[Floats, Floats]:
    """Wilson limits of a rate of each class: (C,) lower and (C,) upper."""
    if rate == "recall":
        return wilson_limits(counts.correct, counts.support)
    if rate == "precision":
        return wilson_limits(counts.correct, counts.predicted)
    return f1_limits(counts.correct, counts.support, counts.predicted)


def f1_limits(correct: Ints, support: Ints, predicted: Ints) -> tuple[Floats, Floats]:
    """95% limits of the F1 of each class, by the Wilson indirect method (`class_mean_limits`).

    Parameters
    ----------
    correct, support, predicted : ndarray of int64, shape (C,)
        True positives, rows with the label and rows with the prediction.

    Returns
    -------
    lower, upper : ndarray of float64, shape (C,)

    Examples
    --------
    >>> lower, upper = f1_limits(np.array([10]), np.array([10]), np.array([10]))
    >>> lower.round(3).tolist(), upper.tolist()
    ([0.839], [1.0])
    """
    lower, upper = wilson_limits(correct, support + predicted - correct)
    return 2 * lower / (1 + lower), 2 * upper / (1 + upper)


def kappa_limits(counts: ClassCounts, value: float) -> Interval:
    """95% interval of Cohen's kappa: accuracy at its Wilson limits, agreement by chance as counted.

    Parameters
    ----------
    counts : ClassCounts
        Counts of at least one labeled row.
    value : float
        Cohen's kappa of the counts.

    Returns
    -------
    tuple of float
        Lower and upper end.

    Notes
    -----
    Cohen, Educational and Psychological Measurement 20 (1960).

    Examples
    --------
    >>> counts = ClassCounts(np.array([10, 10]), np.array([10, 10]), np.array([10, 10]))
    >>> low, high = kappa_limits(counts, 1.0)
    >>> round(low, 3), high
    (0.678, 1.0)
    """
    low, high = (
        cohens_kappa(counts.support, counts.predicted, end * counts.rows)
        for end in wilson_interval(int(counts.correct.sum()), counts.rows)
    )
    return low or 0.0, high or 0.0


def matthews_limits(counts: ClassCounts, value: float) -> Interval:
    """95% interval of the Matthews correlation: the recall of each class at its Wilson limits.

    Rows that leave a class are distributed over the others like its predictions.

    Parameters
    ----------
    counts : ClassCounts
        Counts of at least one labeled row.
    value : float
        Matthews correlation of the counts.

    Returns
    -------
    tuple of float
        Lower and upper end; (-1, 1) if all labels or all predictions are one class.

    Examples
    --------
    >>> counts = ClassCounts(np.array([10, 10]), np.array([10, 10]), np.array([10, 10]))
    >>> low, high = matthews_limits(counts, 1.0)
    >>> bool(0.5 < low < high) and high
    1.0
    """
    support, predicted, correct = counts.support, counts.predicted, counts.correct
    rows = support.sum()
    if max(support.max(), predicted.max()) == rows:
        return -1.0, 1.0
    others = rows - predicted
    product, square = (support * predicted).sum(), (predicted.astype(float) ** 2).sum()
    moved = []
    for limit in _rate_limits(counts, "recall"):
        x = np.where(support > 0, correct - limit * support, 0.0)  # rows predicted elsewhere
        share = x / others
        products = product - support * x + (product - support * predicted) * share
        squares = (predicted - x) ** 2 + (square - predicted**2) * (1 + share) ** 2
        covariance = (correct.sum() - x) * rows - products
        spread = (rows**2 - squares) * (rows**2 - (support**2).sum())
        moved.append(covariance / np.sqrt(np.maximum(spread, 1e-9)))
    return mover_interval(
        value, np.maximum(value - moved[0], 0.0), np.maximum(moved[1] - value, 0.0)
    )


def ece_limits(count: Ints, confidence_sum: Floats, correct: Ints) -> Interval:
    """95% interval of the expected calibration error: each bin's accuracy at its Wilson limits.

    Parameters
    ----------
    count, confidence_sum, correct : ndarray, shape (B,)
        Rows of each bin, the sum of their confidences, and their correct predictions.

    Returns
    -------
    tuple of float
        Lower and upper end. The lower one is reduced by the error that a calibrated model shows by
        chance, by which the measured error is too high.

    Examples
    --------
    >>> low, high = ece_limits(np.array([100]), np.array([80.0]), np.array([60]))
    >>> round(low, 3), round(high, 3)
    (0.077, 0.298)
    """
    used = count > 0
    mean, share = confidence_sum[used] / count[used], count[used] / count.sum()
    gap = np.abs(mean - correct[used] / count[used])
    nearest, farthest = _compute_gap_limits(mean, *wilson_limits(correct[used], count[used]))
    low, high = mover_interval(
        float((share * gap).sum()), share * (gap - nearest), share * (farthest - gap)
    )
    return low - ece_by_chance(count, confidence_sum), high


def mce_limits(
    count: Ints, confidence_sum: Floats, correct: Ints, min_share: float = 0.01
) -> Interval:
    """95% interval of the maximum calibration error, with limits that hold for all bins at once.

    Parameters
    ----------
    count, confidence_sum, correct : ndarray, shape (B,)
        Rows of each bin, the sum of their confidences, and their correct predictions.
    min_share : float, default 0.01
        Bins with a smaller share of all rows are ignored, as in `calibration.mce_from_bins`.

    Returns
    -------
    tuple of float
        Lower and upper end (Bonferroni correction for the number of bins).

    Examples
    --------
    >>> low, high = mce_limits(np.array([100]), np.array([80.0]), np.array([60]))
    >>> round(low, 3), round(high, 3)
    (0.109, 0.298)
    """
    used = count > 0
    mean, share = confidence_sum[used] / count[used], count[used] / count.sum()
    counted = share >= min_share
    counted = counted if counted.any() else share > 0
    z = NormalDist().inv_cdf(1 - 0.025 / int(counted.sum()))
    lower, upper = wilson_limits(correct[used][counted], count[used][counted], z)
    nearest, farthest = _compute_gap_limits(mean[counted], lower, upper)
    return float(nearest.max()), float(farthest.max())


def _compute_gap_limits(mean: Floats, lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest distance of each mean from an accuracy within its limits."""
    nearest = np.maximum(np.maximum(lower - mean, mean - upper), 0.0)
    return nearest, np.maximum(np.abs(mean - lower), np.abs(upper - mean))
