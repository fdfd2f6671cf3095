"""Read label lists of a table into (N, C) matrices, without Python code per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls.data.manifests.label_columns import is_list
from imgcls.metrics.columns import (
    OOD_COLUMN,
    UNKNOWN_LABEL,
    Bools,
    Ints,
    encode_classes,
)

LABELS_COLUMN = "predicted_labels"
MULTILABEL_COLUMNS = (LABELS_COLUMN, "accepted", "status")
"""Columns that `read_multilabel_rows` reads, besides `is_ood` if the table has it."""


@dataclass(frozen=True, eq=False)
class MultiLabelRows:
    """The N rows of a table that have a prediction; C classes.

    Attributes
    ----------
    status : dict of str to int
        All rows of the table by status, sorted by name.
    position : ndarray of int64, shape (N,)
        Index of each row in the table. `columns.take_scores` reads their scores.
    predicted : ndarray of bool, shape (N, C)
        Whether a class is predicted.
    accepted : ndarray of bool, shape (N,)
        False where the column is null.
    is_ood : ndarray of bool, shape (M,), or None
        Of the rows that a bundle with an out-of-distribution detector predicted; None for a table
        without this column.
    """

    status: dict[str, int]
    position: Ints
    predicted: Bools
    accepted: Bools
    is_ood: Bools | None = None


class ListMatrix(NamedTuple):
    """Label lists of N rows as a matrix.

    present: (N, C) bool, whether a class is in the list
    is_null: (N,) bool, rows without a list
    unknown_names: (N,) bool, rows with a name that is not a class
    """

    present: Bools
    is_null: Bools
    unknown_names: Bools


def read_multilabel_rows(
    table: pa.Table | pa.RecordBatch, *, classes: Sequence[str]
) -> MultiLabelRows:
    """Read the rows with a prediction.

    Parameters
    ----------
    table : pyarrow.Table or pyarrow.RecordBatch
        Columns predicted_labels (lists of strings), accepted (bool), status (string), and is_ood
        (bool) if the bundle detects it. Strings may be large or dictionary-encoded. Only the status
        is read of rows that are not ok.
    classes : sequence of str
        The C class names of the bundle, in its order.

    Returns
    -------
    MultiLabelRows

    Raises
    ------
    ValueError
        If a column is missing, a status is null, or an ok row has no list of predicted labels or a
        predicted label that is not a class.

    Examples
    --------
    >>> table = pa.table(
    ...     {
    ...         "predicted_labels": [["cat", "dog"], [], None],
    ...         "accepted": [True, False, None],
    ...         "status": ["ok", "ok", "missing"],
    ...     }
    ... )
    >>> read_multilabel_rows(table, classes=["cat", "dog"]).predicted.tolist()
    [[True, True], [False, False]]
    """
    names = table.schema.names
    if missing := [name for name in MULTILABEL_COLUMNS if name not in names]:
        raise ValueError(
            f"the predictions table has no column {', '.join(missing)} (found: {', '.join(names)})"
        )
    has_ood = OOD_COLUMN in names and pa.types.is_boolean(table.schema.field(OOD_COLUMN).type)
    selected = table.select([*MULTILABEL_COLUMNS, *([OOD_COLUMN] if has_ood else [])])
    if isinstance(selected, pa.RecordBatch):
        selected = pa.Table.from_batches([selected])

    status = selected["status"].cast(pa.large_string())
    if status.null_count:
        raise ValueError(f"column 'status' is null in {status.null_count} rows; each row needs one")
    by_status = {c["values"]: c["counts"] for c in pc.value_counts(status).to_pylist()}
    is_ok = pc.equal(status, "ok")
    ok = selected.filter(is_ok)
    return MultiLabelRows(
        status=dict(sorted(by_status.items())),
        position=np.flatnonzero(is_ok.to_numpy()),
        predicted=_read_predicted(ok[LABELS_COLUMN], classes),
        accepted=pc.fill_null(ok["accepted"].cast(pa.bool_()), False).to_numpy(),
        is_ood=ok[OOD_COLUMN].drop_null().to_numpy() if has_ood else None,
    )


def _read_predicted(column: pa.ChunkedArray, classes: Sequence[str]) -> Bools:
    found = encode_label_lists(column, classes)
    if without := int(np.count_nonzero(found.is_null)):
        raise ValueError(
            f"{without} rows have status ok but no {LABELS_COLUMN}; a row to which no class applies"
            " has an empty list, and a row without a prediction must have another status"
        )
    foreign = np.flatnonzero(found.unknown_names)
    if len(foreign):
        labels = column[int(foreign[0])].as_py()
        raise ValueError(
            f"{len(foreign)} rows predict a label that is not among the classes, such as one of"
            f" {labels!r}; these predictions come from another model: pass the classes of its"
            " bundle"
        )
    return found.present


def encode_label_lists(column: pa.ChunkedArray | pa.Array, classes: Sequence[str]) -> ListMatrix:
    """Matrix of a column of label lists.

    Parameters
    ----------
    column : pyarrow.ChunkedArray or pyarrow.Array
        N lists of names: list, large_list or fixed-size list, of strings or dictionary-encoded
        strings. Other values are compared by their text.
    classes : sequence of str
        The C class names. Names are compared in Unicode NFC, as in `columns.encode_classes`.

    Returns
    -------
    ListMatrix
        Null or blank names in a list are ignored.

    Raises
    ------
    ValueError
        If the column has no lists.

    Examples
    --------
    >>> column = pa.chunked_array([[["dog"], ["cat", "fox"], [], None]])
    >>> found = encode_label_lists(column, ["cat", "dog"])
    >>> found.present.astype(int).tolist()
    [[0, 1], [1, 0], [0, 0], [0, 0]]
    >>> found.is_null.tolist(), found.unknown_names.tolist()
    ([False, False, False, True], [False, True, False, False])
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    rows = len(column)
    found = ListMatrix(
        np.zeros((rows, len(classes)), np.bool_), np.ones(rows, np.bool_), np.zeros(rows, np.bool_)
    )
    if pa.types.is_null(column.type):
        return found
    if not is_list(column.type):
        raise ValueError(
            f"labels are {column.type}, expected lists of strings; write one list per row, also for"
            " a row with a single label"
        )
    start = 0
    for chunk in chunks:
        part = slice(start, start + len(chunk))
        _encode_chunk(chunk, classes, ListMatrix(*(array[part] for array in found)))
        start += len(chunk)
    return found


def _encode_chunk(chunk: pa.Array, classes: Sequence[str], into: ListMatrix) -> None:
    """Write the lists of a chunk into the rows of a matrix."""
    into.is_null[:] = chunk.is_null().to_numpy(zero_copy_only=False)
    lists = chunk.drop_null()
    size = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.flatnonzero(~into.is_null), size)
    values = lists.flatten()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = values.dictionary_encode()  # so that each name is normalized once
    code = encode_classes(pa.chunked_array([values]), classes)
    is_class = code >= 0
    into.present[row[is_class], code[is_class]] = True
    into.unknown_names[row[code == UNKNOWN_LABEL]] = True
