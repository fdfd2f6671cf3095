"""Pairwise similarity of images: by their bytes, perceptual hashes and embeddings.

A group of duplicates may contain images that are not similar themselves, such as the first and the
last frame of a scene. So duplicates are tested pair by pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from imgcls.curation.checks.image_table import BoolArray, ImageTable, IntArray
from imgcls.data.decoding.image_features import DIGEST_BYTES, HASH_BITS, MIRROR_BITS
from imgcls.models.embeddings import normalize_embeddings

_BLOCK_PAIRS = 1 << 20
"""Number of pairs that are compared at once."""


class ImageSimilarity:
    """Pairwise similarity of the N images of a check.

    first_identical:   (N,) int64, the first image with the same bytes; -1 where it is unreadable
    has_hash:          (N,) bool, whether the perceptual hash of an image is used
    max_hash_distance: maximum number of bits in which the hashes of near duplicates differ
    min_cosine:        minimum cosine similarity of the embeddings of similar images
    """

    def __init__(
        self,
        images: ImageTable,
        *,
        min_contrast: float,
        min_side: int,
        max_hash_distance: int,
        min_cosine: float,
    ) -> None:
        self.max_hash_distance, self.min_cosine = max_hash_distance, min_cosine
        digests = images.get_bytes("digest", DIGEST_BYTES).view(np.uint64)
        _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
        self.first_identical: IntArray = np.where(images.is_ok, first[inverse.ravel()], -1)
        side = np.fmin(images.get_numbers("width"), images.get_numbers("height"))
        self.has_hash: BoolArray = (
            images.is_ok & (images.get_numbers("contrast") >= min_contrast) & (side >= min_side)
        )
        self.hashes = images.get_bytes("hash", HASH_BITS // 8).copy().view(np.uint64)
        self._embedding = images.embedding

    def compute_hash_distance(self, one: IntArray, other: IntArray) -> npt.NDArray[np.int16]:
        """(K, M) int16: bits in which the hashes of images (K,) and (M,) differ, also if mirrored.

        0 for the same bytes, 256 where a hash is not used.
        """
        difference = self.hashes[one][:, None] ^ self.hashes[other][None]
        upright, mirrored = (
            np.bitwise_count(each).sum(axis=2, dtype=np.int16)
            for each in (difference, difference ^ MIRROR_BITS.view(np.uint64))
        )
        distance: npt.NDArray[np.int16] = np.minimum(upright, mirrored)
        distance[~(self.has_hash[one][:, None] & self.has_hash[other][None])] = HASH_BITS
        distance[self.is_identical(one, other)] = 0
        return distance

    def is_identical(self, one: IntArray, other: IntArray) -> BoolArray:
        """(K, M) bool: the same bytes."""
        return np.asarray(self.first_identical[one][:, None] == self.first_identical[other][None])

    def is_near(self, one: IntArray, other: IntArray) -> BoolArray:
        """(K, M) bool: the same picture."""
        return np.asarray(self.compute_hash_distance(one, other) <= self.max_hash_distance)

    def is_similar(self, one: IntArray, other: IntArray) -> BoolArray:
        """(K, M) bool: the same picture, or similar embeddings."""
        assert self._embedding is not None
        cosine = (
            normalize_embeddings(self._embedding[one])
            @ normalize_embeddings(self._embedding[other]).T
        )
        return np.asarray((cosine >= self.min_cosine) | self.is_near(one, other))

    def iterate_distances(
        self, one: IntArray, other: IntArray
    ) -> Iterator[tuple[IntArray, npt.NDArray[np.int16]]]:
        """`compute_hash_distance` of many images in blocks of `one`, to bound the memory."""
        step = max(1, _BLOCK_PAIRS // max(1, len(other)))
        for start in range(0, len(one), step):
            block = one[start : start + step]
            yield block, self.compute_hash_distance(block, other)


def iterate_groups(groups: IntArray) -> Iterator[IntArray]:
    """The images of each group with more than one, in order; -1 is no group."""
    grouped = np.flatnonzero(groups >= 0)
    order = grouped[np.argsort(groups[grouped], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1)).tolist()
    for start, end in itertools.pairwise([*starts, len(order)]):
        if end - start > 1:
            yield order[start:end]
