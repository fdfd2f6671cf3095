"""Aggregate a multilabel run in one pass: counts for all metrics, and the cells to show.

A cell is one class of one row. As for other runs, aggregates of parts merge to that of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imgcls.errors import RequestError
from imgcls.evaluation.aggregate import (
    BATCH_ROWS,
    TopRows,
    add_slice,
    group_rows,
    keep_strangest,
)
from imgcls.evaluation.class_samples import SAMPLES_PER_CLASS, ClassSamples
from imgcls.evaluation.label_join import KeyedLabels
from imgcls.evaluation.label_list_join import LabelReader
from imgcls.metrics.columns import OOD_COLUMN, Bools, Ints, limit_batch_rows, take_scores
from imgcls.metrics.multilabel import (
    CooccurrenceCounts,
    MultiLabelCounts,
    MultiLabelRows,
    RankingCounts,
    read_multilabel_rows,
)
from imgcls.metrics.multilabel.columns import MULTILABEL_COLUMNS
from imgcls.metrics.score_bins import ONE, view_bits

Targets = NDArray[np.int8]


@dataclass(frozen=True)
class MultiLabelSettings:
    """Settings of the aggregate of a multilabel run.

    labels: where the true labels are; None for an unlabeled run
    slice_by: columns to slice by: counts are also kept for each of their values
    scores: whether to count the scores of all classes
    ood: whether to keep the rows that are out of distribution
    gallery: rows to keep of those that are out of distribution
    cells: cells to keep of each class with and without its label
    """

    classes: tuple[str, ...]
    labels: LabelReader | None
    slice_by: tuple[str, ...] = ()
    scores: bool = True
    ood: bool = False
    gallery: int = 24
    cells: int = 500

    @property
    def score_bytes(self) -> int:
        """As for `AggregateSettings`."""
        return 2 * len(self.classes) if self.scores else 0

    @property
    def batch_rows(self) -> int:
        """As for `AggregateSettings`."""
        return limit_batch_rows(len(self.classes), BATCH_ROWS)

    def create(self) -> MultiLabelAggregate:
        """As for `AggregateSettings`."""
        return MultiLabelAggregate(self)

    def list_columns(self, joined: KeyedLabels | None = None) -> list[str]:
        """As for `AggregateSettings`."""
        names = [*MULTILABEL_COLUMNS, *self.slice_by]
        if joined is not None:
            names += joined.required_columns
        elif self.labels is not None:
            names += self.labels.names
        if self.scores:
            names.append("scores")
        if self.ood:
            names += [OOD_COLUMN, "ood_score"]
        return list(dict.fromkeys(names))


class TopCells:
    """The `size` cells of each class with the highest value; ties go to the first rows of the run.

    label, value, file, position, is_predicted: class, value, file and row of each cell, and whether
    the class is predicted; by class, best first
    """

    def __init__(self, num_classes: int, size: int) -> None:
        self.size = size
        self.label, self.value, self.file, self.position = np.zeros((4, 0), np.int64)
        self.is_predicted = np.zeros(0, bool)
        self._lowest = np.zeros(num_classes, np.uint16)

    def find_lowest(self, file: int, start: int) -> NDArray[np.uint16]:
        """(C,) lowest values that may be kept of rows of a file, from its row `start` on."""
        is_later = (self.file < file) | ((self.file == file) & (self.position < start))
        if not is_later.all():
            return self._lowest
        return np.where(self._lowest > 0, self._lowest + 1, 0).astype(np.uint16)

    def add(self, label: Ints, value: Ints, file: Ints, position: Ints, predicted: Bools) -> None:
        """Add cells; all arrays have one length."""
        label = np.concatenate([self.label, label])
        value = np.concatenate([self.value, value])
        file = np.concatenate([self.file, file])
        position = np.concatenate([self.position, position])
        predicted = np.concatenate([self.is_predicted, predicted])
        order = np.lexsort((position, file, -value, label))
        sorted_label = label[order]
        rank = np.arange(len(order)) - np.searchsorted(sorted_label, sorted_label)
        kept = order[rank < self.size]
        last = order[rank == self.size - 1]
        self.label, self.value, self.file = label[kept], value[kept], file[kept]
        self.position, self.is_predicted = position[kept], predicted[kept]
        self._lowest[label[last]] = value[last]

    def merge(self, other: TopCells) -> None:
        """Add the cells of another one."""
        self.add(other.label, other.value, other.file, other.position, other.is_predicted)

    def select(self, chosen: Bools | Ints) -> dict[str, Any]:
        """Fields of some cells."""
        names = ("label", "value", "file", "position", "is_predicted")
        return {name: getattr(self, name)[chosen] for name in names}


class MultiLabelAggregate:
    """Counts, top cells and top rows of the rows added so far.

    negatives: cells without the label that have the highest scores; values are bits of float16
    positives: cells with the label that have the lowest scores; values are ONE - bits
    strangest: rows with the highest OOD score
    samples: rows of each predicted class, of an unlabeled run
    """

    def __init__(self, settings: MultiLabelSettings) -> None:
        classes = settings.classes
        is_ranked = settings.scores and settings.labels is not None
        self.settings = settings
        self.counts = MultiLabelCounts.empty(classes)
        self.pairs = CooccurrenceCounts.empty(classes) if settings.labels is not None else None
        self.ranking = RankingCounts.empty(classes) if is_ranked else None
        self.slices: dict[str, dict[str, MultiLabelCounts]] = {n: {} for n in settings.slice_by}
        self.negatives = TopCells(len(classes), settings.cells)
        self.positives = TopCells(len(classes), settings.cells)
        self.strangest = TopRows(settings.gallery if settings.ood else 0)
        self.samples = ClassSamples(len(classes), SAMPLES_PER_CLASS)

    @property
    def rows(self) -> int:
        """Number of rows added."""
        return self.counts.rows

    def add(self, table: pa.Table, file: int, start: int) -> None:
        """Add rows of file number `file`, from its row `start` on.

        Raises RequestError for predictions that no run with these classes wrote.
        """
        settings = self.settings
        try:
            rows = read_multilabel_rows(table, classes=settings.classes)
            targets, unknown = self._read_targets(table, rows)
            self.counts += MultiLabelCounts.from_rows(
                rows, targets, settings.classes, unknown_label=int(unknown.sum())
            )
            if targets is not None:
                self._count_labels(table, rows, targets, file, start)
        except ValueError as error:
            raise RequestError(f"the predictions cannot be evaluated: {error}") from error
        if targets is None:
            row, label = np.nonzero(rows.predicted)
            position = start + rows.position[row]
            self.samples.add(label, np.full(len(row), file, np.int64), position)
        if settings.ood:
            keep_strangest(self.strangest, table["ood_score"], rows.position, file, start)
        for column in settings.slice_by:
            self._count_slices(table, column, rows, targets, unknown)

    def merge(self, other: MultiLabelAggregate) -> None:
        """Add the rows of another aggregate."""
        self.counts += other.counts
        if self.pairs is not None and other.pairs is not None:
            self.pairs += other.pairs
        if self.ranking is not None and other.ranking is not None:
            self.ranking += other.ranking
        for column, found in other.slices.items():
            for value, counts in found.items():
                add_slice(self.slices, column, value, counts)
        self.negatives.merge(other.negatives)
        self.positives.merge(other.positives)
        self.samples.merge(other.samples)
        theirs = other.strangest
        self.strangest.add(theirs.value, theirs.file, theirs.position)

    def _read_targets(self, table: pa.Table, rows: MultiLabelRows) -> tuple[Targets | None, Bools]:
        """Targets of the rows with a prediction, and which have a label that is no class."""
        if self.settings.labels is None:
            return None, np.zeros(len(rows.position), bool)
        labels = self.settings.labels.encode(table, self.settings.classes)
        if len(rows.position) == table.num_rows:
            return labels.targets, labels.has_unknown_name
        return labels.targets[rows.position], labels.has_unknown_name[rows.position]

    def _count_labels(
        self, table: pa.Table, rows: MultiLabelRows, targets: Targets, file: int, start: int
    ) -> None:
        classes = self.settings.classes
        if self.pairs is not None:
            self.pairs += CooccurrenceCounts.from_arrays(targets, rows.predicted, classes)
        if self.ranking is None or not len(targets):
            return
        column = table["scores"]
        if column.null_count and not column.is_valid().to_numpy()[rows.position].all():
            raise ValueError("column 'scores' is null in a row with status ok")
        scores = take_scores(column, rows.position).astype(np.float16, copy=False)
        try:
            bits = np.minimum(view_bits(scores), ONE)
            self.ranking += RankingCounts.from_arrays(targets, scores, classes)
        except ValueError as error:
            raise ValueError(f"column 'scores': {error}") from error
        self._keep_positives(targets, bits, rows, file, start)
        self._keep_negatives(targets, bits, rows, file, start)

    def _keep_positives(
        self, targets: Targets, bits: Ints, rows: MultiLabelRows, file: int, start: int
    ) -> None:
        row, label = np.nonzero(targets > 0)
        value = (ONE - bits[row, label]).astype(np.int64)
        chosen = value >= self.positives.find_lowest(file, start)[label]
        self._keep(self.positives, row[chosen], label[chosen], value[chosen], rows, file, start)

    def _keep_negatives(
        self, targets: Targets, bits: Ints, rows: MultiLabelRows, file: int, start: int
    ) -> None:
        """Add blocks of growing size, so that the first ones exclude most cells of the others."""
        # the first block has few cells for any number of classes; the next ones add few to them
        first, size = 0, max(4 * self.settings.cells, self.counts.ok - len(targets))
        while first < len(targets):
            part = slice(first, first + size)
            lowest = self.negatives.find_lowest(file, start + int(rows.position[first]))
            row, label = np.nonzero((bits[part] >= lowest) & (targets[part] == 0))
            row += first
            value = bits[row, label].astype(np.int64)
            self._keep(self.negatives, row, label, value, rows, file, start)
            first, size = first + size, 2 * size

    @staticmethod
    def _keep(
        top: TopCells,
        row: Ints,
        label: Ints,
        value: Ints,
        rows: MultiLabelRows,
        file: int,
        start: int,
    ) -> None:
        files = np.full(len(row), file, np.int64)
        top.add(label, value, files, start + rows.position[row], rows.predicted[row, label])

    def _count_slices(
        self,
        table: pa.Table,
        column: str,
        rows: MultiLabelRows,
        targets: Targets | None,
        unknown: Bools,
    ) -> None:
        place = np.full(table.num_rows, -1)
        place[rows.position] = np.arange(len(rows.position))
        status = table["status"].cast(pa.string()).combine_chunks().dictionary_encode()
        names, codes = status.dictionary.to_pylist(), status.indices.to_numpy()
        is_ood, has_ood = _read_ood(table)
        order, groups = group_rows(table[column])
        for value, part in groups:
            members = order[part]
            own = place[members]
            own = own[own >= 0]
            numbers = np.bincount(codes[members], minlength=len(names)).tolist()
            counts = MultiLabelCounts.from_arrays(
                None if targets is None else targets[own],
                rows.predicted[own],
                self.settings.classes,
                status={name: n for name, n in zip(names, numbers, strict=True) if n},
                accepted=rows.accepted[own],
                is_ood=None if is_ood is None else is_ood[members[has_ood[members]]],
                unknown_label=int(unknown[own].sum()),
            )
            add_slice(self.slices, column, value, counts)


def _read_ood(table: pa.Table) -> tuple[Bools | None, Bools]:
    """`is_ood` of each row, if the table has it, and the rows with a prediction and a value."""
    if OOD_COLUMN not in table.schema.names:
        return None, np.zeros(table.num_rows, bool)
    column = table[OOD_COLUMN]
    is_ok = pc.equal(table["status"].cast(pa.string()), "ok")
    known = pc.and_(column.is_valid(), is_ok).to_numpy()
    return pc.fill_null(column, False).to_numpy(), known


def count_kept_cells(classes: Sequence[str], issues: int, gallery: int) -> int:
    """Cells to keep of each class with and without its label, so that `issues` are kept in all."""
    return max(gallery, issues // (2 * max(1, len(classes))))
