"""95 % intervals of counted numbers, possible and wide enough where all rows or none are right.

A bootstrap alone cannot see errors that did not happen: of 20 rows that are all right every
resample is all right, and the interval has no width. Where that matters, its interval is joined
with one that follows from Wilson limits (`limits` has those of each metric).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
"""Standard deviations around the mean that hold 95 % of a normal distribution."""


def wilson_interval(correct: float, rows: int, z: float = Z_95) -> tuple[float, float]:
    """Where the true share lies, with the confidence of `z`, when `correct` of `rows` were counted.

    Returns fractions in [0, 1]; (0, 1) for no rows. Unlike the textbook's normal interval it never
    leaves [0, 1], and 100 of 100 does not make it certainty.
    Source: Wilson, Journal of the American Statistical Association 22 (1927).
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
    """`wilson_interval` of many shares at once: (C,) lower and (C,) upper limits."""
    known = np.maximum(rows, 1)
    share, weight = correct / known, z * z / known
    middle = share + weight / 2
    spread = z * np.sqrt(share * (1 - share) / known + weight / (4 * known))
    lower = np.clip((middle - spread) / (1 + weight), 0.0, share)
    upper = np.clip((middle + spread) / (1 + weight), share, 1.0)
    return np.where(rows > 0, lower, 0.0), np.where(rows > 0, upper, 1.0)


def mover_interval(
    value: float, below: NDArray[np.float64], above: NDArray[np.float64]
) -> tuple[float, float]:
    """Interval of a number that depends on C independent shares, from what each alone can move.

    below, above: (C,) how far the number falls and rises when one share goes to its own limits
    Source: the method of variance estimates recovery (MOVER), Zou, Huang, Zhang, Computational
    Statistics & Data Analysis 53 (2009), for linear functions of shares with Wilson limits.
    """
    return value - float(np.sqrt((below**2).sum())), value + float(np.sqrt((above**2).sum()))


def nonnegative_mean_interval(
    total: float, square_total: float, rows: int, worst: float
) -> tuple[float, float]:
    """95 % interval of the mean of N > 0 values of at least 0, from their sum and sum of squares.

    worst: what a row costs of a kind that was not seen
    The normal interval of the log of the mean, which is never negative, is widened to what z^2
    more rows would give, all of them 0 or all of them `worst`: the limits that Wilson's interval
    has for a share of 0 or 1. So values that are all equal, or just one, are no certainty.
    """
    mean, more = total / rows, Z_95**2
    spread = math.sqrt(max(0.0, square_total / rows - mean**2) / rows)
    factor = math.exp(min(Z_95 * spread / mean, 50.0)) if mean > 0 else 1.0
    unseen = (total + more * max(worst, mean)) / (rows + more)
    return min(mean / factor, total / (rows + more)), max(mean * factor, unseen)


def auroc_limits(
    auroc: NDArray[np.float64], positives: NDArray[Any], negatives: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % limits of (C,) areas under ROC curves, given the rows of each class and of the others.

    Solves |true - auroc| = z * sqrt(V(true)), so that an area of 1 has a lower limit too.
    Source: Newcombe, Statistics in Medicine 25 (2006) 559-573, method 5.
    """
    both = (positives + negatives) / 2 - 1

    def excess(true: NDArray[np.float64]) -> NDArray[np.float64]:
        more = 1 + both * ((1 - true) / (2 - true) + true / (1 + true))
        variance = true * (1 - true) * more / (positives * negatives)
        return np.abs(true - auroc) - Z_95 * np.sqrt(variance)

    ends = []
    for outer in (np.zeros_like(auroc), np.ones_like(auroc)):
        far, near = outer, auroc.copy()  # `far` is outside of the interval, `near` within
        for _ in range(50):
            middle = (far + near) / 2
            outside = excess(middle) > 0
            far, near = np.where(outside, middle, far), np.where(outside, near, middle)
        ends.append(near)
    return ends[0], ends[1]


def bootstrap_intervals(
    counts: Sequence[NDArray[np.int64]],
    statistics: Callable[..., dict[str, float]],
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % intervals of whatever follows from counts of independent rows.

    counts:     arrays of cell counts; each resample draws every cell anew from a Poisson
                distribution around it, which for many rows is drawing the rows with replacement
    statistics: called with the resampled arrays; what it returns may lack a name now and then
    Returns, by name, what follows from the counts themselves, less and more 1.96 times its standard
    deviation over resamples: percentiles would be off where few rows of many classes bend the
    statistic itself. The same counts give the same intervals.
    Source: Efron, Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 12; the Poisson
    form after Chamandy et al., "Estimating Uncertainty for Massive Data Streams" (2012).
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


def union_interval(
    *intervals: tuple[float, float] | None, low: float, high: float
) -> tuple[float, float] | None:
    """The interval that holds all of these, within what can be; None when the first is None."""
    known = [each for each in intervals if each is not None]
    if not intervals or intervals[0] is None:
        return None
    return max(low, min(each[0] for each in known)), min(high, max(each[1] for each in known))
