"""How far a number that was counted may be from the true one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    return max(0.0, (middle - spread) / (1 + weight)), min(1.0, (middle + spread) / (1 + weight))


def mean_interval(total: float, square_total: float, rows: int) -> tuple[float, float]:
    """95 % interval of a mean from the sum of N values and the sum of their squares (N > 0)."""
    mean = total / rows
    spread = Z_95 * math.sqrt(max(0.0, square_total / rows - mean**2) / rows)
    return mean - spread, mean + spread


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


def clipped(
    interval: tuple[float, float] | None, low: float, high: float
) -> tuple[float, float] | None:
    """An interval without what cannot be."""
    return interval and (max(low, interval[0]), min(high, interval[1]))
