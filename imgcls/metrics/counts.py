"""Mergeable counts of a predictions table, from which every metric is computed.

Counting parts and merging them, in any order, equals counting the whole: integers exactly, float
sums up to rounding. Memory is bounded by the number of classes, not of rows. Metrics are in
`registry`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls.metrics.calibration import bin_edges, bin_index
from imgcls.metrics.columns import (
    NULL_LABEL,
    UNKNOWN_LABEL,
    Floats,
    Ints,
    OkRows,
    read_ok_rows,
)
from imgcls.metrics.mergeable_counts import MergeableCounts

MAX_RANK = 20  # top-k accuracy is known up to this k; deeper ranks share one overflow count

# Outcomes of a prediction: the rows of the confidence histograms.
CORRECT, WRONG, UNLABELED = 0, 1, 2

# A label score of 0 by underflow would make the mean log loss of a million rows infinite, and JSON
# has no infinity. At this floor such a row costs 27.6 nats: much, but finite.
SCORE_FLOOR = 1e-12


@dataclass(frozen=True, eq=False)
class PredictionCounts(MergeableCounts):
    """Counts of a predictions table; C classes, B confidence bins, K confusion cells.

    An ok row (status "ok") has a prediction. It is labeled if its label is one of the classes,
    unlabeled if its label is null, and otherwise counted in `unknown_label`, because its accuracy
    is undefined. These three add up to `ok`.

    Attributes
    ----------
    classes : tuple of str
        Class names.
    status : dict of str to int
        Rows by status, including "ok".
    unlabeled, unknown_label : int
        Ok rows without a label, and with a label that is not a class.
    accepted, accepted_labeled, accepted_correct : int
        Ok rows whose `accepted` is true; of these, labeled rows and correct ones.
    ood, ood_rows : int
        Ok rows that are out of distribution, and ok rows of a bundle that detects it.
    log_loss_rows : int
        Labeled rows with a label_score.
    log_loss_sum, log_loss_square_sum : float
        Sums over them of -log(label_score), in nats, and of its square.
    rank_counts : ndarray of int64, shape (MAX_RANK + 1,)
        Labeled rows by label_rank 1..MAX_RANK, then all deeper ones.
    predicted_counts, predicted_confidence : ndarray, shape (C,)
        Ok rows by predicted class (int64), and the sum of their confidences (float64).
    bin_counts, bin_confidence : ndarray, shape (3, B)
        Ok rows by outcome (CORRECT, WRONG, UNLABELED) and confidence bin (int64), and the sum of
        their confidences (float64).
    confusion_label, confusion_predicted, confusion_count : ndarray of int64, shape (K,)
        Non-zero cells of the confusion matrix of the labeled rows, as class indices and rows,
        sorted by label, then prediction.
    """

    _float_fields: ClassVar[tuple[str, ...]] = ("predicted_confidence", "bin_confidence")

    unlabeled: int
    unknown_label: int
    accepted: int
    accepted_labeled: int
    accepted_correct: int
    ood: int
    ood_rows: int
    log_loss_rows: int
    log_loss_sum: float
    log_loss_square_sum: float
    rank_counts: Ints
    predicted_counts: Ints
    predicted_confidence: Floats
    bin_counts: Ints
    bin_confidence: Floats
    confusion_label: Ints
    confusion_predicted: Ints
    confusion_count: Ints

    @classmethod
    def from_table(
        cls,
        table: pa.Table | pa.RecordBatch,
        *,
        label_column: str | None,
        classes: Sequence[str],
        num_bins: int = 15,
    ) -> PredictionCounts:
        """Count the rows of a predictions table, with columns as `imgcls predict` writes them.

        Parameters
        ----------
        table : pyarrow.Table or pyarrow.RecordBatch
            Columns predicted_label (string), confidence (float), accepted (bool), status (string),
            and with a `label_column` also that column, label_score (float) and label_rank (int, 1
            is the prediction); null where a row has no value, ignored on rows that are not ok.
            Strings may be large or dictionary-encoded.
        label_column : str or None
            Column of the true labels; None for an unlabeled run. Labels that are not strings are
            compared by their text.
        classes : sequence of str
            The C class names of the bundle, in its order.
        num_bins : int, default 15
            Equal-width confidence bins, see `calibration.bin_index`.

        Returns
        -------
        PredictionCounts

        Raises
        ------
        ValueError
            If a column is missing, a class name is repeated, a status is null, or an ok row has no
            prediction, a predicted label that is not a class, a confidence or label_score outside
            [0, 1] or a label_rank below 1.

        Examples
        --------
        >>> table = pa.table(
        ...     {
        ...         "predicted_label": ["cat", "dog", None],
        ...         "confidence": [0.9, 0.6, None],
        ...         "accepted": [True, False, None],
        ...         "status": ["ok", "ok", "missing"],
        ...     }
        ... )
        >>> counts = PredictionCounts.from_table(table, label_column=None, classes=["cat", "dog"])
        >>> counts.rows, counts.ok, counts.accepted
        (3, 2, 1)
        """
        if not classes:
            raise ValueError("no classes; pass the class names of the bundle")
        names = _check_unique_names(classes)
        rows = read_ok_rows(table, label_column=label_column, classes=names)
        return cls.from_rows(rows, names, num_bins=num_bins)

    @classmethod
    def from_statuses(cls, statuses: pa.ChunkedArray) -> PredictionCounts:
        """Count the rows of a table without predictions, such as embeddings.

        Parameters
        ----------
        statuses : pyarrow.ChunkedArray
            Status of each row, as strings; may be dictionary-encoded.

        Returns
        -------
        PredictionCounts
            Of no classes; only `status` has values.

        Examples
        --------
        >>> PredictionCounts.from_statuses(pa.chunked_array([["ok", "missing", "ok"]])).status
        {'missing': 1, 'ok': 2}
        """
        counted = pc.value_counts(statuses.cast(pa.string())).to_pylist()
        found = {each["values"]: each["counts"] for each in counted}
        return replace(cls.empty(()), status=dict(sorted(found.items())))

    @classmethod
    def from_rows(
        cls, rows: OkRows, classes: Sequence[str], *, num_bins: int = 15
    ) -> PredictionCounts:
        """Count rows that `columns.read_ok_rows` returned.

        Parameters
        ----------
        rows : OkRows
            Rows with a prediction.
        classes : sequence of str
            The C class names.
        num_bins : int, default 15
            Equal-width confidence bins.

        Returns
        -------
        PredictionCounts

        Raises
        ------
        ValueError
            If a confidence is outside [0, 1].
        """
        names = tuple(classes)
        size = len(names)
        labeled = rows.label >= 0
        correct = rows.label == rows.predicted  # a label that is not a class has a code below 0
        outcome = np.where(labeled, np.where(correct, CORRECT, WRONG), UNLABELED)
        cell = outcome * num_bins + bin_index(rows.confidence, num_bins)
        confused, confused_count = np.unique(
            rows.label[labeled] * size + rows.predicted[labeled], return_counts=True
        )
        rank = np.minimum(rows.label_rank, MAX_RANK + 1) - 1
        scored = rows.label_score[~np.isnan(rows.label_score)]
        loss = -np.log(np.clip(scored, SCORE_FLOOR, 1.0))
        bins = 3 * num_bins
        return cls(
            classes=names,
            status=rows.status,
            unlabeled=int(np.count_nonzero(rows.label == NULL_LABEL)),
            unknown_label=int(np.count_nonzero(rows.label == UNKNOWN_LABEL)),
            accepted=int(np.count_nonzero(rows.accepted)),
            accepted_labeled=int(np.count_nonzero(rows.accepted & labeled)),
            accepted_correct=int(np.count_nonzero(rows.accepted & correct)),
            ood=0 if rows.is_ood is None else int(np.count_nonzero(rows.is_ood)),
            ood_rows=0 if rows.is_ood is None else len(rows.is_ood),
            log_loss_rows=len(loss),
            log_loss_sum=float(loss.sum()),
            log_loss_square_sum=float((loss**2).sum()),
            rank_counts=_count_by_index(rank, MAX_RANK + 1),
            predicted_counts=_count_by_index(rows.predicted, size),
            predicted_confidence=_sum_by_index(rows.predicted, rows.confidence, size),
            bin_counts=_count_by_index(cell, bins).reshape(3, num_bins),
            bin_confidence=_sum_by_index(cell, rows.confidence, bins).reshape(3, num_bins),
            confusion_label=confused // size,
            confusion_predicted=confused % size,
            confusion_count=confused_count.astype(np.int64, copy=False),
        )

    @classmethod
    def empty(cls, classes: Sequence[str], num_bins: int = 15) -> PredictionCounts:
        """Counts of no rows: the start of a merge.

        Parameters
        ----------
        classes : sequence of str
            The C class names.
        num_bins : int, default 15
            Equal-width confidence bins.

        Returns
        -------
        PredictionCounts

        Raises
        ------
        ValueError
            If a name is repeated, or `num_bins` is below 1.

        Examples
        --------
        >>> PredictionCounts.empty(["cat", "dog"]).rows
        0
        """
        names, none = _check_unique_names(classes), np.zeros(0, dtype=np.int64)
        bins = len(bin_edges(num_bins)) - 1
        return cls(
            classes=names,
            status={},
            unlabeled=0,
            unknown_label=0,
            accepted=0,
            accepted_labeled=0,
            accepted_correct=0,
            ood=0,
            ood_rows=0,
            log_loss_rows=0,
            log_loss_sum=0.0,
            log_loss_square_sum=0.0,
            rank_counts=np.zeros(MAX_RANK + 1, dtype=np.int64),
            predicted_counts=np.zeros(len(names), dtype=np.int64),
            predicted_confidence=np.zeros(len(names)),
            bin_counts=np.zeros((3, bins), dtype=np.int64),
            bin_confidence=np.zeros((3, bins)),
            confusion_label=none,
            confusion_predicted=none,
            confusion_count=none,
        )

    @property
    def num_bins(self) -> int:
        """Number of confidence bins B."""
        return int(self.bin_counts.shape[1])

    @property
    def labeled(self) -> int:
        """Ok rows whose label is one of the classes: the rows of accuracy."""
        return int(self.confusion_count.sum())

    @property
    def correct(self) -> int:
        """Labeled rows whose prediction is the label."""
        return int(self.confusion_count[self.confusion_label == self.confusion_predicted].sum())

    def merge(self, other: PredictionCounts) -> PredictionCounts:
        """Counts of the rows of both; commutative, and associative up to float addition.

        Parameters
        ----------
        other : PredictionCounts
            Counts with the same classes and bins.

        Returns
        -------
        PredictionCounts

        Raises
        ------
        ValueError
            If classes or bins differ.
        """
        self._check_same_classes(other)
        if self.num_bins != other.num_bins:
            raise ValueError(
                f"cannot merge {self.num_bins} confidence bins with {other.num_bins};"
                " count both with the same num_bins"
            )
        size = len(self.classes)
        keys = [part.confusion_label * size + part.confusion_predicted for part in (self, other)]
        cells, position = np.unique(np.concatenate(keys), return_inverse=True)
        total = np.zeros(len(cells), dtype=np.int64)
        np.add.at(total, position, np.concatenate([self.confusion_count, other.confusion_count]))
        confusion = ("confusion_label", "confusion_predicted", "confusion_count")
        return PredictionCounts(
            **self._add_fields(other, skipped=confusion),
            confusion_label=cells // size,
            confusion_predicted=cells % size,
            confusion_count=total,
        )

    def __add__(self, other: object) -> PredictionCounts:
        return self.merge(other) if isinstance(other, PredictionCounts) else NotImplemented


def _check_unique_names(classes: Sequence[str]) -> tuple[str, ...]:
    if repeated := [name for name, times in Counter(classes).items() if times > 1]:
        raise ValueError(f"class names must be unique; repeated: {', '.join(repeated[:5])}")
    return tuple(classes)


def _count_by_index(index: Ints, size: int) -> Ints:
    return np.bincount(index, minlength=size).astype(np.int64, copy=False)


def _sum_by_index(index: Ints, values: Floats, size: int) -> Floats:
    return np.bincount(index, weights=values, minlength=size).astype(np.float64, copy=False)
