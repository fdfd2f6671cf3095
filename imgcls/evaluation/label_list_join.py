"""Labels of a multilabel run: those of its manifest, or of a table joined by a key.

A join adds the labels as a matrix, encoded for the classes of the run, so that every form of labels
is read in one way afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from imgcls.data.manifests.label_columns import LabelColumns, LabelMatrix
from imgcls.errors import RequestError
from imgcls.evaluation.config import LabelTableConfig
from imgcls.evaluation.label_join import (
    KEYS,
    KeyedLabels,
    describe_label_table,
    open_label_table,
    read_label_rows,
)
from imgcls.metrics.columns import take_scores
from imgcls.runs.committed import CommittedRun

_TARGETS_COLUMN = "joined_targets"
_UNKNOWN_NAME_COLUMN = "joined_has_unknown_name"
"""Joined columns: the fields of `LabelMatrix`."""


class JoinedLabelLists(KeyedLabels):
    """Any number of labels per key."""

    def __init__(self, config: LabelTableConfig, run: CommittedRun, on: str) -> None:
        """Read the labels. Raises RequestError if the table or a key cannot be used."""
        source = describe_label_table(config)
        manifest = open_label_table(
            config,
            run,
            on,
            label_column=config.column,
            label_delimiter=config.label_delimiter,
            label_columns=config.label_columns,
        )
        columns = manifest.find_label_columns()
        if columns is None:
            raise RequestError(
                f"{source}: has no column of labels (found: {', '.join(manifest.schema.names)}); "
                f"name it with {KEYS.option('label_column')} or {KEYS.option('label_columns')}"
            )
        table = read_label_rows(manifest, [on, *columns.names], source)
        super().__init__(source, run, on, table[on])
        self.columns = columns
        self.classes = run.classes
        self._labels = table.select(list(columns.names)).combine_chunks()

    def attach_labels(self, table: pa.Table, found: np.ndarray) -> pa.Table:
        """Add the targets of each row, and whether it has a name that is no class."""
        labels = self.columns.encode(self._take(found), self.classes, self.source)
        flat = pa.array(labels.targets.ravel())
        added = {
            _TARGETS_COLUMN: pa.FixedSizeListArray.from_arrays(flat, len(self.classes)),
            _UNKNOWN_NAME_COLUMN: pa.array(labels.has_unknown_name),
        }
        for name, column in added.items():
            table = table.append_column(name, column)
        return table

    def take(self, table: pa.Table) -> pa.Table:
        """Label columns of each row of the predictions; null without a match."""
        return self._take(self.find(table))

    def _take(self, found: np.ndarray) -> pa.Table:
        return self._labels.take(pa.array(found, mask=found < 0))


@dataclass(frozen=True)
class LabelReader:
    """Reads the labels of rows of a run.

    columns: of the run; None if they are joined
    """

    columns: LabelColumns | None

    @property
    def names(self) -> list[str]:
        """The columns of the run that are read."""
        return [] if self.columns is None else list(self.columns.names)

    def encode(self, table: pa.Table, classes: tuple[str, ...]) -> LabelMatrix:
        """The labels of a table, joined before if they are no columns of the run."""
        if self.columns is not None:
            return self.columns.encode(table, classes, "the predictions")
        targets = take_scores(table[_TARGETS_COLUMN], np.arange(table.num_rows))
        unknown = table[_UNKNOWN_NAME_COLUMN].to_numpy()
        return LabelMatrix(targets.astype(np.int8, copy=False), unknown)


def resolve_label_lists(
    run: CommittedRun, labels: LabelTableConfig | None, on: str | None, *, required: bool
) -> tuple[LabelReader | None, JoinedLabelLists | None]:
    """Where the labels are, and those to join, if any.

    Raises RequestError if the labels cannot be used, or are required and missing.
    """
    if labels is not None:
        return LabelReader(None), JoinedLabelLists(labels, run, on or run.path_column)
    columns = run.create_counter().label_columns
    if required and columns is None:
        raise RequestError(
            f"{run.url}: has no labels; join some with --labels TABLE, or run `imgcls report`, "
            "which needs no labels"
        )
    return None if columns is None else LabelReader(columns), None


def require_label_lists(
    run: CommittedRun, labels: LabelTableConfig | None, on: str | None
) -> tuple[LabelReader, JoinedLabelLists | None]:
    """As `resolve_label_lists`, for a command that needs labels."""
    reader, joined = resolve_label_lists(run, labels, on, required=True)
    assert reader is not None
    return reader, joined
