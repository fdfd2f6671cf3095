"""Metrics of a confusion matrix: precision, recall and F1, averaged over classes.

Definitions are those of scikit-learn with `zero_division=0`. "Occurring" classes are those with a
label or a prediction among the labeled rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.counts import PredictionCounts

ClassRate = Literal["recall", "precision", "f1"]
ClassWeighting = Literal["labeled", "occurring", "support"]
"""Equal weights of the classes with labels, equal weights of the occurring classes, or weights by
labeled rows."""


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

    def weigh_classes(self, weighting: ClassWeighting) -> Floats:
        """(C,) weights of the classes, which sum to 1."""
        chosen: dict[ClassWeighting, Bools | Ints] = {
            "labeled": self.is_labeled,
            "occurring": self.occurs,
            "support": self.support,
        }
        weights: Floats = chosen[weighting] / chosen[weighting].sum()
        return weights


def class_mean(rate: ClassRate, weighting: ClassWeighting) -> Callable[[ClassCounts], float]:
    """Build the function of a mean over classes.

    Parameters
    ----------
    rate : {"recall", "precision", "f1"}
        Rate of each class.
    weighting : {"labeled", "occurring", "support"}
        Weights of the classes.

    Returns
    -------
    callable
        Maps counts of at least one labeled row to a fraction in [0, 1].

    Examples
    --------
    >>> counts = ClassCounts(np.array([4, 2, 0]), np.array([3, 2, 1]), np.array([3, 2, 0]))
    >>> class_mean("recall", "labeled")(counts)  # balanced accuracy
    0.875
    >>> round(class_mean("recall", "occurring")(counts), 4)  # a class without labels counts as 0
    0.5833
    >>> round(class_mean("precision", "support")(counts), 4)
    1.0
    """

    def compute(counts: ClassCounts) -> float:
        rates: Floats = getattr(counts, rate)
        weights = counts.weigh_classes(weighting)
        if weighting == "support":
            return float((rates * weights).sum())
        return float(rates[weights > 0].mean())  # exactly 1 where all rates are

    return compute
