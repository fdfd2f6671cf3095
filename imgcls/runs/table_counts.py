"""Counts of a run's table, from which its metrics are computed, by the task of its bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.data.manifests.manifest import Manifest, normalize_labels
from imgcls.metrics import PredictionCounts
from imgcls.metrics.columns import EVALUATED_COLUMNS, OOD_COLUMN
from imgcls.metrics.multilabel import MultiLabelCounts, read_multilabel_rows
from imgcls.metrics.multilabel.columns import MULTILABEL_COLUMNS
from imgcls.models.bundle import TaskName

RunCounts = PredictionCounts | MultiLabelCounts


def describe_task(task: TaskName) -> dict[str, str]:
    """The entry of `_run.json`: none for single_label, as in version 0.1."""
    return {} if task == "single_label" else {"task": task}


def merge_counts(counts: RunCounts, other: RunCounts) -> RunCounts:
    """Counts of the rows of two parts of a run."""
    merged: RunCounts = counts + other  # both of one class
    return merged


@dataclass(frozen=True)
class TableCounter:
    """Counts the rows of a run, of embeddings alone too.

    classes:       of the bundle, in its order; none for embeddings alone
    label_column:  column of the class names; None when unlabeled or multilabel
    label_columns: columns of the labels for multilabel; None when unlabeled
    """

    classes: tuple[str, ...]
    label_column: str | None = None
    label_columns: LabelColumns | None = None
    task: TaskName = "single_label"

    @classmethod
    def from_manifest(
        cls, manifest: Manifest, classes: Sequence[str], task: TaskName
    ) -> TableCounter:
        """The counter of a run over a manifest."""
        if task == "single_label":
            return cls(tuple(classes), manifest.label_column)
        return cls(tuple(classes), None, manifest.find_label_columns(), task)

    @property
    def label_names(self) -> tuple[str, ...]:
        """All columns of labels."""
        if self.label_columns is not None:
            return self.label_columns.names
        return () if self.label_column is None else (self.label_column,)

    def select_columns(self, schema: pa.Schema) -> list[str]:
        """The columns of a table that are counted."""
        wanted = {*EVALUATED_COLUMNS, *MULTILABEL_COLUMNS, OOD_COLUMN, *self.label_names}
        return [name for name in schema.names if name in wanted]

    def empty(self) -> RunCounts:
        """Counts of no rows."""
        if self.task == "multilabel":
            return MultiLabelCounts.empty(self.classes)
        return PredictionCounts.empty(self.classes)

    def count(self, table: pa.Table) -> RunCounts:
        """Count a table of predictions. Of embeddings alone only the statuses are counted."""
        if not self.classes:
            return PredictionCounts.from_statuses(table["status"])
        if self.task == "multilabel":
            return self._count_multilabel(table)
        if self.label_column is not None:
            index = table.schema.get_field_index(self.label_column)
            text = normalize_labels(table.column(self.label_column))
            table = table.set_column(index, self.label_column, text)
        return PredictionCounts.from_table(
            table, label_column=self.label_column, classes=self.classes
        )

    def _count_multilabel(self, table: pa.Table) -> MultiLabelCounts:
        rows = read_multilabel_rows(table, classes=self.classes)
        if self.label_columns is None:
            return MultiLabelCounts.from_rows(rows, None, self.classes)
        labels = self.label_columns.encode(table, self.classes)
        return MultiLabelCounts.from_rows(
            rows,
            labels.targets[rows.position],
            self.classes,
            unknown_label=int(labels.has_unknown_name[rows.position].sum()),
        )
