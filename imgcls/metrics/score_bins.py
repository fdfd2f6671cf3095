"""Bins of scores that follow the bits of float16: finer near 0, mergeable, exact if unshifted."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from imgcls.metrics.columns import Floats, Ints

ONE = 0x3C00
"""Bits of 1.0 in float16. The bits of positive float16 numbers increase with them."""
_SHIFT = 4


class ScoreBins(Protocol):
    """Scores of C classes in B bins, on rows of the class and on other rows."""

    @property
    def positive(self) -> Ints:
        """(C, B) scores of each class on its own rows."""

    @property
    def negative(self) -> Ints:
        """(C, B) scores of each class on the other rows."""


def compute_bin_shift(num_classes: int, max_exact: int) -> int:
    """Bits of a float16 that are dropped to get its bin; 0 up to `max_exact` classes."""
    return 0 if num_classes <= max_exact else _SHIFT


def count_bins(shift: int) -> int:
    """Number of bins of the scores in [0, 1]."""
    return (ONE >> shift) + 1


def is_exact(bins: ScoreBins) -> bool:
    """Whether each bin has a single float16 value."""
    return len(bins.positive.T) > ONE


def view_bits(scores: NDArray[np.float16]) -> NDArray[np.uint16]:
    """Bits of scores in [0, 1], possibly above 1 by rounding.

    Parameters
    ----------
    scores : ndarray of float16
        Scores.

    Returns
    -------
    ndarray of uint16
        A view of the scores. `numpy.minimum` with `ONE` removes the excess by rounding.

    Raises
    ------
    ValueError
        If a score is negative, NaN or above 1.

    Examples
    --------
    >>> view_bits(np.array([0.0, 0.5, 1.0], np.float16)).tolist()
    [0, 14336, 15360]
    """
    bits = scores.view(np.uint16)
    # the sign bit and NaN are above 1 too; a softmax exceeds 1 only by rounding
    if bits.size and int(bits.max()) > ONE + 2:
        raise ValueError("a score is outside [0, 1]; scores must be a softmax, not logits")
    return bits


def bin_lower_edges(num_bins: int) -> Floats:
    """Smallest score of each bin, shape (B,)."""
    shift = 0 if num_bins > ONE else _SHIFT
    return (np.arange(num_bins, dtype=np.uint16) << shift).view(np.float16).astype(np.float64)


def bin_values(num_bins: int) -> Floats:
    """Score that represents each bin, shape (B,): its only one, or its middle.

    Parameters
    ----------
    num_bins : int
        Number of bins B.

    Returns
    -------
    ndarray of float64, shape (B,)

    Examples
    --------
    >>> bin_values(count_bins(0))[[0, 0x3800, 0x3C00]].tolist()
    [0.0, 0.5, 1.0]
    """
    lower = bin_lower_edges(num_bins)
    if num_bins > ONE:
        return lower
    return np.append((lower[:-1] + lower[1:]) / 2, 1.0)


def coarsen(cells: Ints) -> Ints:
    """Merge exact bins, (C, B), to the bins of many classes; other bins are returned as they are.

    Parameters
    ----------
    cells : ndarray of int64, shape (C, B)
        Counts by bin.

    Returns
    -------
    ndarray of int64

    Examples
    --------
    >>> coarsen(np.ones((2, count_bins(0)), np.int64)).sum(axis=1).tolist()
    [15361, 15361]
    """
    if cells.shape[1] <= ONE:
        return cells
    return np.add.reduceat(cells, np.arange(0, cells.shape[1], 1 << _SHIFT), axis=1)
