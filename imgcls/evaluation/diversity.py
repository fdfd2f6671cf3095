"""Choice of rows that differ from each other, among the most uncertain ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from imgcls.metrics.columns import Ints

Vectors = NDArray[np.float32]

_TINY = 1e-6
"""Distance of equal rows, so that they can be chosen where `max_similarity` allows it."""


class ClassCap:
    """Counts chosen rows by group; a group that has reached the cap takes no more.

    groups: of each candidate, such as its predicted class
    cap:    None for no limit
    """

    def __init__(self, groups: Sequence[str], cap: int | None) -> None:
        self._groups, self._cap = groups, cap
        self._counts: Counter[str] = Counter()

    def has_room(self, row: int) -> bool:
        """Whether another row of this row's group may be chosen."""
        return self._cap is None or self._counts[self._groups[row]] < self._cap

    def add(self, row: int) -> None:
        """Count a chosen row."""
        self._counts[self._groups[row]] += 1


def choose_first(
    vectors: Iterable[Vectors], count: int, max_similarity: float, cap: ClassCap
) -> Ints:
    """The first rows in order, without those that are nearly equal to an earlier chosen one.

    vectors:        N of (E,) float32 and length 1; 0 for a row that is equal to no other. No more
        are taken than are needed
    max_similarity: cosine similarity above which two rows are near-duplicates
    Returns at most `count` indices, in order.
    """
    chosen: list[int] = []
    kept = np.empty((0, 0), np.float32)
    for row, vector in enumerate(vectors):
        if not cap.has_room(row):
            continue
        if not chosen:
            kept = np.empty((count, len(vector)), np.float32)
        elif float((kept[: len(chosen)] @ vector).max()) > max_similarity:
            continue
        kept[len(chosen)] = vector
        chosen.append(row)
        cap.add(row)
        if len(chosen) == count:
            break
    return np.array(chosen, np.int64)


def choose_spread(vectors: Vectors, count: int, max_similarity: float, cap: ClassCap) -> Ints:
    """Uncertain rows that differ from each other: the seeding of k-means++, weighted by rank.

    The first row, then each time a drawn one, with a probability proportional to its squared
    distance to the nearest chosen row times a weight, which falls linearly with the rank. The
    random numbers have a fixed seed. Taking the farthest row each time (k-center) gave a lower
    accuracy, see docs/labeling_loop.md, "Measured".

    vectors: (N, E) float32 of length 1, the most uncertain row first
    Returns at most `count` indices in the order of their choice.
    Source: Arthur and Vassilvitskii, "k-means++", SODA 2007; for active learning, Ash et al., "Deep
    batch active learning by diverse, uncertain gradient lower bounds", ICLR 2020.
    """
    rows = len(vectors)
    weight = np.linspace(1, 0, rows, endpoint=False)
    similarity = np.full(rows, -1.0, np.float32)  # to the nearest chosen row
    is_open = np.ones(rows, bool)
    random = np.random.default_rng(0)
    chosen: list[int] = []
    row = 0
    while len(chosen) < min(count, rows):
        if chosen:
            is_open &= similarity <= max_similarity
            ends = np.cumsum(np.where(is_open, weight * np.maximum(1 - similarity, _TINY), 0.0))
            if ends[-1] == 0:
                break
            row = int(np.searchsorted(ends, random.random() * ends[-1], side="right"))
        is_open[row] = False
        if not cap.has_room(row):
            continue
        chosen.append(row)
        cap.add(row)
        np.maximum(similarity, vectors @ vectors[row], out=similarity)
    return np.array(chosen, np.int64)
