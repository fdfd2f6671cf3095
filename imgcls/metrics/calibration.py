"""How far confidence can be trusted: equal-width bins and the expected calibration error.

Owns the one binning rule that every confidence histogram in imgcls follows, so that a table of
bins and a single number computed elsewhere never disagree. Fitting a temperature is left to
training; this module only measures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# A float32 softmax may exceed 1 by a rounding error, and a float16 one by about 1e-3; anything
# further out is not a probability.
ROUNDING_TOLERANCE = 2e-3


def bin_edges(num_bins: int) -> NDArray[np.float64]:
    """The (num_bins + 1,) float64 edges of equal-width bins over [0, 1].

    Raises ValueError when num_bins is below 1.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; calibration needs at least 1 bin")
    return np.linspace(0.0, 1.0, num_bins + 1)


def bin_index(confidence: NDArray[Any], num_bins: int) -> NDArray[np.int64]:
    """The bin of each confidence: bins are [lower, upper), the last one [lower, 1].

    confidence: (N,) float in [0, 1]
    Returns (N,) int64 in [0, num_bins). A confidence of exactly 1.0 falls in the last bin and one
    of exactly 0.0 in the first; this is the convention of numpy.histogram.
    Raises ValueError for a NaN, or a value outside [0, 1] by more than rounding.
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
    # Compared with the edges that are published rather than floor(confidence * num_bins), whose
    # rounding puts some values on an edge into the bin below it.
    return np.searchsorted(inner, values, side="right").astype(np.int64, copy=False)


def expected_calibration_error(
    confidence: NDArray[Any], correct: NDArray[Any], num_bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by bin size.

    confidence: (N,) float in [0, 1], the score of the predicted class
    correct:    (N,) bool
    Returns a fraction in [0, 1]; 0.03 means three points off on average.
    Raises ValueError when N is 0, the shapes differ, or a confidence is not in [0, 1].
    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning",
    AAAI 2015.
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

    count:          (B,) int, predictions in each bin
    confidence_sum: (B,) float, their confidences added up
    correct:        (B,) int, how many of them are right
    Returns a fraction in [0, 1]. Each bin contributes count/N * |mean confidence - accuracy|,
    which is |confidence_sum - correct| / N: an empty bin needs no special case.
    Raises ValueError when there is no prediction at all, for the error is then undefined.
    Source: Naeini et al., AAAI 2015.
    """
    total = int(np.sum(count))
    if total == 0:
        raise ValueError("the calibration error of no predictions is undefined")
    return float(np.abs(np.asarray(confidence_sum) - np.asarray(correct)).sum() / total)


def mce_from_bins(
    count: NDArray[Any],
    confidence_sum: NDArray[Any],
    correct: NDArray[Any],
    least_share: float = 0.01,
) -> float:
    """Largest gap between mean confidence and accuracy of a bin; arguments as for `ece_from_bins`.

    least_share: bins with a smaller share of all predictions are passed over, whose few rows would
        make chance the largest error; a bin with any counts where none has as many
    Raises ValueError when there is no prediction at all.
    Source: Naeini et al., AAAI 2015, but for `least_share`.
    """
    count = np.asarray(count, dtype=np.float64)
    total = count.sum()
    if total == 0:
        raise ValueError("the calibration error of no predictions is undefined")
    gap = np.abs(np.asarray(confidence_sum) - np.asarray(correct)) / np.maximum(count, 1)
    told = count >= least_share * total
    return float(gap[told if told.any() else count > 0].max())


def ece_by_chance(count: NDArray[Any], confidence_sum: NDArray[Any]) -> float:
    """The calibration error that a calibrated model would show on as many rows, by chance alone.

    Arguments as for `ece_from_bins`. In each bin the number of right predictions is binomial around
    the confidence: its mean distance from there, sqrt(2 n p (1 - p) / pi) for many rows, is what no
    calibration can take away. An error near this one is no evidence of miscalibration.
    Raises ValueError when there is no prediction at all.
    Source: the bias of the estimate, as in Roelofs et al., "Mitigating Bias in Calibration Error
    Estimation", AISTATS 2022; here by the normal approximation.
    """
    count = np.asarray(count, dtype=np.float64)
    total = count.sum()
    if total == 0:
        raise ValueError("the calibration error of no predictions is undefined")
    mean = np.clip(np.asarray(confidence_sum) / np.maximum(count, 1), 0.0, 1.0)
    return float(np.sqrt(2 / np.pi * count * mean * (1 - mean)).sum() / total)
