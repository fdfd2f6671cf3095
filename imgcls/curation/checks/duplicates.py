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
from imgcls.curation.checks.findings import DuplicateTest, Finding, Issue
from imgcls.curation.checks.hash_search import DisjointSets, Pairs, find_near_pairs
from imgcls.curation.checks.image_table import BoolArray, FloatArray, ImageTable, IntArray
from imgcls.curation.checks.similarity import ImageSimilarity, iterate_groups, normalize_embeddings
from imgcls.data.image_features import HASH_BITS, MIRROR_BITS

COSINE_BLOCK = 65_536
_PLANES = 256
"""Random planes that tell which embeddings may be alike."""


class DuplicatesConfig(Section):
    """How much alike images must be."""

    max_hash_distance: int = Field(default=60, ge=0, le=100)
    """Near duplicates: bits of the perceptual hash, of 256, in which they differ at most."""
    min_contrast: UnitFloat = 0.02
    """Images with less have no perceptual hash that says anything."""
    min_side: PositiveInt = 24
    """Nor have images whose shorter side has fewer pixels: their frequencies are too few."""
    min_cosine: UnitFloat = 0.95
    """With a model: the cosine between the embeddings of images that are alike."""
    seed: PositiveInt = 1


def find_duplicates(images: ImageTable, config: DuplicatesConfig) -> Iterator[Finding]:
    """Groups of copies, and what follows from them."""
    likeness = ImageSimilarity(
        images,
        min_contrast=config.min_contrast,
        min_side=config.min_side,
        near_bits=config.max_hash_distance,
        similar=config.min_cosine,
    )
    exact = likeness.first_identical
    near, bits = _group_near(likeness, config)
    yield from _report_groups(
        "exact-duplicates", images, exact, np.ones(len(images), np.float32), likeness.is_identical
    )
    several = np.where(_is_mixed(near, exact), near, -1)
    score = 1 - bits.astype(np.float32) / HASH_BITS
    yield from _report_groups("near-duplicates", images, several, score, likeness.is_near)
    if images.embedding is not None:
        groups, cosine = _group_similar(images, near, config)
        more = np.where(_is_mixed(groups, near), groups, -1)
        yield from _report_groups("similar", images, more, cosine, likeness.is_similar)
    yield _find_leaks(images, near, likeness)
    yield _find_label_conflicts(images, near, likeness)


def _group_near(likeness: ImageSimilarity, config: DuplicatesConfig) -> tuple[IntArray, IntArray]:
    """Each image's group, and in how many bits it differs from the closest found in it."""
    exact = likeness.first_identical
    one_each = np.flatnonzero(likeness.has_hash & (exact == np.arange(len(exact))))
    pairs = find_near_pairs(
        likeness.hashes[one_each], MIRROR_BITS.view(np.uint64), most=config.max_hash_distance
    )
    groups = DisjointSets(len(exact))
    groups.union(one_each[pairs.first], one_each[pairs.second])
    bits = np.full(len(exact), HASH_BITS, np.int64)
    for side in (pairs.first, pairs.second):
        np.minimum.at(bits, one_each[side], pairs.distance)
    there = exact >= 0
    root = groups.root.copy()
    root[there] = groups.root[exact[there]]
    bits[there] = bits[exact[there]]
    return np.where(there, root, -1), bits


def _group_similar(
    images: ImageTable, near: IntArray, config: DuplicatesConfig
) -> tuple[IntArray, FloatArray]:
    """Near-duplicate groups joined where embeddings say so, and each image's highest cosine."""
    assert images.embedding is not None
    one_each = np.flatnonzero(near == np.arange(len(images)))
    unit = normalize_embeddings(images.embedding[one_each])
    pairs = find_similar_pairs(unit, config)
    first, second = one_each[pairs.first], one_each[pairs.second]
    groups = DisjointSets(len(images))
    groups.union(first, second)
    there = near >= 0
    root = groups.root.copy()
    root[there] = groups.root[near[there]]
    highest = np.zeros(len(images), np.float32)
    for side in (first, second):
        np.maximum.at(highest, side, _compute_cosine(unit, pairs.first, pairs.second))
    highest[there] = highest[near[there]]
    return np.where(there, root, -1), highest


def find_similar_pairs(unit: FloatArray, config: DuplicatesConfig) -> Pairs:
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
    angle = np.arccos(max((config.min_cosine - common) / (1 - common), -1.0))
    expected = angle / np.pi * _PLANES
    return find_near_pairs(
        words,
        None,
        most=int(expected + 4 * np.sqrt(expected)) + 16,
        alike=lambda one, other: _compute_cosine(unit, one, other) >= config.min_cosine,
        shared=2,
        words=words.shape[1],
    )


def _compute_cosine(unit: FloatArray, one: IntArray, other: IntArray) -> FloatArray:
    found = np.empty(len(one), np.float32)
    for start in range(0, len(one), COSINE_BLOCK):
        block = slice(start, start + COSINE_BLOCK)
        found[block] = np.einsum("ij,ij->i", unit[one[block]], unit[other[block]])
    return found


def _is_mixed(groups: IntArray, finer: IntArray) -> BoolArray:
    """Whether an image's group holds more than one of the finer groups."""
    there = groups >= 0
    if not there.any():
        return there
    pairs = np.unique(np.stack([groups[there], finer[there]], axis=1), axis=0)
    counts = np.bincount(pairs[:, 0])
    return there & (counts[np.maximum(groups, 0) % len(counts)] > 1)


def _report_groups(
    issue: Issue, images: ImageTable, groups: IntArray, score: FloatArray, alike: DuplicateTest
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


def _find_leaks(images: ImageTable, groups: IntArray, likeness: ImageSimilarity) -> Finding:
    """Images of the checked manifest that another one has as well: the same bytes or picture."""
    least = np.full(len(images), HASH_BITS, np.int64)
    of = np.full(len(images), -1)
    for group in iterate_groups(groups):
        own = images.is_own[group]
        if own.all() or not own.any():
            continue
        others = group[~own]
        for block, bits in likeness.iterate_distances(group[own], others):
            least[block] = bits.min(axis=1)
            of[block] = others[bits.argmin(axis=1)]
    at = np.flatnonzero((of >= 0) & (least <= likeness.max_hash_distance))
    names = images.path.take(pa.array(of[at])).to_pylist()
    detail = [
        f"also in {images.manifests[manifest]}: {name}"
        for manifest, name in zip(images.manifest_index[of[at]].tolist(), names, strict=True)
    ]
    score = (1 - least[at] / HASH_BITS).astype(np.float32)
    return Finding("leakage", at, score, detail, groups[at])


def _find_label_conflicts(
    images: ImageTable, groups: IntArray, likeness: ImageSimilarity
) -> Finding:
    """Copies that do not have the same label."""
    at, detail = [], []
    for group in iterate_groups(np.where(images.label >= 0, groups, -1)):
        label = images.label[group]
        if (label == label[0]).all():
            continue
        for block, bits in likeness.iterate_distances(group, group):
            alike = bits <= likeness.max_hash_distance
            for place, row in zip(block.tolist(), alike, strict=True):
                said = sorted({images.classes[each] for each in np.unique(label[row])})
                if len(said) > 1:
                    at.append(place)
                    own = images.classes[images.label[place]]
                    detail.append(f"{own!r}, among copies labelled {', '.join(said)}")
    places = np.array(at, np.int64)
    return Finding("label-conflict", places, np.ones(len(at), np.float32), detail, groups[places])
