"""Sample of the images predicted as each class, for the report of a run without labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from imgcls.metrics.columns import Ints

SAMPLES_PER_CLASS = 6
MAX_SAMPLED_CLASSES = 30
"""Classes in the report, those with the most predictions."""


class ClassSamples:
    """At most `size` rows of each predicted class, chosen at random.

    A row is chosen by a hash of its place in the run, so that the sample of a run is always the
    same, and that of parts merges to that of the whole.

    label, order, file, position: class, hash and place of each row; by class, lowest hash first
    """

    def __init__(self, num_classes: int, size: int) -> None:
        self.size = size
        self.label, self.file, self.position = np.zeros((3, 0), np.int64)
        self.order = np.zeros(0, np.uint64)
        self._highest = np.full(num_classes, np.iinfo(np.uint64).max, np.uint64)

    def add(self, label: Ints, file: Ints, position: Ints) -> None:
        """Add rows; all arrays have one length."""
        order = _hash_places(file, position)
        chosen = order <= self._highest[label]
        label = np.concatenate([self.label, label[chosen]])
        order = np.concatenate([self.order, order[chosen]])
        file = np.concatenate([self.file, file[chosen]])
        position = np.concatenate([self.position, position[chosen]])
        by_class = np.lexsort((position, file, order, label))
        sorted_label = label[by_class]
        rank = np.arange(len(by_class)) - np.searchsorted(sorted_label, sorted_label)
        kept, last = by_class[rank < self.size], by_class[rank == self.size - 1]
        self.label, self.order = label[kept], order[kept]
        self.file, self.position = file[kept], position[kept]
        self._highest[label[last]] = order[last]

    def merge(self, other: ClassSamples) -> None:
        """Add the rows of another sample."""
        self.add(other.label, other.file, other.position)

    def select(self, classes: Ints) -> ClassSamples:
        """The rows of some classes, in the order of `classes`."""
        place = np.full(len(self._highest), -1)
        place[classes] = np.arange(len(classes))
        chosen = np.flatnonzero(place[self.label] >= 0)
        chosen = chosen[np.argsort(place[self.label[chosen]], kind="stable")]
        found = ClassSamples(len(self._highest), self.size)
        for name in ("label", "order", "file", "position"):
            setattr(found, name, getattr(self, name)[chosen])
        return found


def list_frequent_classes(predicted: Ints) -> Ints:
    """The classes with the most predictions, at most `MAX_SAMPLED_CLASSES`.

    predicted: (C,) number of predictions of each class
    """
    order = np.argsort(-predicted, kind="stable")[:MAX_SAMPLED_CLASSES]
    frequent: Ints = order[predicted[order] > 0]
    return frequent


def _hash_places(file: Ints, position: Ints) -> NDArray[np.uint64]:
    """(N,) hash of each row; the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    value = (file.astype(np.uint64) << np.uint64(40)) + position.astype(np.uint64)
    value += np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return mixed
