"""Metrics of a confusion matrix: precision, recall and F1, averaged over classes.

Definitions are those of scikit-learn with `zero_division=0`. "Occurring" classes are those with a
label or a prediction among the labeled rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.counts import PredictionCounts


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Labeled rows per class: the margins and the diagonal of a confusion matrix.

    Attributes
    ----------
    support : ndarray of int64, shape (C,)
        Rows by label.
    predicted : ndarray of int64, shape (C,)
        Rows by predicted class.
    correct : ndarray of int64, shape (C,)
        Correct predictions by class (true positives).

    Examples
    --------
    >>> counts = ClassCounts(np.array([4, 2]), np.array([3, 3]), np.array([3, 2]))
    >>> counts.recall.tolist()
    [0.75, 1.0]
    >>> counts.rows
    6
    """

    support: Ints
    predicted: Ints
    correct: Ints

    @classmethod
    def from_counts(cls, counts: PredictionCounts, cells: Ints | None = None) -> ClassCounts:
        """Class counts of a table of predictions.

        Parameters
        ----------
        counts : PredictionCounts
            Counts with K non-zero cells of the confusion matrix.
        cells : ndarray of int64, shape (K,), optional
            Row counts to use instead of `counts.confusion_count`, such as those of a bootstrap
            resample. Exact up to 2**53 rows.

        Returns
        -------
        ClassCounts
        """
        cells, size = counts.confusion_count if cells is None else cells, len(counts.classes)
        label, predicted = counts.confusion_label, counts.confusion_predicted
        hit = label == predicted
        return cls(
            np.bincount(label, cells, size).astype(np.int64),
            np.bincount(predicted, cells, size).astype(np.int64),
            np.bincount(label[hit], cells[hit], size).astype(np.int64),
        )

    @property
    def rows(self) -> int:
        """All labeled rows."""
        return int(self.support.sum())

    @property
    def is_labeled(self) -> Bools:
        """(C,) whether a class has a label."""
        return self.support > 0

    @property
    def occurs(self) -> Bools:
        """(C,) whether a class has a label or a prediction."""
        return self.support + self.predicted > 0

    @property
    def recall(self) -> Floats:
        """(C,) share of the rows of each class that are predicted as it; 0 without rows."""
        recall: Floats = self.correct / np.maximum(self.support, 1)
        return recall

    @property
    def precision(self) -> Floats:
        """(C,) share of the predictions of each class that are correct; 0 without predictions."""
        precision: Floats = self.correct / np.maximum(self.predicted, 1)
        return precision

    @property
    def f1(self) -> Floats:
        """(C,) harmonic mean of precision and recall; 0 for a class that does not occur."""
        f1: Floats = 2 * self.correct / np.maximum(self.support + self.predicted, 1)
        return f1


def balanced_accuracy(counts: ClassCounts) -> float:
    """Mean recall of the classes with labels.

    Parameters
    ----------
    counts : ClassCounts
        Counts of at least one labeled row.

    Returns
    -------
    float
        Fraction in [0, 1].

    Examples
    --------
    >>> balanced_accuracy(ClassCounts(np.array([4, 2]), np.array([3, 3]), np.array([3, 2])))
    0.875
    """
    return float(counts.recall[counts.is_labeled].mean())


def precision_macro(counts: ClassCounts) -> float:
    """Mean precision of the occurring classes.

    Parameters
    ----------
    counts : ClassCounts
        Counts of at least one labeled row.

    Returns
    -------
    float
        Fraction in [0, 1].

    Examples
    --------
    >>> precision_macro(ClassCounts(np.array([4, 4]), np.array([4, 4]), np.array([3, 3])))
    0.75
    """
    return float(counts.precision[counts.occurs].mean())


def recall_macro(counts: ClassCounts) -> float:
    """Mean recall of the occurring classes; a class without labels counts as 0.

    Parameters
    ----------
    counts : ClassCounts
        Counts of at least one labeled row.

    Returns
    -------
    float
        Fraction in [0, 1].

    Examples
    --------
    >>> recall_macro(ClassCounts(np.array([4, 0]), np.array([3, 1]), np.array([3, 0])))
    0.375
    """
    return float(counts.recall[counts.occurs].mean())


def f1_macro(counts: ClassCounts) -> float:
    """Mean F1 of the occurring classes.

    Parameters
    ----------
    counts : ClassCounts
        Counts of at least one labeled row.

    Returns
    -------
    float
        Fraction in [0, 1].

    Examples
    --------
    >>> f1_macro(ClassCounts(np.array([4, 4]), np.array([4, 4]), np.array([3, 3])))
    0.75
    """
    return float(counts.f1[counts.occurs].mean())


def precision_weighted(counts: ClassCounts) -> float:
    """Mean precision of the classes, weighted by their labeled rows.

    Parameters
    ----------
    counts : ClassCounts
        Counts of at least one labeled row.

    Returns
    -------
    float
        Fraction in [0, 1].

    Examples
    --------
    >>> precision_weighted(ClassCounts(np.array([3, 1]), np.array([2, 2]), np.array([2, 1])))
    0.875
    """
    return float((counts.precision * (counts.support / counts.support.sum())).sum())


def f1_weighted(counts: ClassCounts) -> float:
    """Mean F1 of the classes, weighted by their labeled rows.

    Parameters
    ----------
    counts : ClassCounts
        Counts of at least one labeled row.

    Returns
    -------
    float
        Fraction in [0, 1].

    Examples
    --------
    >>> f1_weighted(ClassCounts(np.array([3, 1]), np.array([3, 1]), np.array([3, 1])))
    1.0
    """
    return float((counts.f1 * (counts.support / counts.support.sum())).sum())
