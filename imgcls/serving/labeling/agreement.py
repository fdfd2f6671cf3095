"""Agreement of annotators who labeled the same images, and the images they disagree about."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imgcls.metrics.agreement import cohens_kappa
from imgcls.serving.labeling.decisions import AnnotatorRecord

Labels = tuple[str, ...]


@dataclass(frozen=True)
class AnnotatorAgreement:
    """Agreement of two annotators.

    images: labeled by both
    equal:  share of these with the same labels
    kappa:  Cohen's kappa; None if it is undefined
    """

    first: str
    second: str
    images: int
    equal: float
    kappa: float | None


def compute_agreements(
    records: Mapping[str, AnnotatorRecord], classes: Sequence[str], *, several: bool
) -> list[AnnotatorAgreement]:
    """Agreement of each pair of annotators with images in common.

    several: images may have several labels; kappa is then that of the yes or no to each class
    """
    found = []
    for first, second in itertools.combinations(sorted(records), 2):
        a, b = records[first], records[second]
        pairs = [
            (frozenset(a.current[path].labels or ()), frozenset(b.current[path].labels or ()))
            for path in a.labeled & b.labeled
        ]
        if not pairs:
            continue
        equal = sum(x == y for x, y in pairs)
        kappa = _compute_class_kappa(pairs, classes) if several else _compute_kappa(pairs, equal)
        found.append(AnnotatorAgreement(first, second, len(pairs), equal / len(pairs), kappa))
    return found


def _compute_kappa(
    pairs: Sequence[tuple[frozenset[str], frozenset[str]]], equal: int
) -> float | None:
    names = sorted({name for pair in pairs for labels in pair for name in labels})
    first, second = (Counter(name for pair in pairs for name in pair[side]) for side in (0, 1))
    return cohens_kappa(
        np.array([first[name] for name in names]), np.array([second[name] for name in names]), equal
    )


def _compute_class_kappa(
    pairs: Sequence[tuple[frozenset[str], frozenset[str]]], classes: Sequence[str]
) -> float | None:
    """Kappa of the decisions about each class of each image, taken together."""
    names = {*classes, *(name for pair in pairs for labels in pair for name in labels)}
    total = len(pairs) * len(names)
    first, second = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    different = sum(len(x ^ y) for x, y in pairs)
    return cohens_kappa(
        np.array([total - first, first]), np.array([total - second, second]), total - different
    )


def iter_disagreements(
    records: Mapping[str, AnnotatorRecord], paths: Sequence[str]
) -> Iterator[tuple[str, dict[str, Labels]]]:
    """Images with different labels and no majority: path, and the labels by annotator.

    paths: images to check; yielded in this order
    """
    for path in paths:
        labels = {
            name: tuple(sorted(each.current[path].labels or ()))
            for name, each in sorted(records.items())
            if path in each.labeled
        }
        if len(labels) > 1 and max(Counter(labels.values()).values()) * 2 <= len(labels):
            yield path, labels
