"""Calibration error of confidences: equal-width bins, expected and maximum calibration error.

Every confidence histogram of imgcls uses the binning rule of this module, so a table of bins and a
single number never disagree. Fitting a temperature is in `imgcls.evaluation.calibrate`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING_TOLERANCE = 2e-3
"""Largest accepted excess over 1: a float32 softmax may exceed 1 by rounding, float16 by 1e-3."""


def bin_edges(num_bins: int) -> NDArray[np.float64]:
    """Edges of equal-width confidence bins over [0, 1].

    Parameters
    ----------
    num_bins : int
        Number of bins, at least 1.

    Returns
    -------
    ndarray of float64, shape (num_bins + 1,)

    Raises
    ------
    ValueError
        If `num_bins` is below 1.

    Examples
    --------
    >>> bin_edges(4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; pass at least 1 bin")
    return np.linspace(0.0, 1.0, num_bins + 1)


def bin_index(confidence: NDArray[Any], num_bins: int) -> NDArray[np.int64]:
    """Index of the bin of each confidence.

    Bins are [lower, upper), the last one is [lower, 1], as in `numpy.histogram`.

    Parameters
    ----------
    confidence : ndarray of float, shape (N,)
        Confidences in [0, 1].
    num_bins : int
        Number of bins.

    Returns
    -------
    ndarray of int64, shape (N,)
        Values in [0, num_bins).

    Raises
    ------
    ValueError
        If a confidence is NaN or outside [0, 1] by more than rounding.

    Examples
    --------
    >>> bin_index(np.array([0.0, 0.25, 0.9, 1.0]), 4).tolist()
    [0, 1, 3, 3]
    """
    inner = bin_edges(num_bins)[1:-1]
    values = np.asarray(confidence, dtype=np.float64)
    if values.size and not (
        values.min() >= -ROUNDING_TOLERANCE and values.max() <= 1 + ROUNDING_TOLERANCE
    ):
        raise ValueError(
            f"confidence ranges over [{values.min()}, {values.max()}], expected [0, 1] without NaN;"
            " pass softmax scores, not logits"
        )
    # Compared with the published edges rather than floor(confidence * num_bins), whose rounding
    # puts some values on an edge into the bin below it.
    return np.searchsorted(inner, values, side="right").astype(np.int64, copy=False)


def expected_calibration_error(
    confidence: NDArray[Any], correct: NDArray[Any], num_bins: int = 15
) -> float:
    """Expected calibration error (ECE): mean gap of confidence and accuracy, weighted by bin size.

    Parameters
    ----------
    confidence : ndarray of float, shape (N,)
        Score of the predicted class, in [0, 1].
    correct : ndarray of bool, shape (N,)
        Whether each prediction is correct.
    num_bins : int, default 15
        Number of equal-width bins.

    Returns
    -------
    float
        Fraction in [0, 1]; 0.03 means that confidence and accuracy differ by 3 points on average.

    Raises
    ------
    ValueError
        If N is 0, the shapes differ, or a confidence is not in [0, 1].

    Notes
    -----
    Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015.

    Examples
    --------
    >>> expected_calibration_error(np.array([0.75, 0.75]), np.array([True, False]))
    0.25
    """
    scores = np.asarray(confidence, dtype=np.float64)
    hits = np.asarray(correct, dtype=bool)
    if scores.ndim != 1 or scores.shape != hits.shape:
        raise ValueError(
            f"confidence has shape {scores.shape} and correct {hits.shape}; both must be (N,)"
        )
    bins = bin_index(scores, num_bins)
    return ece_from_bins(
        count=np.bincount(bins, minlength=num_bins),
        confidence_sum=np.bincount(bins, weights=scores, minlength=num_bins),
        correct=np.bincount(bins[hits], minlength=num_bins),
    )


def ece_from_bins(
    count: NDArray[Any], confidence_sum: NDArray[Any], correct: NDArray[Any]
) -> float:
    """Expected calibration error from per-bin sums, which merge exactly where means do not.

    Parameters
    ----------
    count : ndarray of int, shape (B,)
        Predictions in each bin.
    confidence_sum : ndarray of float, shape (B,)
        Sum of their confidences.
    correct : ndarray of int, shape (B,)
        Correct predictions in each bin.

    Returns
    -------
    float
        Fraction in [0, 1].

    Raises
    ------
    ValueError
        If there is no prediction.

    Notes
    -----
    Each bin contributes count/N * |mean confidence - accuracy|, which is
    |confidence_sum - correct| / N, so an empty bin needs no special case.

    Examples
    --------
    >>> ece_from_bins(np.array([0, 4]), np.array([0.0, 3.0]), np.array([0, 2]))
    0.25
    """
    total = _count_predictions(count)
    return float(np.abs(np.asarray(confidence_sum) - np.asarray(correct)).sum() / total)


def mce_from_bins(
    count: NDArray[Any],
    confidence_sum: NDArray[Any],
    correct: NDArray[Any],
    min_share: float = 0.01,
) -> float:
    """Maximum calibration error: largest gap between mean confidence and accuracy of a bin.

    Parameters
    ----------
    count, confidence_sum, correct : ndarray, shape (B,)
        As for `ece_from_bins`.
    min_share : float, default 0.01
        Bins with a smaller share of all predictions are ignored, because the gap of a few rows is
        mostly chance. If every bin is smaller, all bins with a prediction are used.

    Returns
    -------
    float
        Fraction in [0, 1].

    Raises
    ------
    ValueError
        If there is no prediction.

    Notes
    -----
    Naeini et al., AAAI 2015, except for `min_share`.

    Examples
    --------
    >>> mce_from_bins(np.array([2, 2]), np.array([1.0, 1.5]), np.array([1, 2]))
    0.25
    """
    total = _count_predictions(count)
    count = np.asarray(count, dtype=np.float64)
    gap = np.abs(np.asarray(confidence_sum) - np.asarray(correct)) / np.maximum(count, 1)
    large = count >= min_share * total
    return float(gap[large if large.any() else count > 0].max())


def ece_by_chance(count: NDArray[Any], confidence_sum: NDArray[Any]) -> float:
    """Expected calibration error of a perfectly calibrated model on this number of rows.

    A measured error close to this value is no evidence of miscalibration.

    Parameters
    ----------
    count, confidence_sum : ndarray, shape (B,)
        As for `ece_from_bins`.

    Returns
    -------
    float
        Fraction in [0, 1].

    Raises
    ------
    ValueError
        If there is no prediction.

    Notes
    -----
    The number of correct predictions of a bin is binomial around its confidence; its mean distance
    from there is sqrt(2 n p (1 - p) / pi) for many rows. This is the bias of the estimate in
    Roelofs et al., "Mitigating Bias in Calibration Error Estimation", AISTATS 2022, here by the
    normal approximation.

    Examples
    --------
    >>> round(ece_by_chance(np.array([100]), np.array([50.0])), 4)
    0.0399
    """
    total = _count_predictions(count)
    count = np.asarray(count, dtype=np.float64)
    mean = np.clip(np.asarray(confidence_sum) / np.maximum(count, 1), 0.0, 1.0)
    return float(np.sqrt(2 / np.pi * count * mean * (1 - mean)).sum() / total)


def _count_predictions(count: NDArray[Any]) -> float:
    total = float(np.sum(count))
    if total == 0:
        raise ValueError("the calibration error is undefined without predictions")
    return total
