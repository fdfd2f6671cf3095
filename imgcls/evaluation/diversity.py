"""Choice of rows that differ from each other, among the most uncertain ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from imgcls.metrics.columns import Ints

Vectors = NDArray[np.float32]


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


def choose_first(vectors: Vectors, count: int, max_similarity: float, cap: ClassCap) -> Ints:
    """The first rows in order, without those that are nearly equal to an earlier chosen one.

    vectors:        (N, E) float32 of length 1; 0 for a row that is equal to no other
    max_similarity: cosine similarity above which two rows are near-duplicates
    Returns at most `count` indices, in order.
    """
    chosen: list[int] = []
    kept = np.empty((min(count, len(vectors)), vectors.shape[1]), np.float32)
    for row, vector in enumerate(vectors):
        if len(chosen) == count:
            break
        if not cap.has_room(row):
            continue
        if chosen and float((kept[: len(chosen)] @ vector).max()) > max_similarity:
            continue
        kept[len(chosen)] = vector
        chosen.append(row)
        cap.add(row)
    return np.array(chosen, np.int64)


def choose_centers(vectors: Vectors, count: int, max_similarity: float, cap: ClassCap) -> Ints:
    """Greedy k-center: the first row, then each time the row farthest from all chosen ones.

    vectors: (N, E) float32 of length 1, the most uncertain row first
    Returns at most `count` indices in the order of their choice; ties go to the earlier row.
    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985; for active
    learning, Sener and Savarese, ICLR 2018.
    """
    similarity = np.full(len(vectors), -np.inf, np.float32)  # to the nearest chosen row
    is_open = np.ones(len(vectors), bool)
    chosen: list[int] = []
    row = 0
    while len(chosen) < count and is_open.any():
        if chosen:
            row = int(np.where(is_open, similarity, np.inf).argmin())
            if similarity[row] > max_similarity:
                break
        is_open[row] = False
        if not cap.has_room(row):
            continue
        chosen.append(row)
        cap.add(row)
        np.maximum(similarity, vectors @ vectors[row], out=similarity)
    return np.array(chosen, np.int64)
