"""Agreement of labels and predictions, and of annotators.

Matthews correlation, Cohen's kappa and McNemar's test work on per-class row counts, so that the
cost grows with the number of classes C, not with C * C. Krippendorff's alpha compares any number of
annotators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgcls.metrics.intervals import Z_95

MAX_EXACT_ROWS = 10_000
"""Up to this number of discordant rows, McNemar's p-value is the exact binomial one."""


def matthews_correlation(support: NDArray[Any], predicted: NDArray[Any], correct: float) -> float:
    """Matthews correlation coefficient of a confusion matrix.

    Parameters
    ----------
    support : ndarray, shape (C,)
        Rows by label.
    predicted : ndarray, shape (C,)
        Rows by predicted class.
    correct : float
        Rows on the diagonal of the confusion matrix.

    Returns
    -------
    float
        Value in [-1, 1]; 0 if it is undefined because all labels or all predictions are one class.

    Notes
    -----
    Multiclass definition of Gorodkin, Computational Biology and Chemistry 28 (2004); equal to
    scikit-learn's `matthews_corrcoef`.

    Examples
    --------
    >>> matthews_correlation(np.array([2, 2]), np.array([2, 2]), correct=4)
    1.0
    >>> matthews_correlation(np.array([2, 2]), np.array([2, 2]), correct=2)
    0.0
    """
    # as floats: in int64 the product of two squares overflows above 55,000 rows
    support, predicted = support.astype(np.float64), predicted.astype(np.float64)
    rows = support.sum()
    covariance = correct * rows - (support * predicted).sum()
    spread = (rows**2 - (predicted**2).sum()) * (rows**2 - (support**2).sum())
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def cohens_kappa(support: NDArray[Any], predicted: NDArray[Any], correct: float) -> float | None:
    """Cohen's kappa: agreement of label and prediction beyond chance.

    Parameters
    ----------
    support : ndarray, shape (C,)
        Rows by label.
    predicted : ndarray, shape (C,)
        Rows by predicted class.
    correct : float
        Rows on the diagonal of the confusion matrix.

    Returns
    -------
    float or None
        Value in [-1, 1]. None if all rows have one class as label and prediction: the agreement by
        chance is then 1 and kappa undefined.

    Notes
    -----
    Cohen, Educational and Psychological Measurement 20 (1960); equal to scikit-learn's
    `cohen_kappa_score` without weights.

    Examples
    --------
    >>> cohens_kappa(np.array([2, 2]), np.array([2, 2]), correct=3)
    0.5
    """
    support, predicted = support.astype(np.float64), predicted.astype(np.float64)
    rows = support.sum()
    chance = (support * predicted).sum() / rows**2
    return float((correct / rows - chance) / (1 - chance)) if chance < 1 else None


def krippendorffs_alpha(
    units: NDArray[Any],
    values: NDArray[Any],
    distances: Callable[[int], NDArray[Any]] | None = None,
) -> float | None:
    """Krippendorff's alpha: agreement of any number of annotators beyond chance.

    Parameters
    ----------
    units : ndarray of int, shape (N,)
        The image of each of N decisions. Images with one decision are left out.
    values : ndarray of int, shape (N,)
        What was decided, from 0 to V - 1.
    distances : callable, optional
        Returns the distances of a value to all V values, shape (V,). Default: nominal, 0 or 1.

    Returns
    -------
    float or None
        1 where all agree, 0 for agreement by chance, negative below it. None if no image has two
        decisions, or all decisions are the same: the disagreement by chance is then 0.

    Notes
    -----
    Krippendorff, Computing Krippendorff's Alpha-Reliability (2011).

    Examples
    --------
    >>> krippendorffs_alpha(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]))
    1.0
    >>> round(krippendorffs_alpha(np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 0, 1])), 3)
    0.444
    """
    _, units, sizes = np.unique(units, return_inverse=True, return_counts=True)
    is_paired = sizes[units] > 1
    if not is_paired.any():
        return None
    _, units, sizes = np.unique(units[is_paired], return_inverse=True, return_counts=True)
    kinds, values = np.unique(values[is_paired], return_inverse=True)
    total = len(values)
    counts = np.bincount(values, minlength=len(kinds)).astype(np.float64)
    weights = 1.0 / (sizes[units] - 1)
    if distances is None:
        expected = (total**2 - float((counts**2).sum())) / (total * (total - 1))
        cells, same = np.unique(units * len(kinds) + values, return_counts=True)
        apart = sizes.astype(np.float64) ** 2
        np.subtract.at(apart, cells // len(kinds), same.astype(np.float64) ** 2)
        observed = float((apart / (sizes - 1)).sum())
    else:
        first, second = _pair_decisions(units, sizes)
        order = np.argsort(values[first], kind="stable")
        first, second = first[order], second[order]
        ends = np.searchsorted(values[first], np.arange(len(kinds) + 1))
        expected = observed = 0.0
        for place, kind in enumerate(kinds.tolist()):
            row = distances(kind)[kinds]
            expected += float(counts[place] * (row @ counts)) / (total * (total - 1))
            pairs = slice(ends[place], ends[place + 1])
            observed += float(row[values[second[pairs]]] @ weights[first[pairs]])
    return None if expected == 0 else 1.0 - observed / total / expected


def _pair_decisions(
    units: NDArray[Any], sizes: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of all ordered pairs of decisions about one image, each with itself too.

    units: (N,) the image of each decision, from 0 to U - 1
    sizes: (U,) decisions of each image
    """
    order = np.argsort(units, kind="stable")
    counts = sizes[units[order]]
    starts = (np.cumsum(sizes) - sizes)[units[order]]
    first = np.repeat(order, counts)
    offsets = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    return first, order[np.repeat(starts, counts) + offsets]


@dataclass(frozen=True)
class PairedComparison:
    """Accuracy of two models, A and B, on the same rows.

    Attributes
    ----------
    rows : int
        Rows compared.
    only_a, only_b : int
        Rows that only A, or only B, predicts correctly (discordant rows).
    difference : float
        Accuracy of B minus accuracy of A, a fraction in [-1, 1].
    lower, upper : float
        95% interval of the difference.
    p_value : float
        McNemar's p-value: the probability of a split of the discordant rows that is at least as
        unequal if both models are equally accurate.
    """

    rows: int
    only_a: int
    only_b: int
    difference: float
    lower: float
    upper: float
    p_value: float


def mcnemar_test(rows: int, only_a: int, only_b: int) -> PairedComparison:
    """McNemar's test: compare two models by the rows that only one of them predicts correctly.

    Parameters
    ----------
    rows : int
        Rows with a prediction of both models and a label.
    only_a, only_b : int
        Rows that only A, or only B, predicts correctly.

    Returns
    -------
    PairedComparison
        The difference of the accuracies with its 95% interval, and the p-value.

    Raises
    ------
    ValueError
        If `rows` is not positive.

    Notes
    -----
    The p-value is the exact two-sided binomial one; with more than 10,000 discordant rows it is the
    chi-squared one with continuity correction (McNemar, Psychometrika 12, 1947). The interval is
    the adjusted Wald interval of Agresti and Min, Statistics in Medicine 24 (2005).

    Examples
    --------
    >>> test = mcnemar_test(rows=100, only_a=2, only_b=10)
    >>> test.difference
    0.08
    >>> round(test.p_value, 4)
    0.0386
    """
    if rows <= 0:
        raise ValueError("no row has a label and a prediction of both models")
    split = only_a + only_b
    if split == 0:
        p_value = 1.0
    elif split <= MAX_EXACT_ROWS:
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


def _binomial_tail(max_heads: int, trials: int) -> float:
    """Probability of at most `max_heads` heads in `trials` tosses of a fair coin."""
    heads = np.arange(max_heads + 1)
    choose = np.array(
        [math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in heads]
    )
    return float(np.exp(choose - trials * math.log(2)).sum())
