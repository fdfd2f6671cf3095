"""Agreement of annotators who labeled the same images, and the images they disagree about."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


class AnnotatorLabels:
    """Labels of all annotators as integers: one row per annotator, one column per image.

    An integer stands for a set of labels; -1 for an image that the annotator did not label. A
    record is encoded again only if its version has changed.

    paths: images of the first columns; other labeled images follow
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._columns = {path: column for column, path in enumerate(paths)}
        self._paths = list(paths)
        self._num_queued = len(paths)
        self._codes: dict[Labels, int] = {}
        self._encoded: dict[str, tuple[int, NDArray[np.int64], NDArray[np.int64]]] = {}
        self._names: list[str] = []
        self._matrix = np.empty((0, 0), np.int64)
        self._label_sets: list[Labels] = []

    def update(self, records: Mapping[str, AnnotatorRecord]) -> None:
        """Take over the labels of all annotators."""
        encoded = {}
        for name, record in sorted(records.items()):
            known = self._encoded.get(name)
            encoded[name] = known if known and known[0] == record.version else self._encode(record)
        self._encoded, self._names = encoded, list(encoded)
        self._label_sets = list(self._codes)
        self._matrix = np.full((len(encoded), len(self._paths)), -1, np.int64)
        for row, (_, columns, codes) in enumerate(encoded.values()):
            self._matrix[row, columns] = codes

    def _encode(self, record: AnnotatorRecord) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        columns, codes = [], []
        for path, decision in record.current.items():
            if decision.labels is None:
                continue
            column = self._columns.setdefault(path, len(self._paths))
            if column == len(self._paths):
                self._paths.append(path)
            columns.append(column)
            codes.append(self._codes.setdefault(tuple(sorted(decision.labels)), len(self._codes)))
        return record.version, np.array(columns, np.int64), np.array(codes, np.int64)

    def count_complete(self, annotations_per_image: int) -> int:
        """Number of images of the queue with as many labels as wanted."""
        labels = (self._matrix[:, : self._num_queued] >= 0).sum(0)
        return int((labels >= annotations_per_image).sum())

    def compute_agreements(
        self, classes: Sequence[str], *, several: bool
    ) -> list[AnnotatorAgreement]:
        """Agreement of each pair of annotators with images in common.

        several: images may have several labels; kappa is then Cohen's kappa of the binary decisions
            (class applies or not)
        """
        found = []
        for first, second in itertools.combinations(range(len(self._names)), 2):
            x, y = self._matrix[first], self._matrix[second]
            is_shared = (x >= 0) & (y >= 0)
            x, y = x[is_shared], y[is_shared]
            if not len(x):
                continue
            equal = int((x == y).sum())
            kappa = (
                self._compute_class_kappa(x, y, classes)
                if several
                else cohens_kappa(
                    np.bincount(x, minlength=len(self._label_sets)),
                    np.bincount(y, minlength=len(self._label_sets)),
                    equal,
                )
            )
            names = self._names[first], self._names[second]
            found.append(AnnotatorAgreement(*names, len(x), equal / len(x), kappa))
        return found

    def _compute_class_kappa(
        self, x: NDArray[np.int64], y: NDArray[np.int64], classes: Sequence[str]
    ) -> float | None:
        """Kappa of the decisions about each class of each image, taken together."""
        sets = [frozenset(labels) for labels in self._label_sets]
        pairs, counts = np.unique(x * len(sets) + y, return_counts=True)
        names, sums = set(classes), np.zeros(3, np.int64)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            a, b = sets[pair // len(sets)], sets[pair % len(sets)]
            names |= a | b
            sums += np.array([len(a), len(b), len(a ^ b)]) * count
        first, second, different = sums.tolist()
        total = len(x) * len(names)
        return cohens_kappa(
            np.array([total - first, first]), np.array([total - second, second]), total - different
        )

    def iter_disagreements(self) -> Iterator[tuple[str, dict[str, Labels]]]:
        """Images of the queue with different labels and no majority, in their order.

        Yields the path, and the labels by annotator.
        """
        queued = self._matrix[:, : self._num_queued]
        if not len(queued):
            return
        lowest = np.where(queued < 0, len(self._label_sets), queued).min(0)
        for column in np.flatnonzero(queued.max(0) > lowest).tolist():
            codes = queued[:, column]
            (labeled,) = np.nonzero(codes >= 0)
            chosen = codes[labeled].tolist()
            if max(Counter(chosen).values()) * 2 <= len(chosen):
                names = (self._names[row] for row in labeled.tolist())
                sets = (self._label_sets[code] for code in chosen)
                yield self._paths[column], dict(zip(names, sets, strict=True))
