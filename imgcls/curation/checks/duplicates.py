"""Duplicates: images with the same bytes, the same picture, or similar embeddings.

Builds the groups of duplicates and what follows from them: leaks between manifests, and duplicates
with different labels. A leak or a conflict requires two images that are duplicates themselves, not
only members of one group.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from imgcls.curation.checks.findings import DuplicateTest, Finding
from imgcls.curation.checks.hash_search import DisjointSets, Pairs, find_near_pairs
from imgcls.curation.checks.image_table import BoolArray, FloatArray, ImageTable, IntArray
from imgcls.curation.checks.similarity import ImageSimilarity, iterate_groups
from imgcls.curation.config import DuplicatesConfig, Issue
from imgcls.data.decoding.image_features import HASH_BITS, MIRROR_BITS
from imgcls.data.manifests.label_columns import NEGATIVE, POSITIVE
from imgcls.models.embeddings import normalize_embeddings

COSINE_BLOCK = 65_536
_PLANES = 256
"""Number of random hyperplanes whose sides are the bits of an embedding's hash."""


def find_duplicates(images: ImageTable, config: DuplicatesConfig) -> Iterator[Finding]:
    """Find the groups of duplicates, leaks between manifests and conflicting labels."""
    similarity = ImageSimilarity(
        images,
        min_contrast=config.min_contrast,
        min_side=config.min_side,
        max_hash_distance=config.max_hash_distance,
        min_cosine=config.min_cosine,
    )
    exact = similarity.first_identical
    near, bits = _group_near(similarity, config)
    ones = np.ones(len(images), np.float32)
    yield _report_groups("exact-duplicates", images, exact, ones, similarity.is_identical)
    mixed = np.where(_is_mixed(near, exact), near, -1)
    score = 1 - bits.astype(np.float32) / HASH_BITS
    yield _report_groups("near-duplicates", images, mixed, score, similarity.is_near)
    if images.embedding is not None:
        groups, cosine = _group_similar(images, near, config)
        mixed = np.where(_is_mixed(groups, near), groups, -1)
        yield _report_groups("similar", images, mixed, cosine, similarity.is_similar)
    yield _find_leaks(images, near, similarity)
    yield _find_label_conflicts(images, near, similarity)


def _group_near(similarity: ImageSimilarity, config: DuplicatesConfig) -> tuple[IntArray, IntArray]:
    """Group near duplicates.

    Returns (N,) int64, the first image of each image's group, -1 where it cannot be read, and (N,)
    int64, the bits in which it differs from the closest image found.
    """
    exact = similarity.first_identical
    firsts = np.flatnonzero(similarity.has_hash & (exact == np.arange(len(exact))))
    pairs = find_near_pairs(
        similarity.hashes[firsts],
        MIRROR_BITS.view(np.uint64),
        max_distance=config.max_hash_distance,
    )
    sets = DisjointSets(len(exact))
    sets.union(firsts[pairs.first], firsts[pairs.second])
    bits = np.full(len(exact), HASH_BITS, np.int64)
    for side in (pairs.first, pairs.second):
        np.minimum.at(bits, firsts[side], pairs.distance)
    readable = exact >= 0
    root = sets.root.copy()
    root[readable] = sets.root[exact[readable]]
    bits[readable] = bits[exact[readable]]
    return np.where(readable, root, -1), bits


def _group_similar(
    images: ImageTable, near: IntArray, config: DuplicatesConfig
) -> tuple[IntArray, FloatArray]:
    """Join groups of near duplicates with similar embeddings.

    Returns (N,) int64 as `_group_near`, and (N,) float32, the highest cosine found.
    """
    assert images.embedding is not None
    firsts = np.flatnonzero(near == np.arange(len(images)))
    unit = normalize_embeddings(images.embedding[firsts])
    pairs = find_similar_pairs(unit, config)
    first, second = firsts[pairs.first], firsts[pairs.second]
    sets = DisjointSets(len(images))
    sets.union(first, second)
    readable = near >= 0
    root = sets.root.copy()
    root[readable] = sets.root[near[readable]]
    highest = np.zeros(len(images), np.float32)
    for side in (first, second):
        np.maximum.at(highest, side, _compute_cosine(unit, pairs.first, pairs.second))
    highest[readable] = highest[near[readable]]
    return np.where(readable, root, -1), highest


def find_similar_pairs(unit: FloatArray, config: DuplicatesConfig) -> Pairs:
    """Find pairs with a cosine of at least `config.min_cosine`; a few near that limit are missed.

    unit: (N, E) float32, vectors of length 1
    Source: random hyperplane hashing, Charikar, STOC 2002.
    """
    if len(unit) < 2:
        none = np.empty(0, np.int64)
        return Pairs(none, none, none.astype(np.int16), none.astype(bool))
    rng = np.random.default_rng(config.seed)
    planes = rng.standard_normal((unit.shape[1], _PLANES)).astype(np.float32)
    mean = unit.mean(axis=0)
    words = np.packbits((unit - mean) @ planes > 0, axis=1).view(np.uint64)
    # the angle between two vectors is pi times the fraction of random planes that separate them;
    # the angle is wider after the mean is subtracted
    common = min(float(mean @ mean), 0.99)
    angle = np.arccos(max((config.min_cosine - common) / (1 - common), -1.0))
    expected = angle / np.pi * _PLANES
    return find_near_pairs(
        words,
        None,
        max_distance=int(expected + 4 * np.sqrt(expected)) + 16,
        is_pair=lambda one, other: _compute_cosine(unit, one, other) >= config.min_cosine,
        shared_bytes=2,
        num_words=words.shape[1],
    )


def _compute_cosine(unit: FloatArray, one: IntArray, other: IntArray) -> FloatArray:
    cosine = np.empty(len(one), np.float32)
    for start in range(0, len(one), COSINE_BLOCK):
        block = slice(start, start + COSINE_BLOCK)
        cosine[block] = np.einsum("ij,ij->i", unit[one[block]], unit[other[block]])
    return cosine


def _is_mixed(groups: IntArray, finer: IntArray) -> BoolArray:
    """Whether an image's group contains more than one of the finer groups."""
    grouped = groups >= 0
    if not grouped.any():
        return grouped
    pairs = np.unique(np.stack([groups[grouped], finer[grouped]], axis=1), axis=0)
    counts = np.bincount(pairs[:, 0])
    is_split: BoolArray = grouped & (counts[np.maximum(groups, 0) % len(counts)] > 1)
    return is_split


def _report_groups(
    issue: Issue,
    images: ImageTable,
    groups: IntArray,
    score: FloatArray,
    is_duplicate: DuplicateTest,
) -> Finding:
    """Report every image whose group has other images."""
    grouped = groups >= 0
    sizes = np.bincount(groups[grouped], minlength=len(images))
    indices = np.flatnonzero(grouped & (sizes[np.maximum(groups, 0)] > 1))
    group = groups[indices]
    first = images.path.take(pa.array(group)).to_pylist()
    details = [
        f"1 of {sizes[number]} images in its group; the first is {name}"
        for number, name in zip(group.tolist(), first, strict=True)
    ]
    return Finding(issue, indices, score[indices], details, group, is_duplicate)


def _find_leaks(images: ImageTable, groups: IntArray, similarity: ImageSimilarity) -> Finding:
    """Find images of the checked manifest that are also in another one: same bytes or picture."""
    distance = np.full(len(images), HASH_BITS, np.int64)
    closest = np.full(len(images), -1)
    for group in iterate_groups(groups):
        own = images.is_own[group]
        if own.all() or not own.any():
            continue
        others = group[~own]
        for block, bits in similarity.iterate_distances(group[own], others):
            distance[block] = bits.min(axis=1)
            closest[block] = others[bits.argmin(axis=1)]
    indices = np.flatnonzero((closest >= 0) & (distance <= similarity.max_hash_distance))
    leaked = closest[indices]
    names = images.path.take(pa.array(leaked)).to_pylist()
    details = [
        f"also in {images.manifests[manifest]}: {name}"
        for manifest, name in zip(images.manifest_index[leaked].tolist(), names, strict=True)
    ]
    score = (1 - distance[indices] / HASH_BITS).astype(np.float32)
    return Finding("leakage", indices, score, details, groups[indices])


def _find_label_conflicts(
    images: ImageTable, groups: IntArray, similarity: ImageSimilarity
) -> Finding:
    """Find duplicates with different labels."""
    describe = _describe_conflict if images.targets is None else _describe_class_conflict
    found, details = [], []
    for group in iterate_groups(np.where(images.is_labeled, groups, -1)):
        if not _has_different_labels(images, group):
            continue
        for block, bits in similarity.iterate_distances(group, group):
            is_duplicate = bits <= similarity.max_hash_distance
            for index, row in zip(block.tolist(), is_duplicate, strict=True):
                detail = describe(images, index, group[row])
                if detail is not None:
                    found.append(index)
                    details.append(detail)
    indices = np.array(found, np.int64)
    score = np.ones(len(indices), np.float32)
    return Finding("label-conflict", indices, score, details, groups[indices])


def _has_different_labels(images: ImageTable, group: IntArray) -> bool:
    if images.targets is None:
        return bool((images.label[group] != images.label[group[0]]).any())
    targets = images.targets[group]
    return bool(((targets == POSITIVE).any(0) & (targets == NEGATIVE).any(0)).any())


def _describe_conflict(images: ImageTable, index: int, same: IntArray) -> str | None:
    """How the label of an image differs from those of its duplicates; None if it does not.

    same: the image and its duplicates
    """
    names = sorted({images.classes[each] for each in np.unique(images.label[same])})
    if len(names) < 2:
        return None
    return f"{images.describe_label(index)!r}, among duplicates labeled {', '.join(names)}"


def _describe_class_conflict(images: ImageTable, index: int, same: IntArray) -> str | None:
    """The classes in which a multi-label image differs from its duplicates; None for none.

    A class that is unknown for one of the two images does not differ.
    """
    assert images.targets is not None
    own, others = images.targets[index], images.targets[same]
    texts = []
    for value, contrary, text in (
        (POSITIVE, NEGATIVE, "positive here and negative in a duplicate"),
        (NEGATIVE, POSITIVE, "negative here and positive in a duplicate"),
    ):
        codes = np.flatnonzero((own == value) & (others == contrary).any(axis=0))
        if len(codes):
            names = ", ".join(repr(images.classes[code]) for code in codes.tolist())
            texts.append(f"{text}: {names}")
    return "; ".join(texts) or None
