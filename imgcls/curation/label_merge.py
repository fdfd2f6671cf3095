"""Merge of labels onto the rows of a manifest, batch by batch.

A row whose image was labeled gets the label in the form of the manifest: text, a list, text with
a separator, or columns of classes. The other rows keep theirs.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.curation.csv_manifest import join_names
from imgcls.curation.label_consensus import LabelNames
from imgcls.curation.label_lookup import read_label_sets
from imgcls.curation.label_stamps import ADDED_COLUMNS, read_stamp
from imgcls.data.manifests.image_columns import is_text
from imgcls.data.manifests.image_urls import read_urls
from imgcls.data.manifests.label_columns import UNKNOWN, LabelColumns, is_list
from imgcls.data.manifests.manifest import Manifest, make_paths_absolute, normalize_labels
from imgcls.errors import ManifestError

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImportedLabel:
    """The label of an image that is written, and where it is from."""

    names: LabelNames
    labeled_by: str | None
    labeled_at: datetime.datetime | None
    source: str


@dataclass(frozen=True)
class _Changes:
    """The labels that rows of a batch get.

    rows, stamped: (N,) index of the label of each row, and of where it is from; -1 for a row that
                   keeps its own
    filled:        (K,) rows that keep their own classes, and get those that are unknown
    filled_places: (K,) indices of their labels
    is_unknown:    (K, C) the unknown classes of these rows; None without columns of classes
    """

    rows: Places
    stamped: Places
    filled: Places = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    filled_places: Places = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    is_unknown: npt.NDArray[np.bool_] | None = None

    @classmethod
    def none(cls, rows: int) -> _Changes:
        """No change of any row."""
        return cls(np.full(rows, -1), np.full(rows, -1))

    def find_places(self, index: int) -> Places:
        """(N,) index of the label of each row for a class, -1 for a row that keeps its own."""
        if self.is_unknown is None:
            return self.rows
        places = self.rows.copy()
        is_unknown = self.is_unknown[:, index]
        places[self.filled[is_unknown]] = self.filled_places[is_unknown]
        return places


class LabelMerger:
    """Merges labels onto a manifest, and counts the rows.

    schema: of the merged rows
    counts: rows by what happened to them: labeled, replaced, confirmed, kept or added
    """

    def __init__(
        self,
        manifest: Manifest,
        labels: Mapping[str, ImportedLabel],
        *,
        several: bool,
        keep_existing: bool,
    ) -> None:
        """labels: by absolute path.

        several: images may have several labels
        keep_existing: a row with another label keeps it
        """
        self._manifest, self._keeps = manifest, keep_existing
        self._labels = list(labels.values())
        self._paths = pa.array(list(labels), pa.large_string())
        self._is_found = np.zeros(len(labels), bool)
        self._is_written = np.zeros(len(labels), bool)
        self._names = [sorted(each.names) for each in self._labels]
        stamps: tuple[Sequence[Any], ...] = (
            [each.labeled_by for each in self._labels],
            [each.labeled_at for each in self._labels],
            [each.source for each in self._labels],
        )
        self._stamps = [
            (field, pa.array(values, field.type))
            for field, values in zip(ADDED_COLUMNS, stamps, strict=True)
        ]
        self.counts: Counter[str] = Counter()
        self._columns = manifest.label_columns
        if self._columns is None and several:
            self._columns = LabelColumns("label")
        empty = manifest.schema.empty_table()
        fields = self._merge(empty, _Changes.none(0)).schema
        place = fields.get_field_index(manifest.path_column)
        fields = fields.set(place, pa.field(manifest.path_column, pa.string()))
        self.schema = pa.schema([each.with_nullable(True) for each in fields])

    def merge(self, batch: pa.RecordBatch) -> pa.Table:
        """The rows of a batch with their labels and absolute paths."""
        paths = read_urls(self._manifest, batch)
        places = pc.fill_null(pc.index_in(paths, value_set=self._paths), -1).to_numpy()
        rows = np.flatnonzero(places >= 0)
        self._is_found[places[rows]] = True
        changes = self._find_changes(batch, rows, places[rows])
        table = make_paths_absolute(self._manifest, pa.Table.from_batches([batch]))
        return self._merge(table, changes).cast(self.schema)

    def _find_changes(self, batch: pa.RecordBatch, rows: Places, places: Places) -> _Changes:
        """What happens to the rows of a batch that have labels, which are counted.

        rows:   (M,) of the batch
        places: (M,) of their labels
        """
        known = batch.take(pa.array(rows))
        previous = read_label_sets(self._manifest, known)
        own = self._read_targets(known)
        stamps = self._read_stamps(known)
        changes = _Changes.none(batch.num_rows)
        filled = []
        for number, (row, place, names) in enumerate(
            zip(rows.tolist(), places.tolist(), previous, strict=True)
        ):
            is_same = names == self._labels[place].names
            is_other = names is not None and not is_same
            if own is not None:
                is_known, is_equal = own[number] != UNKNOWN, own[number] == self._targets[place]
                is_same = bool(is_equal.all())
                is_other = bool((is_known & ~is_equal).any())
            if is_other and self._keeps:
                filled.append(number)
                self.counts["kept"] += 1
                continue
            self._is_written[place] = True
            if not is_same:
                changes.rows[row] = place
            if not is_same or self._replaces_stamp(place, *stamps[number]):
                changes.stamped[row] = place
            self.counts["confirmed" if is_same else "replaced" if is_other else "labeled"] += 1
        if own is None:
            return changes
        return dataclasses.replace(
            changes, filled=rows[filled], filled_places=places[filled],
            is_unknown=own[filled] == UNKNOWN,
        )  # fmt: skip

    def _read_targets(self, rows: pa.RecordBatch) -> npt.NDArray[np.int8] | None:
        """(M, C) labels of rows in columns of classes; None for other manifests."""
        if self._columns is None or not self._columns.per_class:
            return None
        place = f"manifest {self._manifest.source}"
        return self._columns.encode(rows, self._classes, place).targets

    @functools.cached_property
    def _classes(self) -> list[str]:
        """The classes of the columns of classes, and those that the labels add."""
        assert self._columns is not None
        names = {name for names in self._names for name in names}
        return [*self._columns.classes, *sorted(names - set(self._columns.classes))]

    @functools.cached_property
    def _targets(self) -> npt.NDArray[np.int8]:
        """(L, C) whether each label has each class."""
        indices = {name: index for index, name in enumerate(self._classes)}
        targets = np.zeros((len(self._labels), len(indices)), np.int8)
        for place, names in enumerate(self._names):
            targets[place, [indices[name] for name in names]] = 1
        return targets

    def _read_stamps(self, rows: pa.RecordBatch) -> list[tuple[bool, bool]]:
        """Whether each row has an annotator, and a time."""
        by, at = (
            rows.column(field.name).is_valid().to_pylist()
            if field.name in rows.schema.names
            else [False] * rows.num_rows
            for field, _ in self._stamps[:2]
        )
        return list(zip(by, at, strict=True))

    def _replaces_stamp(self, place: int, has_name: bool, has_time: bool) -> bool:
        """Whether a confirmation replaces where the label is from: not with less than is known."""
        label = self._labels[place]
        loses_name = has_name and label.labeled_by is None
        return not loses_name and not (has_time and label.labeled_at is None)

    def build_added_rows(self, others: pa.Table, other_paths: pa.Array) -> pa.Table:
        """Rows for the images that no batch had, in the order of the labels.

        others:      rows of another manifest, whose columns of the same names are used
        other_paths: their absolute paths
        """
        places = np.flatnonzero(~self._is_found)
        paths = self._paths.take(pa.array(places))
        found = pc.index_in(paths, value_set=other_paths)
        columns = []
        for field in self._manifest.schema:
            column = pa.nulls(len(places), field.type)
            if field.name == self._manifest.path_column:
                column = paths
            elif field.name in others.schema.names:
                taken = others.column(field.name).take(found)
                try:
                    column = taken.cast(field.type)
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                    log.emit(
                        "note",
                        f"column {field.name!r} of added rows is null: its type is {taken.type} in "
                        f"the manifest of --images, and {field.type} in {self._manifest.source}",
                    )
            columns.append(column)
        rows = pa.table(columns, names=self._manifest.schema.names)
        self.counts["added"] += len(places)
        self._is_written[places] = True
        return self._merge(rows, _Changes(places, places)).cast(self.schema)

    def find_missing(self) -> pa.Array:
        """The paths of labels that no batch had."""
        return self._paths.take(pa.array(np.flatnonzero(~self._is_found)))

    def find_written(self) -> list[str]:
        """The paths of labels that were written to a row, or confirm it."""
        written: list[str] = self._paths.filter(pa.array(self._is_written)).to_pylist()
        return written

    def _merge(self, table: pa.Table, changes: _Changes) -> pa.Table:
        """Set labels and where they are from."""
        if self._columns is not None and self._columns.per_class:
            table = self._set_class_columns(table, self._columns, changes)
        else:
            name, column = self._convert_labels(table)
            table = _set(table, name, _choose(column, self._label_values, changes.rows))
        for column, values in self._stamps:
            own = read_stamp(table, column, self._manifest.source)
            table = _set(table, column.name, _choose(own, values, changes.stamped))
        return table

    @functools.cached_property
    def _label_values(self) -> pa.Array:
        """The imported labels in the type of the label column."""
        if self._columns is None:
            return pa.array([each[0] for each in self._names], pa.string())
        lists = pa.array(self._names, pa.list_(pa.string()))
        if self._columns.delimiter is None:
            return lists
        return join_names(
            lists,
            self._columns.delimiter,
            f"manifest {self._manifest.source}",
            "merge onto a manifest with lists of labels",
        )

    def _convert_labels(self, table: pa.Table) -> tuple[str, pa.Array]:
        """The name of the label column, and its values in the type of the result."""
        place = f"manifest {self._manifest.source}"
        kind = self._label_values.type
        if self._columns is None:
            name = self._manifest.label_column or "label"
            if name not in table.schema.names:
                return name, pa.nulls(table.num_rows, kind)
            column = table.column(name).combine_chunks()
            return name, column.cast(kind) if is_text(column.type) else normalize_labels(column)
        name = self._columns.names[0]
        if name not in table.schema.names:
            return name, pa.nulls(table.num_rows, kind)
        column = table.column(name).combine_chunks()
        if self._columns.delimiter is not None or (
            is_list(column.type) and is_text(column.type.value_type)
        ):
            return name, column.cast(kind)
        return name, self._columns.read_names(table, place)

    def _set_class_columns(
        self, table: pa.Table, columns: LabelColumns, changes: _Changes
    ) -> pa.Table:
        new = self._classes[len(columns.classes) :]
        for name in new:
            if name in table.schema.names:
                raise ManifestError(
                    f"manifest {self._manifest.source}: column {name!r} is no class column, and "
                    "the export has a class of that name; add it to --onto.label-columns"
                )
        for index, column_name in enumerate([*columns.per_class, *new]):
            if column_name in table.schema.names:
                column = table.column(column_name).combine_chunks()
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                if pa.types.is_null(column.type):
                    column = column.cast(pa.int8())
            else:
                column = pa.nulls(table.num_rows, pa.int8())
            values = _convert_targets(self._targets[:, index], column.type)
            places = changes.find_places(index)
            table = _set(table, column_name, _choose(column, values, places))
        return table


def _convert_targets(targets: npt.NDArray[np.int8], kind: pa.DataType) -> pa.Array:
    """Values 0 and 1 of a class column in its type."""
    if pa.types.is_decimal(kind):  # Arrow refuses the cast of int8 to fewer than three digits
        return pa.array([Decimal(int(value)) for value in targets], kind)
    return pa.array(targets).cast(kind)


def _choose(own: pa.Array, values: pa.Array, places: npt.NDArray[np.int64]) -> pa.Array:
    """The value at `places` of each row, its own one where that is negative."""
    rows = np.flatnonzero(places >= 0)
    if not len(rows):
        return own
    indices = np.arange(len(own))
    indices[rows] = len(own) + np.arange(len(rows))
    chosen = values.take(pa.array(places[rows]))
    return pa.concat_arrays([own, chosen]).take(pa.array(indices))


def _set(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    field = pa.field(name, column.type)
    return (
        table.append_column(field, column) if place < 0 else table.set_column(place, field, column)
    )
