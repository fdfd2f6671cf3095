"""Read back the rows that an aggregate selected, and rank possible label errors.

An aggregate keeps the positions of rows; their columns are read here, file by file, in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls.data.manifests.manifest import normalize_labels
from imgcls.data.storage import filesystem
from imgcls.evaluation.label_join import (
    JOINED_COLUMN,
    NO_VALUE,
    JoinedLabels,
    select_run_columns,
)
from imgcls.metrics.columns import Ints
from imgcls.runs.committed import CommittedRun, cast_views

if TYPE_CHECKING:
    from imgcls.evaluation.aggregate import RunAggregate

_SHOWN_COLUMNS = (
    "row",
    "predicted_label",
    "confidence",
    "accepted",
    "topk_labels",
    "topk_scores",
    "width",
    "height",
)


class RowPlaces(Protocol):
    """(N,) files and positions of rows of a run."""

    @property
    def file(self) -> Ints:
        """Indices in `run.files`."""

    @property
    def position(self) -> Ints:
        """Indices of the rows in their files."""


def lookup_rows(
    run: CommittedRun,
    lists: Sequence[RowPlaces],
    label_column: str | None,
    joined: JoinedLabels | None,
    slice_by: Sequence[str] = (),
) -> list[pa.Table]:
    """Read the rows of each list, in its order.

    Columns: row, path, label (null without a label), predicted_label, confidence, label_score,
    accepted, topk_labels, topk_scores, width, height, and `slices`, the values in `slice_by`.
    """
    in_run = select_run_columns(slice_by, joined=joined is not None)
    names = [*_SHOWN_COLUMNS, run.path_column, *in_run]
    if joined is not None:
        names += joined.required_columns
    elif label_column is not None:
        names += [label_column, "label_score"]
    names += ["status"]
    files = np.concatenate([top.file for top in lists])
    positions = np.concatenate([top.position for top in lists])
    table = read_rows(run, files, positions, names)
    if joined is not None:
        table = joined.rejoin(table)
        label_column = JOINED_COLUMN
    label = (
        pa.nulls(table.num_rows, pa.string())
        if label_column is None
        else table[label_column].cast(pa.string())
    )
    score = (
        table["label_score"]
        if "label_score" in table.schema.names
        else pa.nulls(table.num_rows, pa.float32())
    )
    shown = pa.table(
        {
            "row": table["row"],
            "path": table[run.path_column].cast(pa.string()),
            "label": label,
            "predicted_label": table["predicted_label"],
            "confidence": table["confidence"],
            "label_score": score,
            **{name: table[name] for name in _SHOWN_COLUMNS[3:]},
            "slices": read_slices(table, slice_by),
        }
    )
    ends = np.cumsum([len(top.file) for top in lists])
    return [
        shown.slice(end - len(top.file), len(top.file))
        for end, top in zip(ends, lists, strict=True)
    ]


def read_slices(table: pa.Table, slice_by: Sequence[str]) -> pa.Array:
    """(name, value) of each row in the columns that a run is sliced by, as text."""
    columns = [
        pc.fill_null(normalize_labels(table[name]).cast(pa.string()), NO_VALUE).to_pylist()
        for name in slice_by
    ]
    rows = [list(zip(slice_by, values, strict=True)) for values in zip(*columns, strict=True)]
    return pa.array(rows or [[]] * table.num_rows, pa.map_(pa.string(), pa.string()))


def read_rows(
    run: CommittedRun, files: np.ndarray, positions: np.ndarray, names: Sequence[str]
) -> pa.Table:
    """Columns of some rows of a run, in order; files: indices in `run.files`."""
    names = list(dict.fromkeys(names))
    found = [
        read_part_rows(run.files[file], names, positions[files == file])
        for file in np.unique(files)
    ] or [cast_views(pa.schema([run.schema.field(name) for name in names]).empty_table())]
    return pa.concat_tables(found).take(np.argsort(np.argsort(files, kind="stable")))


def read_part_rows(url: str, names: list[str], positions: np.ndarray) -> pa.Table:
    """Rows of a file at the given positions, in their order."""
    order = np.argsort(positions)
    wanted = positions[order]
    taken = []
    start = 0
    with filesystem.open_read(url) as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.metadata.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            here = wanted[(wanted >= start) & (wanted < end)] - start
            if len(here):
                taken.append(cast_views(file.read_row_group(group, columns=names)).take(here))
            start = end
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.concat_tables(taken).unify_dictionaries().take(back)


def rank_label_issues(aggregate: RunAggregate, rows: pa.Table) -> pa.Table:
    """Rows whose label the model contradicts with confidence (possible label errors), worst first.

    rows: the rows of `aggregate.issues`, as `lookup_rows` returns them
    A row is included if its confidence is at least the mean score of the predicted class on the
    rows with that label. Rows are ranked by `margin`, the confidence minus the score of the label.
    Returns row, path, label, predicted_label, confidence, label_score, threshold, margin.
    Source: Northcutt, Jiang, Chuang, "Confident Learning", JAIR 70 (2021): the off-diagonal of the
    confident joint, ranked by normalized margin.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = aggregate.label_score_sum / aggregate.label_score_rows
    names = pa.array(aggregate.spec.classes, pa.string())
    index = pc.index_in(rows["predicted_label"].cast(pa.string()), value_set=names)
    own = np.append(mean, np.nan)[pc.fill_null(index, len(mean)).to_numpy()]
    confidence = rows["confidence"].to_numpy()
    score = rows["label_score"].to_numpy()
    found = confidence >= own  # never for a class without labeled rows, whose mean is NaN
    table = rows.select(
        ["row", "path", "label", "predicted_label", "confidence", "label_score"]
    ).append_column("threshold", pa.array(own, mask=np.isnan(own)))
    table = table.append_column("margin", pa.array(confidence - score, pa.float32()))
    return table.filter(pa.array(found))
