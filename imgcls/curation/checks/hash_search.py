"""Search for similar hashes: pairs at a small Hamming distance among millions, without all pairs.

The time grows almost linearly with the number of hashes. Used on perceptual hashes of images
(`data.image_features`) and on bits of random projections of embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imgcls.curation.checks.image_table import BoolArray, IntArray

HashArray = npt.NDArray[np.uint64]

NEIGHBOR_WINDOW = 16
"""A hash is compared with this many next ones in the sorted order, where more share its bytes."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of similar rows, enough to connect every group of similar rows.

    first, second: (P,) int64, first < second
    distance:      (P,) int16, number of bits that differ
    mirrored:      (P,) bool, whether one row is similar to the mirror image of the other
    """

    first: IntArray
    second: IntArray
    distance: npt.NDArray[np.int16]
    mirrored: BoolArray

    def __len__(self) -> int:
        return len(self.first)


class DisjointSets:
    """Union-find over rows, vectorized: joins whole arrays of pairs."""

    def __init__(self, count: int) -> None:
        self.root: IntArray = np.arange(count)
        """(N,) int64: the first row of each row's set."""

    def union(self, first: IntArray, second: IntArray) -> None:
        """Join the sets of first[i] and second[i], for all i."""
        while True:
            one, other = self.root[first], self.root[second]
            apart = one != other
            if not apart.any():
                return
            first, second = first[apart], second[apart]
            low = np.minimum(one[apart], other[apart])
            np.minimum.at(self.root, np.maximum(one[apart], other[apart]), low)
            while True:
                next_root = self.root[self.root]
                if np.array_equal(next_root, self.root):
                    break
                self.root = next_root


def find_near_pairs(
    hashes: HashArray,
    mirror: HashArray | None,
    *,
    max_distance: int,
    is_pair: Callable[[IntArray, IntArray], BoolArray] | None = None,
    shared_bytes: int = 3,
    num_words: int = 2,
) -> Pairs:
    """Find hashes that differ in few bits, also when one of the two images is mirrored.

    hashes:       (N, W) uint64, the most stable bits in the first word
    mirror:       (W,) uint64, the bits that change when an image is mirrored; None to ignore it
    max_distance: maximum number of bits in which a pair differs
    is_pair:      called with rows (P,) and rows (P,), returns (P,) bool: confirms candidates by a
                  more exact test
    shared_bytes: number of the 8 bytes of a word that two hashes must share to be compared
    num_words:    number of words, from the first on, of which one must share bytes

    With 3 shared bytes, two hashes are always compared when they differ in at most 5 bits of one
    word, since these are in at most 5 of its 8 bytes; with some more bits, mostly. A pair whose
    rows are already connected by other pairs is omitted.
    Source: Manku, Jain and Das Sarma, WWW 2007 (tables of permuted hashes).
    """
    count = len(hashes)
    both = hashes if mirror is None else np.concatenate([hashes, hashes ^ mirror])
    sets = DisjointSets(count)
    found: list[tuple[IntArray, IntArray, npt.NDArray[np.int16], BoolArray]] = []
    for order, key in _sort_by_shared_bytes(both[:, :num_words], shared_bytes):
        for step in range(1, NEIGHBOR_WINDOW + 1):
            equal = np.flatnonzero(key[step:] == key[:-step])
            if not equal.size:
                break
            one, other = order[equal], order[equal + step]
            # two mirrored hashes are compared as the two originals
            new = (sets.root[one % count] != sets.root[other % count]) & (
                (one < count) | (other < count)
            )
            one, other = one[new], other[new]
            distance = np.bitwise_count(both[one] ^ both[other]).sum(axis=1, dtype=np.int16)
            close = distance <= max_distance
            if is_pair is not None:
                close[close] = is_pair(one[close] % count, other[close] % count)
            one, other, distance = one[close], other[close], distance[close]
            mirrored = (one < count) != (other < count)
            one, other = one % count, other % count
            sets.union(one, other)
            found.append((np.minimum(one, other), np.maximum(one, other), distance, mirrored))
    return _deduplicate_pairs(found)


def _sort_by_shared_bytes(
    words: HashArray, shared_bytes: int
) -> Iterator[tuple[IntArray, npt.NDArray[np.uint64]]]:
    """For each choice of shared bytes of each word: the sort order, and the shared bytes in it.

    Rows that share these bytes are neighbors in the order, sorted by their other bytes.
    """
    for word in words.T:
        columns = np.ascontiguousarray(word).view(np.uint8).reshape(-1, 8)
        for chosen in itertools.combinations(range(8), shared_bytes):
            others = [byte for byte in range(8) if byte not in chosen]
            permuted = np.ascontiguousarray(columns[:, [*chosen, *others]]).view(">u8").ravel()
            permuted = permuted.astype(np.uint64)
            order = np.argsort(permuted)
            yield order, permuted[order] >> np.uint64(8 * (8 - shared_bytes))


def _deduplicate_pairs(
    found: list[tuple[IntArray, IntArray, npt.NDArray[np.int16], BoolArray]],
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
