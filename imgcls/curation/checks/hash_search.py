"""Images that are nearly the same, found among millions by their perceptual hashes.

Owns the search for close hashes, near-linear in their number, and the groups that pairs make. What
a hash is made of is `facts`' business; reading the images is not done here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HashArray = npt.NDArray[np.uint64]
RowIndices = npt.NDArray[np.int64]
RowMask = npt.NDArray[np.bool_]

NEIGHBOR_WINDOW = 16
"""Hashes that share them with many others are compared with so many that come next in order."""


@dataclass(frozen=True)
class Pairs:
    """Rows that look alike: pairs enough to hold every group of them together.

    first, second: (P,) int64, first < second
    distance:      (P,) int16, bits that differ
    mirrored:      (P,) bool, whether one is like the other's mirror image
    """

    first: RowIndices
    second: RowIndices
    distance: npt.NDArray[np.int16]
    mirrored: RowMask

    def __len__(self) -> int:
        return len(self.first)


class DisjointSets:
    """Rows put together by pairs, as they come (union-find, a whole array at a time)."""

    def __init__(self, count: int) -> None:
        self.root: RowIndices = np.arange(count)
        """(N,) int64: the first row of each row's group."""

    def union(self, first: RowIndices, second: RowIndices) -> None:
        """Put the groups of first[i] and second[i] together, for all i."""
        while True:
            one, other = self.root[first], self.root[second]
            apart = one != other
            if not apart.any():
                return
            first, second = first[apart], second[apart]
            low = np.minimum(one[apart], other[apart])
            np.minimum.at(self.root, np.maximum(one[apart], other[apart]), low)
            while True:
                further = self.root[self.root]
                if np.array_equal(further, self.root):
                    break
                self.root = further


def find_near_pairs(
    hashes: HashArray,
    mirror: HashArray | None,
    *,
    most: int,
    alike: Callable[[RowIndices, RowIndices], RowMask] | None = None,
    shared: int = 3,
    words: int = 2,
) -> Pairs:
    """Find hashes that differ in few bits, also when one of two images is mirrored.

    hashes: (N, W) uint64, the steadiest bits in the first word
    mirror: (W,) uint64, the bits that change when an image is mirrored; None not to look for that
    most:   bits in which the two of a pair may differ
    alike:  says of rows (P,) and rows (P,) which pairs are ones indeed, where bits tell less
    shared: bytes, of the 8 of a word, that two hashes must have in common to be compared
    words:  of how many words, from the first on, one must have them in common

    With 3 shared bytes of one word two hashes are always compared when they differ in at most 5 of
    its bits, for these are in at most 5 of 8 bytes, and mostly when in some more. A pair whose rows
    others hold together already is left out.
    Source: Manku, Jain and Das Sarma, WWW 2007 (tables of permuted hashes).
    """
    count = len(hashes)
    both = hashes if mirror is None else np.concatenate([hashes, hashes ^ mirror])
    groups = DisjointSets(count)
    found: list[tuple[RowIndices, RowIndices, npt.NDArray[np.int16], RowMask]] = []
    for order, key in _sort_by_shared_bytes(both[:, :words], shared):
        for step in range(1, NEIGHBOR_WINDOW + 1):
            at = np.flatnonzero(key[step:] == key[:-step])
            if not at.size:
                break
            one, other = order[at], order[at + step]
            # of two mirrored ones the originals are compared
            new = (groups.root[one % count] != groups.root[other % count]) & (
                (one < count) | (other < count)
            )
            one, other = one[new], other[new]
            distance = np.bitwise_count(both[one] ^ both[other]).sum(axis=1, dtype=np.int16)
            close = distance <= most
            if alike is not None:
                close[close] = alike(one[close] % count, other[close] % count)
            one, other, distance = one[close], other[close], distance[close]
            mirrored = (one < count) != (other < count)
            one, other = one % count, other % count
            groups.union(one, other)
            found.append((np.minimum(one, other), np.maximum(one, other), distance, mirrored))
    return _deduplicate_pairs(found)


def _sort_by_shared_bytes(
    words: HashArray, shared: int
) -> Iterator[tuple[RowIndices, npt.NDArray[np.uint64]]]:
    """For each choice of shared bytes of a word: its rows in an order in which those that share
    them are neighbours, and by their other bytes within; the shared bytes in that order."""
    for word in words.T:
        columns = np.ascontiguousarray(word).view(np.uint8).reshape(-1, 8)
        for chosen in itertools.combinations(range(8), shared):
            others = [byte for byte in range(8) if byte not in chosen]
            permuted = np.ascontiguousarray(columns[:, [*chosen, *others]]).view(">u8").ravel()
            permuted = permuted.astype(np.uint64)
            order = np.argsort(permuted)
            yield order, permuted[order] >> np.uint64(8 * (8 - shared))


def _deduplicate_pairs(
    found: list[tuple[RowIndices, RowIndices, npt.NDArray[np.int16], RowMask]],
) -> Pairs:
    """Each pair once, at its smallest distance."""
    if not found:
        none = np.empty(0, np.int64)
        return Pairs(none, none, np.empty(0, np.int16), np.empty(0, np.bool_))
    first, second, distance, mirrored = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.lexsort((mirrored, distance, second, first))
    first, second = first[order], second[order]
    new = np.ones(len(first), np.bool_)
    new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return Pairs(first[new], second[new], distance[order][new], mirrored[order][new])
