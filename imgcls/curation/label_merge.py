"""Merge of labels onto the rows of a manifest, batch by batch.

A row whose image was labeled gets the label in the form of the manifest: text, a list, text with
a separator, or columns of classes. The other rows keep theirs.
"""

from __future__ import annotations

import datetime
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.curation.csv_manifest import join_names
from imgcls.curation.label_consensus import LabelNames
from imgcls.curation.label_lookup import read_label_sets, read_paths
from imgcls.data.manifests.image_columns import is_text
from imgcls.data.manifests.label_columns import LabelColumns, is_list
from imgcls.data.manifests.manifest import Manifest, make_paths_absolute, normalize_labels
from imgcls.errors import ManifestError

TIME_TYPE = pa.timestamp("us", tz="UTC")
ADDED_COLUMNS = (
    pa.field("labeled_by", pa.string()),
    pa.field("labeled_at", TIME_TYPE),
    pa.field("label_source", pa.string()),
)
"""Who gave the label, when, and with which tool; null for a label that was not imported."""


@dataclass(frozen=True)
class ImportedLabel:
    """The label of an image that is written, and where it is from."""

    names: LabelNames
    labeled_by: str | None
    labeled_at: datetime.datetime | None
    source: str


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
        fields = self._merge(empty, np.empty(0, np.int64), np.empty(0, np.int64)).schema
        place = fields.get_field_index(manifest.path_column)
        fields = fields.set(place, pa.field(manifest.path_column, pa.string()))
        self.schema = pa.schema([each.with_nullable(True) for each in fields])

    def merge(self, batch: pa.RecordBatch) -> pa.Table:
        """The rows of a batch with their labels and absolute paths."""
        paths = read_paths(self._manifest, batch)
        places = pc.fill_null(pc.index_in(paths, value_set=self._paths), -1).to_numpy()
        rows = np.flatnonzero(places >= 0)
        self._is_found[places[rows]] = True
        changed = np.full(batch.num_rows, -1)
        stamped = np.full(batch.num_rows, -1)
        previous = read_label_sets(self._manifest, batch.take(pa.array(rows)))
        for row, names in zip(rows.tolist(), previous, strict=True):
            place = places[row]
            is_same = names == self._labels[place].names
            if names is not None and not is_same and self._keeps:
                self.counts["kept"] += 1
                continue
            stamped[row] = place
            if not is_same:
                changed[row] = place
            self.counts["confirmed" if is_same else "labeled" if names is None else "replaced"] += 1
        table = pa.Table.from_batches([batch])
        return self._merge(make_paths_absolute(self._manifest, table), changed, stamped).cast(
            self.schema
        )

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
        return self._merge(rows, places, places).cast(self.schema)

    def find_missing(self) -> pa.Array:
        """The paths of labels that no batch had."""
        return self._paths.take(pa.array(np.flatnonzero(~self._is_found)))

    def _merge(
        self, table: pa.Table, changed: npt.NDArray[np.int64], stamped: npt.NDArray[np.int64]
    ) -> pa.Table:
        """Set labels and where they are from.

        changed, stamped: index of the label of each row, -1 for a row that keeps its own
        """
        if self._columns is not None and self._columns.per_class:
            table = self._set_class_columns(table, self._columns, changed)
        else:
            name, column = self._convert_labels(table)
            table = _set(table, name, _choose(column, self._label_values, changed))
        for field, values in self._stamps:
            column = self._convert_stamp(table, field)
            table = _set(table, field.name, _choose(column, values, stamped))
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

    @functools.cached_property
    def _class_values(self) -> dict[str, pa.Array]:
        """Whether each imported label has a class, for the columns of classes."""
        assert self._columns is not None
        classes = {name for names in self._names for name in names} | set(self._columns.classes)
        return {
            name: pa.array([name in each.names for each in self._labels], pa.bool_())
            for name in sorted(classes)
        }

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
        self, table: pa.Table, columns: LabelColumns, changed: npt.NDArray[np.int64]
    ) -> pa.Table:
        new = [name for name in self._class_values if name not in columns.classes]
        for name in new:
            if name in table.schema.names:
                raise ManifestError(
                    f"manifest {self._manifest.source}: column {name!r} is no class column, and "
                    "the export has a class of that name; add it to --onto.label-columns"
                )
        pairs = [*zip(columns.per_class, columns.classes, strict=True), *zip(new, new, strict=True)]
        for column_name, class_name in pairs:
            if column_name in table.schema.names:
                column = table.column(column_name).combine_chunks()
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
            else:
                column = pa.nulls(table.num_rows, pa.int8())
            values = self._class_values[class_name]
            if is_text(column.type):
                values = values.cast(pa.int8())
            table = _set(table, column_name, _choose(column, values.cast(column.type), changed))
        return table

    def _convert_stamp(self, table: pa.Table, field: pa.Field) -> pa.Array:
        if field.name not in table.schema.names:
            return pa.nulls(table.num_rows, field.type)
        column = table.column(field.name).combine_chunks()
        try:
            return column.cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ManifestError(
                f"manifest {self._manifest.source}: has a column {field.name!r} of the type "
                f"{column.type}, which an import of labels writes as {field.type}; rename it"
            ) from error


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
