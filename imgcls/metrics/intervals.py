"""95% confidence intervals of counted numbers, with a width even if all rows are correct.

A bootstrap alone gives no width if every row is correct, because every resample is correct too.
Its interval is therefore united with one that follows from Wilson limits (see `limits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
"""Lower and upper end of a 95% interval."""

Z_95 = 1.959963984540054
"""Standard deviations around the mean that contain 95% of a normal distribution."""


def wilson_interval(correct: float, rows: float, z: float = Z_95) -> Interval:
    """Wilson score interval of a share: `correct` of `rows`.

    Parameters
    ----------
    correct : float
        Rows counted, 0 to `rows`.
    rows : float
        All rows; not an integer if it is an effective number of rows.
    z : float, default 1.96
        Standard normal quantile of the confidence level.

    Returns
    -------
    tuple of float
        Lower and upper limit, fractions in [0, 1]; (0, 1) for no rows.

    Notes
    -----
    Unlike the normal interval it never leaves [0, 1] and has a width for 0 and 100%. Wilson,
    Journal of the American Statistical Association 22 (1927).

    Examples
    --------
    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    if rows <= 0:
        return 0.0, 1.0
    share, weight = correct / rows, z * z / rows
    middle = share + weight / 2
    spread = z * math.sqrt(share * (1 - share) / rows + weight / (4 * rows))
    low, high = (middle - spread) / (1 + weight), (middle + spread) / (1 + weight)
    return min(max(0.0, low), share), max(min(1.0, high), share)  # a share of 0 or 1 by rounding


def wilson_limits(
    correct: NDArray[Any], rows: NDArray[Any], z: float = Z_95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wilson score intervals of many shares at once.

    Parameters
    ----------
    correct, rows : ndarray, shape (C,)
        Rows counted, and all rows, of each share.
    z : float, default 1.96
        Standard normal quantile of the confidence level.

    Returns
    -------
    lower, upper : ndarray of float64, shape (C,)
        Fractions in [0, 1]; 0 and 1 for a share without rows.

    Examples
    --------
    >>> lower, upper = wilson_limits(np.array([90, 0]), np.array([100, 0]))
    >>> lower.round(3).tolist(), upper.round(3).tolist()
    ([0.826, 0.0], [0.945, 1.0])
    """
    known = np.maximum(rows, 1)
    share, weight = correct / known, z * z / known
    middle = share + weight / 2
    spread = z * np.sqrt(share * (1 - share) / known + weight / (4 * known))
    lower = np.clip((middle - spread) / (1 + weight), 0.0, share)
    upper = np.clip((middle + spread) / (1 + weight), share, 1.0)
    return np.where(rows > 0, lower, 0.0), np.where(rows > 0, upper, 1.0)


def mover_interval(
    value: float, below: NDArray[np.float64], above: NDArray[np.float64]
) -> Interval:
    """Interval of a number that depends on C independent shares.

    Parameters
    ----------
    value : float
        The number.
    below, above : ndarray of float64, shape (C,)
        Decrease and increase of the number if one share moves to its own limit.

    Returns
    -------
    tuple of float
        Lower and upper end.

    Notes
    -----
    Method of variance estimates recovery (MOVER): Zou, Huang, Zhang, Computational Statistics &
    Data Analysis 53 (2009), for linear functions of shares with Wilson limits.

    Examples
    --------
    >>> mover_interval(0.5, np.array([0.3, 0.4]), np.array([0.0, 0.1]))
    (0.0, 0.6)
    """
    return value - float(np.sqrt((below**2).sum())), value + float(np.sqrt((above**2).sum()))


def nonnegative_mean_interval(
    total: float, square_total: float, rows: int, worst: float
) -> Interval:
    """95% interval of the mean of N values that are at least 0.

    Parameters
    ----------
    total, square_total : float
        Sum of the values and of their squares.
    rows : int
        Number of values N, positive.
    worst : float
        Value of a kind of row that may exist but was not seen.

    Returns
    -------
    tuple of float
        Lower and upper end.

    Notes
    -----
    Normal interval of the logarithm of the mean, widened to the mean with z^2 more rows, all of
    them 0 or all of them `worst`: the limits that Wilson's interval has for a share of 0 or 1. The
    interval therefore has a width for equal values and for a single one.

    Examples
    --------
    >>> low, high = nonnegative_mean_interval(total=20.0, square_total=30.0, rows=100, worst=2.0)
    >>> round(low, 3), round(high, 3)
    (0.121, 0.33)
    """
    mean, more = total / rows, Z_95**2
    spread = math.sqrt(max(0.0, square_total / rows - mean**2) / rows)
    factor = math.exp(min(Z_95 * spread / mean, 50.0)) if mean > 0 else 1.0
    unseen = (total + more * max(worst, mean)) / (rows + more)
    return min(mean / factor, total / (rows + more)), max(mean * factor, unseen)


def auroc_limits(
    auroc: NDArray[np.float64], positives: NDArray[Any], negatives: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95% limits of areas under ROC curves.

    Parameters
    ----------
    auroc : ndarray of float64, shape (C,)
        Areas in [0, 1].
    positives, negatives : ndarray, shape (C,)
        Rows of each class, and of all others.

    Returns
    -------
    lower, upper : ndarray of float64, shape (C,)

    Notes
    -----
    Solves |true - auroc| = z * sqrt(V(true)), so an area of 1 has a lower limit too. Newcombe,
    Statistics in Medicine 25 (2006) 559-573, method 5.

    Examples
    --------
    >>> lower, upper = auroc_limits(np.array([0.9, 1.0]), np.array([50, 50]), np.array([50, 50]))
    >>> lower.round(2).tolist(), upper.round(2).tolist()
    ([0.82, 0.96], [0.95, 1.0])
    """
    both = (positives + negatives) / 2 - 1

    def compute_excess(true: NDArray[np.float64]) -> NDArray[np.float64]:
        more = 1 + both * ((1 - true) / (2 - true) + true / (1 + true))
        variance = true * (1 - true) * more / (positives * negatives)
        excess: NDArray[np.float64] = np.abs(true - auroc) - Z_95 * np.sqrt(variance)
        return excess

    ends = []
    for outer in (np.zeros_like(auroc), np.ones_like(auroc)):
        far, near = outer, auroc.copy()  # `far` is outside of the interval, `near` within
        for _ in range(50):
            middle = (far + near) / 2
            outside = compute_excess(middle) > 0
            far, near = np.where(outside, middle, far), np.where(outside, near, middle)
        ends.append(near)
    return ends[0], ends[1]


def bootstrap_intervals(
    counts: Sequence[NDArray[np.int64]],
    statistics: Callable[..., dict[str, float]],
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Interval]:
    """95% bootstrap intervals of statistics of counted, independent rows.

    Parameters
    ----------
    counts : sequence of ndarray of int64
        Arrays of cell counts. Each resample draws every cell from a Poisson distribution around its
        count, which for many rows is sampling the rows with replacement.
    statistics : callable
        Called with the resampled arrays; returns values by name. A name may be missing in some
        resamples.
    resamples : int, default 200
        Number of resamples; 0 returns no intervals.
    seed : int, default 0
        Seed of the resamples: the same counts give the same intervals.

    Returns
    -------
    dict of str to tuple of float
        By name: the statistic of the counts themselves, minus and plus 1.96 standard deviations
        over the resamples. Percentiles would be biased where many classes have few rows.

    Notes
    -----
    Efron, Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 12; Poisson form of
    Chamandy et al., "Estimating Uncertainty for Massive Data Streams" (2012).

    Examples
    --------
    >>> def share(cells):
    ...     return {"accuracy": cells[1] / cells.sum()}
    >>> low, high = bootstrap_intervals([np.array([10, 90])], share)["accuracy"]
    >>> bool(0.8 < low < 0.9 < high < 1.0)
    True
    """
    if not resamples:
        return {}
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        for name, value in statistics(*(rng.poisson(cells) for cells in counts)).items():
            drawn.setdefault(name, []).append(value)
    found = statistics(*counts)
    spread = {name: Z_95 * float(np.std(drawn[name])) for name in found if name in drawn}
    return {name: (found[name] - wide, found[name] + wide) for name, wide in spread.items()}


def union_interval(*intervals: Interval | None, low: float, high: float) -> Interval | None:
    """Smallest interval that contains all given ones, clipped to the possible range.

    Parameters
    ----------
    *intervals : tuple of float or None
        Intervals; None is ignored except in first place.
    low, high : float
        Smallest and largest possible value.

    Returns
    -------
    tuple of float or None
        None if the first interval is None.

    Examples
    --------
    >>> union_interval((0.9, 1.02), (0.8, 0.95), low=0.0, high=1.0)
    (0.8, 1.0)
    """
    known = [each for each in intervals if each is not None]
    if not intervals or intervals[0] is None:
        return None
    return max(low, min(each[0] for each in known)), min(high, max(each[1] for each in known))
