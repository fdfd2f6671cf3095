"""Images that are there more than once: the same bytes, the same picture, or much alike.

Owns the groups, and what follows from them: leaks between manifests, and copies that were given
different labels. These are said of images that are alike themselves, not of all in a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt

from imgcls.config import Section, UnitFloat
from imgcls.curation.checks.findings import Alike, Finding, Issue
from imgcls.curation.checks.hash_search import Groups, Pairs, near_pairs
from imgcls.curation.checks.image_table import Flags, Floats, Images, Ints
from imgcls.curation.checks.similarity import Likeness, members, normalised
from imgcls.data.image_features import HASH_BITS, MIRROR

BLOCK = 65_536
_PLANES = 256
"""Random planes that tell which embeddings may be alike."""


class CopiesConfig(Section):
    """How much alike images must be."""

    near_bits: int = Field(default=60, ge=0, le=100)
    """Near duplicates: bits of the perceptual hash, of 256, in which they differ at most."""
    min_contrast: UnitFloat = 0.02
    """Images with less have no perceptual hash that says anything."""
    min_side: PositiveInt = 24
    """Nor have images whose shorter side has fewer pixels: their frequencies are too few."""
    similar: UnitFloat = 0.95
    """With a model: the cosine between the embeddings of images that are alike."""
    seed: PositiveInt = 1


def found(images: Images, config: CopiesConfig) -> Iterator[Finding]:
    """Groups of copies, and what follows from them."""
    likeness = Likeness(
        images,
        min_contrast=config.min_contrast,
        min_side=config.min_side,
        near_bits=config.near_bits,
        similar=config.similar,
    )
    exact = likeness.exact
    near, bits = _near(likeness, config)
    yield from _grouped(
        "exact-duplicates", images, exact, np.ones(len(images), np.float32), likeness.same
    )
    several = np.where(_mixed(near, exact), near, -1)
    score = 1 - bits.astype(np.float32) / HASH_BITS
    yield from _grouped("near-duplicates", images, several, score, likeness.near)
    if images.embedding is not None:
        groups, cosine = _similar(images, near, config)
        more = np.where(_mixed(groups, near), groups, -1)
        yield from _grouped("similar", images, more, cosine, likeness.similar)
    yield _leaks(images, near, likeness)
    yield _conflicts(images, near, likeness)


def _near(likeness: Likeness, config: CopiesConfig) -> tuple[Ints, Ints]:
    """Each image's group, and in how many bits it differs from the closest found in it."""
    exact = likeness.exact
    one_each = np.flatnonzero(likeness.hashed & (exact == np.arange(len(exact))))
    pairs = near_pairs(likeness.hashes[one_each], MIRROR.view(np.uint64), most=config.near_bits)
    groups = Groups(len(exact))
    groups.join(one_each[pairs.first], one_each[pairs.second])
    bits = np.full(len(exact), HASH_BITS, np.int64)
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
    one_each = np.flatnonzero(near == np.arange(len(images)))
    unit = normalised(images.embedding[one_each])
    pairs = similar_pairs(unit, config)
    first, second = one_each[pairs.first], one_each[pairs.second]
    groups = Groups(len(images))
    groups.join(first, second)
    there = near >= 0
    root = groups.root.copy()
    root[there] = groups.root[near[there]]
    highest = np.zeros(len(images), np.float32)
    for side in (first, second):
        np.maximum.at(highest, side, _cosine(unit, pairs.first, pairs.second))
    highest[there] = highest[near[there]]
    return np.where(there, root, -1), highest


def similar_pairs(unit: Floats, config: CopiesConfig) -> Pairs:
    """Pairs with a cosine of `config.similar` and more; a few near that limit are missed.

    unit: (N, E) float32, vectors of length 1
    Source: sides of random planes, Charikar, STOC 2002.
    """
    rng = np.random.default_rng(config.seed)
    planes = rng.standard_normal((unit.shape[1], _PLANES)).astype(np.float32)
    mean = unit.mean(axis=0)
    words = np.packbits((unit - mean) @ planes > 0, axis=1).view(np.uint64)
    # the angle between two vectors is the share of random planes that part them, times pi; it is
    # wider when what all have in common is taken away
    common = min(float(mean @ mean), 0.99)
    angle = np.arccos(max((config.similar - common) / (1 - common), -1.0))
    expected = angle / np.pi * _PLANES
    return near_pairs(
        words,
        None,
        most=int(expected + 4 * np.sqrt(expected)) + 16,
        alike=lambda one, other: _cosine(unit, one, other) >= config.similar,
        shared=2,
        words=words.shape[1],
    )


def _cosine(unit: Floats, one: Ints, other: Ints) -> Floats:
    found = np.empty(len(one), np.float32)
    for start in range(0, len(one), BLOCK):
        block = slice(start, start + BLOCK)
        found[block] = np.einsum("ij,ij->i", unit[one[block]], unit[other[block]])
    return found


def _mixed(groups: Ints, finer: Ints) -> Flags:
    """Whether an image's group holds more than one of the finer groups."""
    there = groups >= 0
    if not there.any():
        return there
    pairs = np.unique(np.stack([groups[there], finer[there]], axis=1), axis=0)
    counts = np.bincount(pairs[:, 0])
    return there & (counts[np.maximum(groups, 0) % len(counts)] > 1)


def _grouped(
    issue: Issue, images: Images, groups: Ints, score: Floats, alike: Alike
) -> Iterator[Finding]:
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
    yield Finding(issue, at, score[at], detail, groups[at], alike)


def _leaks(images: Images, groups: Ints, likeness: Likeness) -> Finding:
    """Images of the checked manifest that another one has as well: the same bytes or picture."""
    least = np.full(len(images), HASH_BITS, np.int64)
    of = np.full(len(images), -1)
    for group in members(groups):
        own = images.own[group]
        if own.all() or not own.any():
            continue
        others = group[~own]
        for block, bits in likeness.blocks(group[own], others):
            least[block] = bits.min(axis=1)
            of[block] = others[bits.argmin(axis=1)]
    at = np.flatnonzero((of >= 0) & (least <= likeness.near_bits))
    names = images.path.take(pa.array(of[at])).to_pylist()
    detail = [
        f"also in {images.manifests[manifest]}: {name}"
        for manifest, name in zip(images.manifest[of[at]].tolist(), names, strict=True)
    ]
    score = (1 - least[at] / HASH_BITS).astype(np.float32)
    return Finding("leakage", at, score, detail, groups[at])


def _conflicts(images: Images, groups: Ints, likeness: Likeness) -> Finding:
    """Copies that do not have the same label."""
    at, detail = [], []
    for group in members(np.where(images.label >= 0, groups, -1)):
        label = images.label[group]
        if (label == label[0]).all():
            continue
        for block, bits in likeness.blocks(group, group):
            alike = bits <= likeness.near_bits
            for place, row in zip(block.tolist(), alike, strict=True):
                said = sorted({images.classes[each] for each in np.unique(label[row])})
                if len(said) > 1:
                    at.append(place)
                    own = images.classes[images.label[place]]
                    detail.append(f"{own!r}, among copies labelled {', '.join(said)}")
    places = np.array(at, np.int64)
    return Finding("label-conflict", places, np.ones(len(at), np.float32), detail, groups[places])
