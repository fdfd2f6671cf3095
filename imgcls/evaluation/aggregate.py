"""What is kept of a table of predictions while it streams by: counts, and the rows worth a look.

Two tallies of two parts of a table add up to that of the whole, in any order. Memory is bounded by
classes, slices and the number of rows that are kept to be shown, never by the rows seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls.data.manifest import normalize_labels
from imgcls.errors import RequestError
from imgcls.metrics import PredictionCounts
from imgcls.metrics.columns import (
    EVALUATED_COLUMNS,
    Floats,
    Ints,
    OkRows,
    read_ok_rows,
    take_scores,
)
from imgcls.metrics.discrimination import ScoreCounts
from imgcls.metrics.selective import SelectiveCounts

MAX_SLICES = 1_000
NO_VALUE = "(none)"
"""How a slice of rows without a value is called."""


@dataclass(frozen=True)
class AggregateSpec:
    """What to keep of a table.

    label_column: of the true labels; None for an unlabelled run
    slice_by:     columns for whose every value all is counted apart
    scores:       also count every class's score
    gallery:      rows to keep of each kind that is shown
    issues:       rows to keep at most whose label the model contradicts
    """

    classes: tuple[str, ...]
    label_column: str | None
    slice_by: tuple[str, ...] = ()
    scores: bool = False
    gallery: int = 24
    issues: int = 100_000


@dataclass(eq=False)
class TopRows:
    """The `size` rows with the highest value; of equal ones, those that stand first."""

    size: int
    value: Floats = field(default_factory=lambda: np.zeros(0))
    file: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    position: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, value: Floats, file: Ints, place: Ints) -> None:
        """See rows: (N,) values, the parts that they are in and their places there."""
        if len(self.value) == self.size and self.size:
            worst = (self.file[-1], self.position[-1])
            rivals = (file < worst[0]) | ((file == worst[0]) & (place < worst[1]))
            chosen = (value > self.value[-1]) | ((value == self.value[-1]) & rivals)
            value, file, place = value[chosen], file[chosen], place[chosen]
        value = np.concatenate([self.value, value])
        file, place = np.concatenate([self.file, file]), np.concatenate([self.position, place])
        order = np.lexsort((place, file, -value))[: self.size]
        self.value, self.file, self.position = value[order], file[order], place[order]


class RunAggregate:
    """All that is kept of the rows seen.

    own_score_sum, own_score_rows: (C,) scores that rows give to their own label, by label
    mistakes:  wrong rows, the most confident first
    uncertain: rows of any kind, the least confident first
    issues:    wrong rows by confidence less the score of their label
    """

    def __init__(self, wanted: AggregateSpec) -> None:
        size = len(wanted.classes)
        self.spec = wanted
        self.counts = PredictionCounts.empty(wanted.classes)
        self.selective = SelectiveCounts.empty(wanted.classes)
        self.scores = ScoreCounts.empty(wanted.classes) if wanted.scores else None
        self.label_score_sum, self.label_score_rows = np.zeros(size), np.zeros(size, np.int64)
        self.slices: dict[str, dict[str, PredictionCounts]] = {n: {} for n in wanted.slice_by}
        self.mistakes, self.uncertain = TopRows(wanted.gallery), TopRows(wanted.gallery)
        self.issues = TopRows(wanted.issues)

    def add(self, table: pa.Table, file: int, start: int) -> None:
        """See rows of part `file`, from its row `start` on.

        Raises RequestError for predictions that no labelling run of these classes wrote.
        """
        wanted = self.spec
        table = _convert_labels_to_text(table, wanted.label_column)
        try:
            rows = read_ok_rows(table, label_column=wanted.label_column, classes=wanted.classes)
            self.counts += PredictionCounts.from_rows(rows, wanted.classes)
        except ValueError as error:
            raise RequestError(f"the predictions cannot be judged: {error}") from error
        self.selective += SelectiveCounts.from_rows(rows, wanted.classes)
        self._keep_top_rows(rows, file, start)
        if self.scores is not None:
            self._count_scores(table, rows, self.scores)
        for column in wanted.slice_by:
            self._count_slices(table, column)

    def merge(self, other: RunAggregate) -> None:
        """Add what another tally saw of other rows."""
        self.counts += other.counts
        self.selective += other.selective
        if self.scores is not None and other.scores is not None:
            self.scores += other.scores
        self.label_score_sum = self.label_score_sum + other.label_score_sum
        self.label_score_rows = self.label_score_rows + other.label_score_rows
        for column, found in other.slices.items():
            for value, counts in found.items():
                self._add_slice(column, value, counts)
        for mine, theirs in (
            (self.mistakes, other.mistakes),
            (self.uncertain, other.uncertain),
            (self.issues, other.issues),
        ):
            mine.add(theirs.value, theirs.file, theirs.position)

    def _keep_top_rows(self, rows: OkRows, file: int, start: int) -> None:
        place = start + rows.position
        files = np.full(len(place), file, np.int64)
        wrong = (rows.label >= 0) & (rows.label != rows.predicted)
        self.mistakes.add(rows.confidence[wrong], files[wrong], place[wrong])
        self.uncertain.add(-rows.confidence, files, place)
        scored = ~np.isnan(rows.label_score)
        against = wrong & scored
        margin = (rows.confidence - rows.label_score)[against]
        self.issues.add(margin, files[against], place[against])
        label, score, size = rows.label[scored], rows.label_score[scored], len(self.label_score_sum)
        self.label_score_sum = self.label_score_sum + np.bincount(label, score, size)
        self.label_score_rows = self.label_score_rows + np.bincount(label, minlength=size)

    def _count_scores(self, table: pa.Table, rows: OkRows, counts: ScoreCounts) -> None:
        judged = rows.label >= 0
        # counted in bins of float16
        scores = take_scores(table["scores"], rows.position[judged]).astype(np.float16)
        try:
            self.scores = counts + ScoreCounts.from_scores(
                scores, rows.label[judged], counts.classes
            )
        except ValueError as error:
            raise RequestError(f"column 'scores': {error}") from error

    def _count_slices(self, table: pa.Table, column: str) -> None:
        text = pc.fill_null(normalize_labels(table[column]), NO_VALUE).dictionary_encode()
        code = text.indices.to_numpy()
        order = np.argsort(code, kind="stable")
        judged = (*EVALUATED_COLUMNS, self.spec.label_column)
        needed = [n for n in table.schema.names if n in judged]
        ordered = table.select(needed).take(order)
        ends = np.cumsum(np.bincount(code, minlength=len(text.dictionary)))
        for value, end, start in zip(
            text.dictionary.to_pylist(), ends, np.append(0, ends), strict=False
        ):
            rows = read_ok_rows(
                ordered.slice(start, end - start),
                label_column=self.spec.label_column,
                classes=self.spec.classes,
            )
            counts = PredictionCounts.from_rows(rows, self.spec.classes)
            self._add_slice(column, value, counts)

    def _add_slice(self, column: str, value: str, counts: PredictionCounts) -> None:
        found = self.slices[column]
        found[value] = found[value] + counts if value in found else counts
        if len(found) > MAX_SLICES:
            raise RequestError(
                f"slice_by: column {column!r} has more than {MAX_SLICES:,} values; slices are for "
                "groups such as camera or site, give a column with fewer"
            )


def _convert_labels_to_text(table: pa.Table, label_column: str | None) -> pa.Table:
    if label_column is None:
        return table
    labels = table[label_column]
    kind = labels.type.value_type if pa.types.is_dictionary(labels.type) else labels.type
    if pa.types.is_string(kind):
        return table
    index = table.schema.get_field_index(label_column)
    return table.set_column(index, label_column, normalize_labels(labels))
