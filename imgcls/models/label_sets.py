"""Conformal label sets: for each image, labels that include the true one with a given probability.

A label's nonconformity is the sum of the scores of the labels ranked above it. A set has the labels
whose nonconformity is at most a threshold, a quantile of the nonconformity of the true labels of
held-out rows. This is adaptive prediction sets (APS; Romano et al., NeurIPS 2020) without
randomization, and regularized (RAPS) with a rank penalty (Angelopoulos et al., ICLR 2021). The
label with the highest score is in every set. Coverage holds for images like the held-out ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

from imgcls.config import Section

FREE_RANKS = 5
"""Number of ranks without a penalty (k_reg of RAPS)."""
ALWAYS_INCLUDED = 1e9
"""Threshold of a class with too few held-out rows: it is in every set."""
_BLOCK_VALUES = 4_000_000


class LabelSets(Section):
    """Conformal label sets of a bundle."""

    coverage: Annotated[float, Field(gt=0, lt=1)]
    """Probability that a set includes the label."""
    thresholds: Annotated[list[FiniteFloat], Field(min_length=1)]
    """Maximum nonconformity of a label in a set: one for all classes, or one per class."""
    rank_penalty: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    """Added to the nonconformity for each rank beyond the fifth."""


def rank_nonconformity(
    scores: NDArray[np.float32], rank_penalty: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(N, C) class indices, best first, and the nonconformity of each; ties go to the lower index.

    scores: (N, C), which sum to 1

    Examples
    --------
    >>> order, values = rank_nonconformity(np.array([[0.25, 0.5, 0.25]], np.float32))
    >>> order.tolist(), values.tolist()
    ([[1, 0, 2]], [[0.0, 0.5, 0.75]])
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    values = np.zeros(scores.shape, np.float32)
    ranked = np.take_along_axis(scores, order, axis=1)
    np.cumsum(ranked[:, :-1], axis=1, out=values[:, 1:])
    if rank_penalty:
        beyond = np.maximum(np.arange(scores.shape[1]) + 1 - FREE_RANKS, 0)
        values += np.float32(rank_penalty) * beyond.astype(np.float32)
    return order, values


def compute_nonconformity(
    scores: NDArray[np.float32], codes: NDArray[np.int64], rank_penalty: float = 0.0
) -> NDArray[np.float32]:
    """(N,) nonconformity of the label of each row, by its class index."""
    found = np.empty(len(scores), np.float32)
    block = max(1, _BLOCK_VALUES // scores.shape[1])
    for start in range(0, len(scores), block):
        part = slice(start, start + block)
        order, values = rank_nonconformity(scores[part], rank_penalty)
        found[part] = values[order == codes[part, None]]
    return found


def choose_set_threshold(nonconformity: NDArray[np.float32], coverage: float) -> float | None:
    """The smallest threshold that gives this coverage; None for too few rows.

    The ceil((N + 1) * coverage)-th smallest of N values. Source: Angelopoulos and Bates, "A gentle
    introduction to conformal prediction", 2021, section 1.

    Examples
    --------
    >>> choose_set_threshold(np.arange(9, dtype=np.float32), 0.9)
    8.0
    >>> choose_set_threshold(np.arange(8, dtype=np.float32), 0.9) is None
    True
    """
    # rounded: 0.9 * 10 is 9, also in floating point
    rank = max(1, math.ceil(round((len(nonconformity) + 1) * coverage, 9)))
    if rank > len(nonconformity):
        return None
    return float(np.partition(nonconformity, rank - 1)[rank - 1])


def find_label_sets(
    scores: NDArray[np.float32], sets: LabelSets
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(N, C) class indices, best first, and whether each is in the set of its row."""
    order, values = rank_nonconformity(scores, sets.rank_penalty)
    thresholds = np.asarray(sets.thresholds, np.float32)
    limits = thresholds[order] if len(thresholds) > 1 else thresholds
    is_included = values <= limits
    is_included[:, :1] = True
    return order, is_included


def build_set_column(
    order: NDArray[np.int64], is_included: NDArray[np.bool_], classes: Sequence[str]
) -> pa.ListArray:
    """The column of label sets of N rows, best label first."""
    offsets = np.zeros(len(order) + 1, np.int32)
    np.cumsum(is_included.sum(1), out=offsets[1:])
    names = pa.array(classes, pa.string()).take(pa.array(order[is_included]))
    return pa.ListArray.from_arrays(pa.array(offsets), names)
