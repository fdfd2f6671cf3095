"""Mergeable counts of pairs of classes: labels of one row, and labels with predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imgcls.metrics.columns import Bools, Ints
from imgcls.metrics.multilabel.matrices import (
    Targets,
    check_classes,
    check_matrix,
    check_targets,
    split_rows,
)

MAX_COOCCURRENCE_CLASSES = 1000
"""Pairs are not counted for more classes: their number grows with the square."""
_BLOCK_CELLS = 1 << 20  # float32 sums of a block are exact: it has fewer than 2**24 rows


@dataclass(frozen=True, eq=False)
class CooccurrenceCounts:
    """Counts of pairs of classes; C classes.

    Attributes
    ----------
    classes : tuple of str
        Class names.
    together : ndarray of int64, shape (C, C)
        Rows with both labels; the diagonal has the rows of each label. Shape (0, 0) for more than
        `MAX_COOCCURRENCE_CLASSES` classes.
    predicted : ndarray of int64, shape (C, C)
        Rows with a label (first axis) that are predicted to have a class (second axis) for which
        it is known whether they have it. Shape as `together`.
    known : ndarray of int64, shape (C, C)
        Rows with a label (first axis) for which it is known whether they have a class (second
        axis): those that shares are of. Shape as `together`.
    """

    classes: tuple[str, ...]
    together: Ints
    predicted: Ints
    known: Ints

    @classmethod
    def from_arrays(
        cls, targets: Targets, predicted: Bools, classes: Sequence[str]
    ) -> CooccurrenceCounts:
        """Count N ok rows.

        Parameters
        ----------
        targets : ndarray of int8, shape (N, C)
            1: the class applies, 0: it does not, -1: unknown.
        predicted : ndarray of bool, shape (N, C)
            Whether a score reaches the threshold of its class.
        classes : sequence of str
            The C class names.

        Returns
        -------
        CooccurrenceCounts

        Raises
        ------
        ValueError
            If a class name is repeated, shapes or types do not match, or a target is not -1, 0 or
            1.

        Examples
        --------
        >>> targets = np.array([[1, 1], [1, 0]], np.int8)
        >>> predicted = np.array([[True, False], [True, False]])
        >>> counts = CooccurrenceCounts.from_arrays(targets, predicted, ["cat", "dog"])
        >>> counts.together.tolist(), counts.predicted.tolist()
        ([[2, 1], [1, 1]], [[2, 0], [1, 0]])
        """
        names = check_classes(classes)
        shape = (len(targets), len(names))
        check_matrix("targets", targets, shape, "int8")
        check_matrix("predicted", predicted, shape, "bool")
        check_targets(targets)
        counts = cls.empty(names)
        if not counts.together.size:
            return counts
        for part in split_rows(*shape, _BLOCK_CELLS):
            labels = (targets[part] > 0).astype(np.float32)
            np.add(counts.together, (labels.T @ labels).astype(np.int64), out=counts.together)
            known = targets[part] >= 0
            found = labels.T @ (predicted[part] & known).astype(np.float32)
            np.add(counts.predicted, found.astype(np.int64), out=counts.predicted)
            rows = labels.T @ known.astype(np.float32)
            np.add(counts.known, rows.astype(np.int64), out=counts.known)
        return counts

    @classmethod
    def empty(cls, classes: Sequence[str]) -> CooccurrenceCounts:
        """Counts of no rows. Raises ValueError if a name is repeated."""
        names = check_classes(classes)
        size = len(names) if len(names) <= MAX_COOCCURRENCE_CLASSES else 0
        zero = np.zeros((size, size), dtype=np.int64)
        return cls(names, zero, zero.copy(), zero.copy())

    def __add__(self, other: object) -> CooccurrenceCounts:
        """Counts of the rows of both. Raises ValueError if the classes differ."""
        if not isinstance(other, CooccurrenceCounts):
            return NotImplemented
        if self.classes != other.classes:
            raise ValueError("cannot merge counts over different classes")
        return CooccurrenceCounts(
            self.classes,
            self.together + other.together,
            self.predicted + other.predicted,
            self.known + other.known,
        )
