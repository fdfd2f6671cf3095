"""How far a share that was counted may be from the true one."""

from __future__ import annotations

import math

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
