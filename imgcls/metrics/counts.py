"""Mergeable counts of a table of predictions, from which every metric follows.

Promises that counting parts and merging them, in any order, equals counting the whole: integers
exactly, sums of floats up to rounding. Memory is bounded by the number of classes, never by the
number of rows; turning counts into metrics is left to `tables`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

from imgcls.metrics.calibration import bin_edges, bin_index
from imgcls.metrics.columns import NULL_LABEL, UNKNOWN_LABEL, Floats, Ints, OkRows, read_ok_rows

MAX_RANK = 20  # top-k accuracy is known up to this k; deeper ranks share one overflow count

# The rows of the confidence histograms: what came of a prediction with a given confidence.
CORRECT, WRONG, UNLABELED = 0, 1, 2

# A label whose score underflowed to 0 would make the mean log loss of a million rows infinite, and
# JSON has no infinity. At this floor such a row costs 27.6 nats: heavy, but finite.
SCORE_FLOOR = 1e-12


@dataclass(frozen=True, eq=False)
class PredictionCounts:
    """What is kept of a table of predictions; C classes, B confidence bins.

    An ok row (status "ok") has a prediction. It is labelled when its label is one of the classes,
    `unlabelled` when its label is null, `unknown_label` when its label is something else, which no
    accuracy can judge; these three add up to `ok`.
    """

    classes: tuple[str, ...]
    status: dict[str, int]  # rows by status, "ok" among them
    unlabeled: int
    unknown_label: int
    accepted: int  # ok rows whose `accepted` is true; a null is not an acceptance
    accepted_labeled: int
    accepted_correct: int
    log_loss_rows: int  # labelled rows with a label_score
    log_loss_sum: float  # sum of -log(label_score) over them, in nats
    log_loss_square_sum: float  # and of its square
    rank_counts: Ints  # (MAX_RANK + 1,) labelled rows by label_rank 1..MAX_RANK, then deeper
    predicted_counts: Ints  # (C,) ok rows by predicted class, labelled or not
    predicted_confidence: Floats  # (C,) their confidences added up
    bin_counts: Ints  # (3, B) ok rows by outcome (CORRECT, WRONG, UNJUDGED) and confidence bin
    bin_confidence: Floats  # (3, B) their confidences added up
    # The non-zero cells of the confusion matrix over labelled rows, sorted by label, prediction.
    confusion_label: Ints  # (K,) class index
    confusion_predicted: Ints  # (K,) class index
    confusion_count: Ints  # (K,)

    @classmethod
    def from_table(
        cls,
        table: pa.Table | pa.RecordBatch,
        *,
        label_column: str | None,
        classes: Sequence[str],
        num_bins: int = 15,
    ) -> PredictionCounts:
        """Count the rows of a predictions table (columns as in the output of labelling).

        table:        columns predicted_label (string), confidence (float), accepted (bool),
                      status (string), and with a label_column also that column, label_score
                      (float) and label_rank (int, 1 = the prediction); null where a row has no
                      such value, not looked at on rows that are not ok. Strings may be large or
                      dictionary-encoded.
        label_column: where the true label is, or None for an unlabelled run; a label that is not
                      a string is compared by its text
        classes:      the C class names of the bundle, in its order
        num_bins:     equal-width confidence bins, see `calibration.bin_index`
        Raises ValueError when a column is missing, a class name is repeated, a status is null, or
        an ok row has no prediction, a predicted label that is not a class, a confidence or
        label_score outside [0, 1] or a label_rank below 1: such a table is not of this model.
        """
        names = _check_unique_names(classes)
        rows = read_ok_rows(table, label_column=label_column, classes=names)
        return cls.from_rows(rows, names, num_bins=num_bins)

    @classmethod
    def from_rows(
        cls, rows: OkRows, classes: Sequence[str], *, num_bins: int = 15
    ) -> PredictionCounts:
        """Count rows that were read already; raises ValueError for a confidence outside [0, 1]."""
        names = tuple(classes)
        size = len(names)
        labelled = rows.label >= 0
        correct = rows.label == rows.predicted  # a label that is no class has a code below 0
        outcome = np.where(labelled, np.where(correct, CORRECT, WRONG), UNLABELED)
        cell = outcome * num_bins + bin_index(rows.confidence, num_bins)
        confused, confused_count = np.unique(
            rows.label[labelled] * size + rows.predicted[labelled], return_counts=True
        )
        rank = np.minimum(rows.label_rank, MAX_RANK + 1) - 1
        scored = rows.label_score[~np.isnan(rows.label_score)]
        loss = -np.log(np.clip(scored, SCORE_FLOOR, 1.0))
        return cls(
            classes=names,
            status=rows.status,
            unlabeled=int(np.count_nonzero(rows.label == NULL_LABEL)),
            unknown_label=int(np.count_nonzero(rows.label == UNKNOWN_LABEL)),
            accepted=int(np.count_nonzero(rows.accepted)),
            accepted_labeled=int(np.count_nonzero(rows.accepted & labelled)),
            accepted_correct=int(np.count_nonzero(rows.accepted & correct)),
            log_loss_rows=len(loss),
            log_loss_sum=float(loss.sum()),
            log_loss_square_sum=float((loss**2).sum()),
            rank_counts=_count_by_index(rank, MAX_RANK + 1),
            predicted_counts=_count_by_index(rows.predicted, size),
            predicted_confidence=_sum_by_index(rows.predicted, rows.confidence, size),
            bin_counts=_count_by_index(cell, 3 * num_bins).reshape(3, num_bins),
            bin_confidence=_sum_by_index(cell, rows.confidence, 3 * num_bins).reshape(3, num_bins),
            confusion_label=confused // size,
            confusion_predicted=confused % size,
            confusion_count=confused_count.astype(np.int64, copy=False),
        )

    @classmethod
    def empty(cls, classes: Sequence[str], num_bins: int = 15) -> PredictionCounts:
        """The counts of no rows: what a merge starts from."""
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
        """B, the number of confidence bins."""
        return int(self.bin_counts.shape[1])

    @property
    def rows(self) -> int:
        """Every row, with a prediction or without."""
        return sum(self.status.values())

    @property
    def ok(self) -> int:
        """Rows with a prediction."""
        return self.status.get("ok", 0)

    @property
    def error_rows(self) -> int:
        """Rows without a prediction: any status but ok."""
        return self.rows - self.ok

    @property
    def labeled(self) -> int:
        """Ok rows whose label is one of the classes: the rows that accuracy judges."""
        return int(self.confusion_count.sum())

    @property
    def correct(self) -> int:
        """Labelled rows whose label is the prediction."""
        return int(self.confusion_count[self.confusion_label == self.confusion_predicted].sum())

    def merge(self, other: PredictionCounts) -> PredictionCounts:
        """The counts of the rows of both; commutative, and associative up to float addition.

        Raises ValueError when the two were counted with other classes or bins.
        """
        if self.classes != other.classes:
            raise ValueError(
                f"cannot merge counts over {len(self.classes)} classes with counts over"
                f" {len(other.classes)}: names and order must be the same, from one bundle"
            )
        if self.num_bins != other.num_bins:
            raise ValueError(
                f"cannot merge {self.num_bins} confidence bins with {other.num_bins};"
                " count both with the same num_bins"
            )
        merged = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name not in ("classes", "status") and not field.name.startswith("confusion_")
        }
        size = len(self.classes)
        keys = [part.confusion_label * size + part.confusion_predicted for part in (self, other)]
        cells, position = np.unique(np.concatenate(keys), return_inverse=True)
        total = np.zeros(len(cells), dtype=np.int64)
        np.add.at(total, position, np.concatenate([self.confusion_count, other.confusion_count]))
        return PredictionCounts(
            classes=self.classes,
            status=dict(sorted((Counter(self.status) + Counter(other.status)).items())),
            confusion_label=cells // size,
            confusion_predicted=cells % size,
            confusion_count=total,
            **merged,
        )

    def __add__(self, other: object) -> PredictionCounts:
        return self.merge(other) if isinstance(other, PredictionCounts) else NotImplemented

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, ints and floats, ready for json.dumps; `from_dict` restores it exactly."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {k: v.tolist() for k, v in values.items() if isinstance(v, np.ndarray)}
        return values | lists | {"classes": list(self.classes), "status": dict(self.status)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PredictionCounts:
        """Counts from what `to_dict` returned.

        Raises ValueError naming the keys when some are missing or unknown.
        """
        expected = {field.name for field in fields(cls)}
        if difference := expected ^ set(data):
            raise ValueError(f"not the dict of a PredictionCounts: check {sorted(difference)}")
        floats = ("predicted_confidence", "bin_confidence")
        arrays = {
            name: np.array(value, dtype=np.float64 if name in floats else np.int64)
            for name, value in data.items()
            if isinstance(value, list) and name != "classes"
        }
        plain = {"classes": tuple(data["classes"]), "status": dict(data["status"])}
        return cls(**{**data, **arrays, **plain})


def _check_unique_names(classes: Sequence[str]) -> tuple[str, ...]:
    if not classes:
        raise ValueError("no classes; pass the class names of the bundle")
    if repeated := [name for name, times in Counter(classes).items() if times > 1]:
        raise ValueError(f"class names must be unique; repeated: {', '.join(repeated[:5])}")
    return tuple(classes)


def _count_by_index(index: Ints, size: int) -> Ints:
    return np.bincount(index, minlength=size).astype(np.int64, copy=False)


def _sum_by_index(index: Ints, values: Floats, size: int) -> Floats:
    return np.bincount(index, weights=values, minlength=size).astype(np.float64, copy=False)
