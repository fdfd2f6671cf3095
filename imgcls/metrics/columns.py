"""Read the columns of a predictions table that evaluation needs into numpy arrays.

Determines what each row is (failed, labeled, unlabeled, with an unknown label) and rejects a table
that another model wrote. Counting is in `counts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imgcls.metrics.calibration import ROUNDING_TOLERANCE

# Codes besides the class indices 0..C-1.
UNKNOWN_LABEL, NULL_LABEL = -1, -2

PREDICTED_COLUMNS = ("predicted_label", "confidence", "accepted", "status")
EVALUATED_COLUMNS = (*PREDICTED_COLUMNS, "label_score", "label_rank")
"""Columns that `read_ok_rows` reads besides the label column; the last two only with labels."""
_MAX_BATCH_CELLS, _MIN_BATCH_ROWS = 8_000_000, 1_024
OOD_COLUMN = "is_ood"
"""Column that it reads if the table has it."""

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OkRows:
    """The N rows of a table that have a prediction.

    Attributes
    ----------
    status : dict of str to int
        All rows of the table by status, sorted by name.
    position : ndarray of int64, shape (N,)
        Index of each row in the table.
    predicted : ndarray of int64, shape (N,)
        Class indices.
    label : ndarray of int64, shape (N,)
        Class indices; UNKNOWN_LABEL for a label that is not a class, NULL_LABEL without a label.
    confidence : ndarray of float64, shape (N,)
        Values in [0, 1].
    accepted : ndarray of bool, shape (N,)
        False where the column is null.
    label_score : ndarray of float64, shape (N,)
        Values in [0, 1]; NaN where unknown.
    label_rank : ndarray of int64, shape (R,)
        Ranks from 1 of the labeled rows that have one.
    is_ood : ndarray of bool, shape (M,), or None
        Of the rows that a bundle with an out-of-distribution detector predicted; None for a table
        without this column.
    """

    status: dict[str, int]
    position: Ints
    predicted: Ints
    label: Ints
    confidence: Floats
    accepted: Bools
    label_score: Floats
    label_rank: Ints
    is_ood: Bools | None = None


def read_ok_rows(
    table: pa.Table | pa.RecordBatch, *, label_column: str | None, classes: Sequence[str]
) -> OkRows:
    """Read the rows with a prediction.

    Parameters
    ----------
    table : pyarrow.Table or pyarrow.RecordBatch
        Predictions, as for `PredictionCounts.from_table`.
    label_column : str or None
        Column of the true labels; None for an unlabeled run.
    classes : sequence of str
        The C class names of the bundle, in its order.

    Returns
    -------
    OkRows

    Raises
    ------
    ValueError
        If a column is missing, a status is null, or an ok row has no prediction, a predicted label
        that is not a class, a label_score outside [0, 1] or a label_rank below 1.
    """
    table = _select_evaluated(table, label_column)
    status = _as_text(table["status"])
    if status.null_count:
        raise ValueError(f"column 'status' is null in {status.null_count} rows; each row needs one")
    by_status = {c["values"]: c["counts"] for c in pc.value_counts(status).to_pylist()}
    # Of a row without a prediction only the status counts; from here on every row is ok.
    is_ok = pc.equal(status, "ok")
    ok = table.filter(is_ok)

    predicted = encode_classes(ok["predicted_label"], classes)
    _check_predictions(ok, predicted)
    label = np.full(len(predicted), NULL_LABEL, dtype=np.int64)
    scores, ranks = np.full(len(predicted), np.nan), np.zeros(0, dtype=np.int64)
    if label_column is not None:
        label = encode_classes(ok[label_column], classes)
        scores, ranks = _read_label_scores(ok, label >= 0), _read_label_ranks(ok, label >= 0)
    return OkRows(
        status=dict(sorted(by_status.items())),
        position=np.flatnonzero(is_ok.to_numpy()),
        predicted=predicted,
        label=label,
        confidence=_as_floats(ok["confidence"]),
        accepted=pc.fill_null(ok["accepted"].cast(pa.bool_()), False).to_numpy(),
        label_score=scores,
        label_rank=ranks,
        is_ood=ok[OOD_COLUMN].drop_null().to_numpy() if _has_ood(ok) else None,
    )


def encode_classes(column: pa.ChunkedArray, classes: Sequence[str]) -> Ints:
    """Class indices of a column of names.

    Parameters
    ----------
    column : pyarrow.ChunkedArray
        N names. Another type than strings is compared by its text, so integer labels match classes
        named "0", "1", ...
    classes : sequence of str
        Class names. Names are compared in Unicode NFC: a decomposed accent is the same letter.

    Returns
    -------
    ndarray of int64, shape (N,)
        UNKNOWN_LABEL (-1) for a name that is not a class, NULL_LABEL (-2) for null, NaN or a blank
        name.

    Examples
    --------
    >>> encode_classes(pa.chunked_array([["dog", "fox", None]]), ["cat", "dog"]).tolist()
    [1, -1, -2]
    >>> encode_classes(pa.chunked_array([[7.0, float("nan")]]), ["3", "7"]).tolist()
    [1, -2]
    """
    names = pc.utf8_normalize(pa.array(classes, pa.large_string()), form="NFC")
    parts = [_encode_chunk(chunk, names) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _encode_chunk(chunk: pa.Array, names: pa.Array) -> Ints:
    if not pa.types.is_dictionary(chunk.type):
        return _encode_names(chunk, names)
    # the names of a dictionary once, not those of every row
    of_entry = np.append(_encode_names(chunk.dictionary, names), NULL_LABEL)
    entry = pc.fill_null(chunk.indices.cast(pa.int64()), len(of_entry) - 1).to_numpy()
    codes: Ints = of_entry[entry]
    return codes


def _encode_names(values: pa.Array, names: pa.Array) -> Ints:
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)  # integers of pandas with a gap
    # Large, because the text of a whole column may exceed the 2 GiB of a plain string array.
    text = pc.utf8_normalize(values.cast(pa.large_string()), form="NFC")
    text = pc.if_else(pc.equal(pc.utf8_trim_whitespace(text), ""), None, text)
    index = pc.index_in(text, value_set=names)
    codes: Ints = pc.fill_null(index, UNKNOWN_LABEL).to_numpy().astype(np.int64)
    if text.null_count:
        codes[pc.is_null(text).to_numpy(zero_copy_only=False)] = NULL_LABEL
    return codes


def limit_batch_rows(num_classes: int, max_rows: int) -> int:
    """Maximum number of rows of a batch with a value of each class, which bounds its memory.

    max_rows: the maximum for few classes
    """
    return max(_MIN_BATCH_ROWS, min(max_rows, _MAX_BATCH_CELLS // max(1, num_classes)))


def take_scores(column: pa.ChunkedArray, rows: Ints) -> NDArray[np.floating[Any]]:
    """Scores of some rows, in their stored type.

    Parameters
    ----------
    column : pyarrow.ChunkedArray
        Fixed-size lists of C float32 or float16, null where a row has no prediction.
    rows : ndarray of int64, shape (M,)
        Indices of rows that are not null.

    Returns
    -------
    ndarray of float32 or float16, shape (M, C)

    Examples
    --------
    >>> lists = pa.FixedSizeListArray.from_arrays(pa.array([0.25, 0.75, 1.0, 0.0], pa.float32()), 2)
    >>> take_scores(pa.chunked_array([lists]), np.array([1])).tolist()
    [[1.0, 0.0]]
    """
    lists = column.combine_chunks()
    values, width = lists.values, lists.type.list_size
    kind = np.dtype(values.type.to_pandas_dtype())
    # the buffer itself: nulls occupy room in it, and Arrow would copy all of it
    flat = np.frombuffer(values.buffers()[1], kind)[values.offset :]
    every = flat[: len(flat) // width * width].reshape(-1, width)
    return np.asarray(every[lists.offset + rows])


def _select_evaluated(table: pa.Table | pa.RecordBatch, label_column: str | None) -> pa.Table:
    needed = list(PREDICTED_COLUMNS)
    if label_column is not None:
        needed += [label_column, *EVALUATED_COLUMNS[len(PREDICTED_COLUMNS) :]]
    if missing := [name for name in needed if name not in table.schema.names]:
        raise ValueError(
            f"the predictions table has no column {', '.join(missing)}"
            f" (found: {', '.join(table.schema.names)})"
        )
    if _has_ood(table):
        needed.append(OOD_COLUMN)
    # Filtering copies rows, and a table may also have embeddings and scores.
    selected = table.select(needed)
    return pa.Table.from_batches([selected]) if isinstance(selected, pa.RecordBatch) else selected


def _has_ood(table: pa.Table | pa.RecordBatch) -> bool:
    """Whether the table has the column; a manifest may have one of this name and another type."""
    names = table.schema.names
    return OOD_COLUMN in names and pa.types.is_boolean(table.schema.field(OOD_COLUMN).type)


def _check_predictions(ok: pa.Table, predicted: Ints) -> None:
    if without := int(np.count_nonzero(predicted == NULL_LABEL)) or ok["confidence"].null_count:
        raise ValueError(
            f"{without} rows have status ok but no predicted_label or no confidence;"
            " a row without a prediction must have another status"
        )
    foreign = np.flatnonzero(predicted == UNKNOWN_LABEL)
    if len(foreign):
        name = ok["predicted_label"][int(foreign[0])].as_py()
        raise ValueError(
            f"{len(foreign)} rows predict a label that is not among the classes, such as {name!r};"
            " these predictions come from another model: pass the classes of its bundle"
        )


def _read_label_scores(ok: pa.Table, labeled: Bools) -> Floats:
    column = ok["label_score"]
    known = labeled & pc.is_valid(column).to_numpy()
    scores = np.where(known, _as_floats(pc.fill_null(column.cast(pa.float64()), 0.0)), np.nan)
    # Written so that a NaN fails too.
    if known.any() and not (
        scores[known].min() >= 0 and scores[known].max() <= 1 + ROUNDING_TOLERANCE
    ):
        raise ValueError(
            f"label_score ranges over [{scores[known].min()}, {scores[known].max()}], expected"
            " [0, 1] without NaN; it must be a softmax score, not a logit"
        )
    return scores


def _read_label_ranks(ok: pa.Table, labeled: Bools) -> Ints:
    column = ok["label_rank"]
    known = labeled & pc.is_valid(column).to_numpy()
    ranks: Ints = pc.fill_null(column.cast(pa.int64()), 0).to_numpy()[known]
    if len(ranks) and ranks.min() < 1:
        raise ValueError(f"label_rank {ranks.min()} found; ranks start at 1, the prediction")
    return ranks


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # One type for every kind of string, dictionaries that differ by chunk included; large, because
    # the text of a whole column may exceed the 2 GiB of a plain string array.
    return column.cast(pa.large_string())


def _as_floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
