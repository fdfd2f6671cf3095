"""Single numbers for a whole confusion matrix, and tests for two models on the same rows.

Works on the non-zero cells alone, so that a thousand classes cost no million cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgcls.metrics.intervals import Z_95


def matthews_correlation(support: NDArray[Any], predicted: NDArray[Any], correct: float) -> float:
    """Matthews correlation coefficient, in [-1, 1]; 0 where it is undefined.

    support, predicted: (C,) rows by label and by prediction; correct: rows on the diagonal
    Source: Gorodkin, Computational Biology and Chemistry 28 (2004); as sklearn's matthews_corrcoef.
    """
    # as floats: in int64 the product of two squares overflows above 55,000 rows
    support, predicted = support.astype(np.float64), predicted.astype(np.float64)
    rows = support.sum()
    covariance = correct * rows - (support * predicted).sum()
    spread = (rows**2 - (predicted**2).sum()) * (rows**2 - (support**2).sum())
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def cohens_kappa(support: NDArray[Any], predicted: NDArray[Any], correct: float) -> float | None:
    """Agreement beyond chance, in [-1, 1]; None where all rows are of one class, rightly.

    Source: Cohen, Educational and Psychological Measurement 20 (1960); as sklearn's
    cohen_kappa_score without weights.
    """
    support, predicted = support.astype(np.float64), predicted.astype(np.float64)
    rows = support.sum()
    chance = (support * predicted).sum() / rows**2
    return float((correct / rows - chance) / (1 - chance)) if chance < 1 else None


@dataclass(frozen=True)
class PairedComparison:
    """Two models judged on the same rows.

    only_a, only_b: rows that one of them alone gets right
    difference:     accuracy of b less that of a, with its 95 % interval
    p_value:        McNemar's: the chance of so unequal a split if neither were better
    """

    rows: int
    only_a: int
    only_b: int
    difference: float
    lower: float
    upper: float
    p_value: float


def mcnemar_test(rows: int, only_a: int, only_b: int) -> PairedComparison:
    """Compare two models by the rows on which just one is right.

    The p-value is the exact two-sided binomial one; above 10,000 such rows the chi-squared one with
    continuity correction. The interval is Agresti and Min's adjusted Wald interval (Statistics in
    Medicine 24, 2005).
    Raises ValueError for no rows.
    Source: McNemar, Psychometrika 12 (1947).
    """
    if rows <= 0:
        raise ValueError("no row has a label and a prediction of both")
    split = only_a + only_b
    if split == 0:
        p_value = 1.0
    elif split <= 10_000:
        p_value = min(1.0, 2 * _binomial_tail(min(only_a, only_b), split))
    else:
        z = max(0.0, abs(only_a - only_b) - 1) / math.sqrt(split)
        p_value = math.erfc(z / math.sqrt(2))
    a, b, n = only_a + 0.5, only_b + 0.5, rows + 2
    middle = (b - a) / n
    spread = Z_95 * math.sqrt(max(0.0, a + b - (b - a) ** 2 / n)) / n
    difference = (only_b - only_a) / rows
    return PairedComparison(
        rows,
        only_a,
        only_b,
        difference,
        max(-1.0, min(middle - spread, difference)),
        min(1.0, max(middle + spread, difference)),
        p_value,
    )


def _binomial_tail(most: int, trials: int) -> float:
    """Chance of at most so many heads of a fair coin."""
    heads = np.arange(most + 1)
    choose = np.array(
        [math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in heads]
    )
    return float(np.exp(choose - trials * math.log(2)).sum())
