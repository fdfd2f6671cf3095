"""Aggregate a run in one pass: counts for all metrics, and the rows to show in the report.

Small runs are read in this process, large ones by Ray Data in pieces. Aggregates of parts merge to
that of the whole, in any order, so the result does not depend on how the work was split. Only the
columns that are counted are read. Memory is bounded by classes, slices and the number of shown
rows, not by the rows of the run.
"""

from __future__ import annotations

import pickle
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls import log
from imgcls.cluster import session
from imgcls.data.manifests.manifest import normalize_labels
from imgcls.data.storage import filesystem, storage_settings
from imgcls.errors import RequestError
from imgcls.evaluation.class_samples import SAMPLES_PER_CLASS, ClassSamples
from imgcls.evaluation.label_join import NO_VALUE, KeyedLabels, select_run_columns
from imgcls.metrics import PredictionCounts
from imgcls.metrics.columns import (
    EVALUATED_COLUMNS,
    OOD_COLUMN,
    PREDICTED_COLUMNS,
    Floats,
    Ints,
    OkRows,
    read_ok_rows,
    take_scores,
)
from imgcls.metrics.discrimination import ScoreCounts
from imgcls.metrics.label_sets import SET_COLUMN, SetCounts
from imgcls.metrics.multilabel import MultiLabelCounts
from imgcls.metrics.selective import SelectiveCounts
from imgcls.runs.committed import CommittedRun, RowGroupRange, cast_views

MAX_SLICES = 1_000
PIECE_ROWS = 1_000_000
BATCH_ROWS = 262_144
_BATCH_BYTES = 128_000_000
_NAME_BYTES = 32
"""Memory of a name in a label set, about; the largest sets have all classes."""
MAX_LOCAL_ROWS = 2_000_000
"""Larger runs are aggregated by Ray Data; this number of rows is counted before Ray has started."""


class Aggregate(Protocol):
    """Counts and top rows of the rows added so far; those of parts merge to that of the whole."""

    @property
    def rows(self) -> int:
        """Number of rows added."""

    def add(self, table: pa.Table, file: int, start: int) -> None:
        """Add rows of file number `file`, from its row `start` on."""

    def merge(self, other: Any) -> None:
        """Add the rows of another aggregate with the same settings."""


A = TypeVar("A", bound=Aggregate)
C = TypeVar("C", PredictionCounts, MultiLabelCounts)
_A = TypeVar("_A", bound=Aggregate, covariant=True)


class AggregateSettings(Protocol[_A]):
    """Settings from which each process makes an aggregate."""

    @property
    def score_bytes(self) -> int:
        """Bytes of the scores of a row, 0 if they are not read."""

    @property
    def batch_rows(self) -> int:
        """Maximum number of rows that are added at once."""

    def create(self) -> _A:
        """An aggregate of no rows."""

    def list_columns(self, joined: KeyedLabels | None = None) -> list[str]:
        """Columns of the run that are needed; labels may be joined from elsewhere."""


@dataclass(frozen=True)
class AggregateSpec:
    """Settings of the aggregate of a run with one label per image.

    label_column: column of the true labels; None for an unlabeled run
    slice_by: columns to slice by: counts are also kept for each of their values
    scores: whether to count the scores of all classes
    sets: whether to count the label sets
    ood: whether to count and keep the rows that are out of distribution
    gallery: rows to keep of each kind that the report shows
    issues: maximum number of possible label errors to keep
    """

    classes: tuple[str, ...]
    label_column: str | None
    slice_by: tuple[str, ...] = ()
    scores: bool = False
    sets: bool = False
    ood: bool = False
    gallery: int = 24
    issues: int = 100_000

    @property
    def score_bytes(self) -> int:
        """As for `AggregateSettings`."""
        return 2 * len(self.classes) if self.scores else 0

    @property
    def batch_rows(self) -> int:
        """As for `AggregateSettings`."""
        return BATCH_ROWS

    def create(self) -> RunAggregate:
        """As for `AggregateSettings`."""
        return RunAggregate(self)

    def list_columns(self, joined: KeyedLabels | None = None) -> list[str]:
        """As for `AggregateSettings`."""
        names = [*PREDICTED_COLUMNS, *self.slice_by]
        if joined is not None:
            names = select_run_columns(names, joined=True) + joined.required_columns
        elif self.label_column is not None:
            names += [self.label_column, "label_score", "label_rank"]
        if self.scores:
            names.append("scores")
        if self.sets:
            names.append(SET_COLUMN)
        if self.ood:
            names += [OOD_COLUMN, "ood_score"]
        return list(dict.fromkeys(names))


@dataclass(eq=False)
class TopRows:
    """The `size` rows with the highest value; ties go to the first rows of the run."""

    size: int
    value: Floats = field(default_factory=lambda: np.zeros(0))
    file: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    position: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, value: Floats, file: Ints, position: Ints) -> None:
        """Add rows: (N,) values, indices of their files, and positions in the files."""
        if len(self.value) == self.size and self.size:
            last = (self.file[-1], self.position[-1])
            earlier = (file < last[0]) | ((file == last[0]) & (position < last[1]))
            chosen = (value > self.value[-1]) | ((value == self.value[-1]) & earlier)
            value, file, position = value[chosen], file[chosen], position[chosen]
        value = np.concatenate([self.value, value])
        file = np.concatenate([self.file, file])
        position = np.concatenate([self.position, position])
        order = np.lexsort((position, file, -value))[: self.size]
        self.value, self.file, self.position = value[order], file[order], position[order]


class RunAggregate:
    """Counts and top rows of the rows added so far.

    label_score_sum, label_score_rows: (C,) sum and number of the scores of the label, by label
    mistakes: wrong rows with the highest confidence
    uncertain: rows with the lowest confidence
    issues: wrong rows by confidence minus the score of their label
    strangest: rows with the highest OOD score
    samples: rows of each predicted class, of an unlabeled run
    """

    def __init__(self, spec: AggregateSpec) -> None:
        size = len(spec.classes)
        self.spec = spec
        self.counts = PredictionCounts.empty(spec.classes)
        self.selective = SelectiveCounts.empty(spec.classes)
        self.scores = ScoreCounts.empty(spec.classes) if spec.scores else None
        self.sets = SetCounts.empty(spec.classes) if spec.sets else None
        self.label_score_sum, self.label_score_rows = np.zeros(size), np.zeros(size, np.int64)
        self.slices: dict[str, dict[str, PredictionCounts]] = {n: {} for n in spec.slice_by}
        self.mistakes, self.uncertain = TopRows(spec.gallery), TopRows(spec.gallery)
        self.issues = TopRows(spec.issues)
        self.strangest = TopRows(spec.gallery if spec.ood else 0)
        self.samples = ClassSamples(size, SAMPLES_PER_CLASS)

    @property
    def rows(self) -> int:
        """Number of rows added."""
        return self.counts.rows

    def add(self, table: pa.Table, file: int, start: int) -> None:
        """Add rows of file number `file`, from its row `start` on.

        Raises RequestError for predictions that no run with these classes wrote.
        """
        spec = self.spec
        table = _convert_labels_to_text(table, spec.label_column)
        try:
            rows = read_ok_rows(table, label_column=spec.label_column, classes=spec.classes)
            self.counts += PredictionCounts.from_rows(rows, spec.classes)
        except ValueError as error:
            raise RequestError(f"the predictions cannot be evaluated: {error}") from error
        self.selective += SelectiveCounts.from_rows(rows, spec.classes)
        self._keep_top_rows(rows, file, start)
        if self.scores is not None:
            self._count_scores(table, rows, self.scores)
        if spec.ood:
            keep_strangest(self.strangest, table["ood_score"], rows.position, file, start)
        if self.sets is not None:
            self._count_sets(table, rows, self.sets)
        for column in spec.slice_by:
            self._count_slices(table, column)

    def merge(self, other: RunAggregate) -> None:
        """Add the rows of another aggregate."""
        self.counts += other.counts
        self.selective += other.selective
        if self.scores is not None and other.scores is not None:
            self.scores += other.scores
        if self.sets is not None and other.sets is not None:
            self.sets += other.sets
        self.label_score_sum = self.label_score_sum + other.label_score_sum
        self.label_score_rows = self.label_score_rows + other.label_score_rows
        for column, found in other.slices.items():
            for value, counts in found.items():
                add_slice(self.slices, column, value, counts)
        for mine, theirs in (
            (self.mistakes, other.mistakes),
            (self.uncertain, other.uncertain),
            (self.issues, other.issues),
            (self.strangest, other.strangest),
        ):
            mine.add(theirs.value, theirs.file, theirs.position)
        self.samples.merge(other.samples)

    def _keep_top_rows(self, rows: OkRows, file: int, start: int) -> None:
        position = start + rows.position
        files = np.full(len(position), file, np.int64)
        if self.spec.label_column is None:
            self.samples.add(rows.predicted, files, position)
        wrong = (rows.label >= 0) & (rows.label != rows.predicted)
        self.mistakes.add(rows.confidence[wrong], files[wrong], position[wrong])
        self.uncertain.add(-rows.confidence, files, position)
        scored = ~np.isnan(rows.label_score)
        against = wrong & scored
        margin = (rows.confidence - rows.label_score)[against]
        self.issues.add(margin, files[against], position[against])
        label, score, size = rows.label[scored], rows.label_score[scored], len(self.label_score_sum)
        self.label_score_sum = self.label_score_sum + np.bincount(label, score, size)
        self.label_score_rows = self.label_score_rows + np.bincount(label, minlength=size)

    def _count_scores(self, table: pa.Table, rows: OkRows, counts: ScoreCounts) -> None:
        labeled = rows.label >= 0
        # counted in bins of float16
        scores = take_scores(table["scores"], rows.position[labeled]).astype(np.float16)
        try:
            self.scores = counts + ScoreCounts.from_scores(
                scores, rows.label[labeled], counts.classes
            )
        except ValueError as error:
            raise RequestError(f"column 'scores': {error}") from error

    def _count_sets(self, table: pa.Table, rows: OkRows, counts: SetCounts) -> None:
        column = table[SET_COLUMN].take(pa.array(rows.position))
        try:
            self.sets = counts + SetCounts.from_column(column, rows.label, counts.classes)
        except ValueError as error:
            raise RequestError(f"the label sets cannot be evaluated: {error}") from error

    def _count_slices(self, table: pa.Table, column: str) -> None:
        evaluated = (*EVALUATED_COLUMNS, OOD_COLUMN, self.spec.label_column)
        needed = [n for n in table.schema.names if n in evaluated]
        order, groups = group_rows(table[column])
        ordered = table.select(needed).take(order)
        for value, members in groups:
            rows = read_ok_rows(
                ordered.slice(members.start, members.stop - members.start),
                label_column=self.spec.label_column,
                classes=self.spec.classes,
            )
            counts = PredictionCounts.from_rows(rows, self.spec.classes)
            add_slice(self.slices, column, value, counts)


def keep_strangest(
    top: TopRows, column: pa.ChunkedArray, position: Ints, file: int, start: int
) -> None:
    """Add the OOD scores of the rows at some positions of a table that starts at row `start`."""
    value = column.take(pa.array(position)).to_numpy().astype(np.float64)
    known = ~np.isnan(value)  # null in a history, for runs of other bundles
    position = start + position[known]
    top.add(value[known], np.full(len(position), file, np.int64), position)


def group_rows(column: pa.ChunkedArray) -> tuple[Ints, list[tuple[str, slice]]]:
    """Order of rows that sorts them by value, and the part of it with each value, as text."""
    text = pc.fill_null(normalize_labels(column), NO_VALUE).dictionary_encode()
    code = text.indices.to_numpy()
    ends = np.cumsum(np.bincount(code, minlength=len(text.dictionary)))
    parts = [slice(start, end) for start, end in zip(np.append(0, ends), ends, strict=False)]
    order = np.argsort(code, kind="stable")
    return order, list(zip(text.dictionary.to_pylist(), parts, strict=True))


def add_slice(slices: dict[str, dict[str, C]], column: str, value: str, counts: C) -> None:
    """Add the counts of one value of a column. Raises RequestError for too many values."""
    found = slices[column]
    found[value] = found[value] + counts if value in found else counts
    if len(found) > MAX_SLICES:
        raise RequestError(
            f"slice_by: column {column!r} has more than {MAX_SLICES:,} values; slices are for "
            "groups such as camera or site, pass a column with fewer"
        )


def aggregate_run(
    run: CommittedRun, spec: AggregateSettings[A], joined: KeyedLabels | None = None
) -> A:
    """Aggregate all rows of a run.

    joined: labels that replace the run's own; joined in this process, which has them in memory
    Raises RequestError for predictions that no run with these classes wrote.
    """
    pieces = run.split_row_groups(PIECE_ROWS)
    total = spec.create()
    if joined is not None or run.rows + run.rows * spec.score_bytes // 256 <= MAX_LOCAL_ROWS:
        for piece in pieces:
            _add_piece(total, spec, run, piece, joined)
        if joined is not None:
            joined.finish()
        return total
    for part in _aggregate_on_cluster(run, spec, pieces):
        total.merge(part)
    return total


def _aggregate_on_cluster(
    run: CommittedRun, spec: AggregateSettings[A], pieces: list[RowGroupRange]
) -> Iterator[A]:
    import ray.data

    from imgcls.cluster.ray_data import own_data_settings

    session.connect()
    started = time.monotonic()
    aggregate = storage_settings.bind_settings(_aggregate_piece, run, spec)
    with own_data_settings():
        dataset = ray.data.from_items(
            [{"piece": pickle.dumps(piece)} for piece in pieces], override_num_blocks=len(pieces)
        ).map(aggregate)
    done = 0
    for row in dataset.iter_rows():
        part: A = pickle.loads(zlib.decompress(row["aggregate"]))
        done += part.rows
        seconds = time.monotonic() - started
        log.show(f"counted {done:,} of {run.rows:,} rows ({done / seconds:,.0f}/s)")
        yield part


def _aggregate_piece(
    run: CommittedRun, spec: AggregateSettings[A], row: dict[str, Any]
) -> dict[str, Any]:
    part = spec.create()
    _add_piece(part, spec, run, pickle.loads(row["piece"]), None)
    # the bins of scores, mostly small numbers, shrink to a fraction: parts wait in memory
    data = pickle.dumps(part, protocol=pickle.HIGHEST_PROTOCOL)
    return {"aggregate": zlib.compress(data, 1)}


def _add_piece(
    total: A,
    spec: AggregateSettings[A],
    run: CommittedRun,
    piece: RowGroupRange,
    joined: KeyedLabels | None,
) -> None:
    start = piece.first_row
    for table in read_piece(run, piece, spec.list_columns(joined), spec.batch_rows):
        if joined is not None:
            table = joined.join(table)
        total.add(table, piece.file, start)
        start += table.num_rows


def read_piece(
    run: CommittedRun, piece: RowGroupRange, names: list[str], batch_rows: int = BATCH_ROWS
) -> Iterator[pa.Table]:
    """Columns of a piece, batch by batch, text as dictionaries.

    batch_rows: maximum number of rows of a batch; fewer with scores or label sets of many classes
    """
    text = [
        name
        for name in names
        if pa.types.is_string(run.schema.field(name).type) and name != run.path_column
    ]
    rows = batch_rows
    if "scores" in names:
        rows = max(1_024, min(rows, _BATCH_BYTES // (2 * len(run.classes))))
    if SET_COLUMN in names:
        rows = max(1_024, min(rows, _BATCH_BYTES // (_NAME_BYTES * len(run.classes))))
    with filesystem.open_read(run.files[piece.file]) as stream:
        file = pq.ParquetFile(stream, read_dictionary=text)
        for batch in file.iter_batches(rows, row_groups=list(piece.row_groups), columns=names):
            yield cast_views(pa.Table.from_batches([batch]))


def _convert_labels_to_text(table: pa.Table, label_column: str | None) -> pa.Table:
    if label_column is None:
        return table
    labels = table[label_column]
    kind = labels.type.value_type if pa.types.is_dictionary(labels.type) else labels.type
    if pa.types.is_string(kind):
        return table
    index = table.schema.get_field_index(label_column)
    return table.set_column(index, label_column, normalize_labels(labels))
