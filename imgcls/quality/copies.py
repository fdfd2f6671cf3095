"""Images that are there more than once: the same bytes, the same picture, or much alike.

Owns the groups, and what follows from them: leaks between manifests, and copies that were given
different labels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, PositiveInt

from imgcls.config import Section, UnitFloat
from imgcls.data.duplicates import Groups, near_pairs
from imgcls.data.facts import DIGEST_BYTES, HASH_BITS, MIRROR
from imgcls.quality.findings import Finding, Issue
from imgcls.quality.images import Floats, Images, Ints

BLOCK = 65_536
_PLANES = 256
"""Random planes that tell which embeddings may be alike."""


class CopiesConfig(Section):
    """How much alike images must be."""

    near_bits: int = Field(default=60, ge=0, le=100)
    """Near duplicates: bits of the perceptual hash, of 256, in which they differ at most."""
    min_contrast: UnitFloat = 0.02
    """Images with less have no perceptual hash that says anything."""
    similar: UnitFloat = 0.95
    """With a model: the cosine between the embeddings of images that are alike."""
    seed: PositiveInt = 1


def found(images: Images, config: CopiesConfig) -> Iterator[Finding]:
    """Groups of copies, and what follows from them."""
    exact = _exact(images)
    near, bits = _near(images, exact, config)
    yield from _grouped("exact-duplicates", images, exact, np.ones(len(images), np.float32))
    mixed = _mixed(near, exact)
    score = 1 - bits.astype(np.float32) / HASH_BITS
    yield from _grouped("near-duplicates", images, np.where(mixed, near, -1), score)
    groups = near
    if images.embedding is not None:
        groups, cosine = _similar(images, near, config)
        more = np.where(_mixed(groups, near), groups, -1)
        yield from _grouped("similar", images, more, cosine)
    yield from _leaks(images, groups)
    yield from _conflicts(images, groups)


def _exact(images: Images) -> Ints:
    """(N,) int64: the first place with the same bytes; -1 where there is no image."""
    digests = images.words("digest", DIGEST_BYTES).view(np.uint64)
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    return np.where(images.ok, first[inverse.ravel()], -1)


def _near(images: Images, exact: Ints, config: CopiesConfig) -> tuple[Ints, Ints]:
    """Each image's group, and in how many bits it differs from the closest found in it."""
    places = np.arange(len(images))
    known = (exact == places) & (images.number("contrast") >= config.min_contrast)
    one_each = np.flatnonzero(known)
    hashes = images.words("hash", HASH_BITS // 8)[one_each].copy().view(np.uint64)
    pairs = near_pairs(hashes, MIRROR.view(np.uint64), most=config.near_bits)
    groups = Groups(len(images))
    groups.join(one_each[pairs.first], one_each[pairs.second])
    bits = np.full(len(images), HASH_BITS, np.int64)
    for side in (pairs.first, pairs.second):
        np.minimum.at(bits, one_each[side], pairs.distance)
    there = exact >= 0
    root = groups.root.copy()
    root[there] = groups.root[exact[there]]
    bits[there] = bits[exact[there]]
    return np.where(there, root, -1), bits


def _similar(images: Images, near: Ints, config: CopiesConfig) -> tuple[Ints, Floats]:
    """Near-duplicate groups joined where embeddings say so, and each image's highest cosine."""
    assert images.embedding is not None
    places = np.arange(len(images))
    one_each = np.flatnonzero(near == places)
    unit = normalised(images.embedding[one_each])
    rng = np.random.default_rng(config.seed)
    planes = rng.standard_normal((unit.shape[1], _PLANES)).astype(np.float32)
    sides = (unit - unit.mean(axis=0)) @ planes > 0
    words = np.packbits(sides, axis=1).view(np.uint64)
    # the angle between two vectors is the share of random planes that part them, times pi
    expected = np.arccos(config.similar) / np.pi * _PLANES
    most = int(expected + 4 * np.sqrt(expected)) + 16

    def cosine(one: Ints, other: Ints) -> Floats:
        found = np.empty(len(one), np.float32)
        for start in range(0, len(one), BLOCK):
            block = slice(start, start + BLOCK)
            found[block] = np.einsum("ij,ij->i", unit[one[block]], unit[other[block]])
        return found

    pairs = near_pairs(
        words, None, most=most, alike=lambda one, other: cosine(one, other) >= config.similar
    )
    first, second = one_each[pairs.first], one_each[pairs.second]
    groups = Groups(len(images))
    groups.join(first, second)
    there = near >= 0
    root = groups.root.copy()
    root[there] = groups.root[near[there]]
    highest = np.zeros(len(images), np.float32)
    for side in (first, second):
        np.maximum.at(highest, side, cosine(pairs.first, pairs.second))
    highest[there] = highest[near[there]]
    return np.where(there, root, -1), highest


def normalised(embedding: npt.NDArray[np.float16]) -> Floats:
    """Vectors of length 1, float32."""
    vectors = embedding.astype(np.float32)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(length, 1e-12)


def _mixed(groups: Ints, finer: Ints) -> npt.NDArray[np.bool_]:
    """Whether an image's group holds more than one of the finer groups."""
    there = groups >= 0
    if not there.any():
        return there
    pairs = np.unique(np.stack([groups[there], finer[there]], axis=1), axis=0)
    counts = np.bincount(pairs[:, 0])
    return there & (counts[np.maximum(groups, 0) % len(counts)] > 1)


def _grouped(issue: Issue, images: Images, groups: Ints, score: Floats) -> Iterator[Finding]:
    """Every image whose group has others, with what they are copies of."""
    there = groups >= 0
    sizes = np.bincount(groups[there], minlength=len(images))
    at = np.flatnonzero(there & (sizes[np.maximum(groups, 0)] > 1))
    path = images.path
    first = path.take(pa.array(groups[at])).to_pylist()
    detail = [
        f"1 of {sizes[group]} in its group, of which the first is {name}"
        for group, name in zip(groups[at].tolist(), first, strict=True)
    ]
    yield Finding(issue, at, score[at], detail, groups[at])


def _leaks(images: Images, groups: Ints) -> Iterator[Finding]:
    """Images of the checked manifest that another one has as well."""
    there = groups >= 0
    elsewhere = np.zeros(len(images), bool)
    elsewhere[groups[there & ~images.own]] = True
    at = np.flatnonzero(there & images.own & elsewhere[np.maximum(groups, 0)])
    of: dict[int, int] = {}
    for place in np.flatnonzero(there & ~images.own).tolist():
        of.setdefault(int(groups[place]), place)
    detail = []
    for group in groups[at].tolist():
        other = of[group]
        detail.append(
            f"also in {images.manifests[images.manifest[other]]}: {images.path[other].as_py()}"
        )
    yield Finding("leakage", at, np.ones(len(at), np.float32), detail, groups[at])


def _conflicts(images: Images, groups: Ints) -> Iterator[Finding]:
    """Copies that do not have the same label."""
    named = (groups >= 0) & (images.label >= 0)
    mixed = np.zeros(len(images), bool)
    mixed[named] = _mixed(groups[named], images.label[named])
    at = np.flatnonzero(mixed)
    said: dict[int, set[str]] = {}
    for place in at.tolist():
        said.setdefault(int(groups[place]), set()).add(images.classes[images.label[place]])
    detail = [
        f"{images.classes[images.label[place]]!r}, among copies labelled "
        f"{', '.join(sorted(said[int(groups[place])]))}"
        for place in at.tolist()
    ]
    yield Finding("label-conflict", at, np.ones(len(at), np.float32), detail, groups[at])
