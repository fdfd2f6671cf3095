"""How alike any two images are: by their bytes, their perceptual hashes, their embeddings.

Groups of copies hold images together that need not be alike themselves, as the first and the last
frame of a scene. Which image is a copy of which is asked here, pair by pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from imgcls.curation.checks.image_table import Flags, Floats, Images, Ints
from imgcls.data.image_features import DIGEST_BYTES, HASH_BITS, MIRROR

_PAIRS = 1 << 20
"""Compared at a time."""


class Likeness:
    """Of the images of a check.

    exact:        (N,) int64: the first image with the same bytes; -1 where there is no image
    hashed:       (N,) bool: which have a perceptual hash that says something
    near_bits:    in which the hashes of near duplicates differ at most
    similar:      cosine that embeddings of similar images have at least
    """

    def __init__(
        self,
        images: Images,
        *,
        min_contrast: float,
        min_side: int,
        near_bits: int,
        similar: float,
    ) -> None:
        self.near_bits, self.least_cosine = near_bits, similar
        digests = images.words("digest", DIGEST_BYTES).view(np.uint64)
        _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
        self.exact: Ints = np.where(images.ok, first[inverse.ravel()], -1)
        side = np.fmin(images.number("width"), images.number("height"))
        self.hashed: Flags = (
            images.ok & (images.number("contrast") >= min_contrast) & (side >= min_side)
        )
        self.hashes = images.words("hash", HASH_BITS // 8).copy().view(np.uint64)
        self._embedding = images.embedding

    def bits(self, one: Ints, other: Ints) -> npt.NDArray[np.int16]:
        """(K, M) int16: bits of the hash in which images (K,) and (M,) differ, mirrored ones too.

        0 for the same bytes, 256 where a hash says nothing.
        """
        apart = self.hashes[one][:, None] ^ self.hashes[other][None]
        straight, turned = (
            np.bitwise_count(each).sum(axis=2, dtype=np.int16)
            for each in (apart, apart ^ MIRROR.view(np.uint64))
        )
        told = np.minimum(straight, turned)
        told[~(self.hashed[one][:, None] & self.hashed[other][None])] = HASH_BITS
        told[self.same(one, other)] = 0
        return told

    def same(self, one: Ints, other: Ints) -> Flags:
        """(K, M) bool: the same bytes."""
        return np.asarray(self.exact[one][:, None] == self.exact[other][None])

    def near(self, one: Ints, other: Ints) -> Flags:
        """(K, M) bool: the same picture."""
        return np.asarray(self.bits(one, other) <= self.near_bits)

    def similar(self, one: Ints, other: Ints) -> Flags:
        """(K, M) bool: the same picture, or alike to the model."""
        assert self._embedding is not None
        cosine = normalised(self._embedding[one]) @ normalised(self._embedding[other]).T
        return np.asarray((cosine >= self.least_cosine) | self.near(one, other))

    def blocks(self, one: Ints, other: Ints) -> Iterator[tuple[Ints, npt.NDArray[np.int16]]]:
        """`bits` of many with many, some of the first at a time."""
        step = max(1, _PAIRS // max(1, len(other)))
        for start in range(0, len(one), step):
            block = one[start : start + step]
            yield block, self.bits(block, other)


def normalised(embedding: npt.NDArray[np.floating]) -> Floats:
    """Vectors of length 1, float32."""
    vectors = embedding.astype(np.float32)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(length, 1e-12)


def members(groups: Ints) -> Iterator[Ints]:
    """The images of each group that has more than one, in order; groups below 0 are none."""
    there = np.flatnonzero(groups >= 0)
    order = there[np.argsort(groups[there], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1)).tolist()
    for start, end in itertools.pairwise([*starts, len(order)]):
        if end - start > 1:
            yield order[start:end]
