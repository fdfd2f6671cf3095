"""Read the judged columns of a predictions table into numpy arrays.

Settles what each row is (failed, labelled, unlabelled, of an unknown label) and refuses a table
that cannot have come from the model it is read for. Adding anything up is left to `counts`.
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

# Codes beside the class indices 0..C-1.
UNKNOWN_LABEL, NULL_LABEL = -1, -2

PREDICTED_COLUMNS = ("predicted_label", "confidence", "accepted", "status")
EVALUATED_COLUMNS = (*PREDICTED_COLUMNS, "label_score", "label_rank")
"""Columns that `read_ok_rows` reads, and the label column; the last two only with labels."""

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OkRows:
    """The N rows that have a prediction, and how many rows there were of every status."""

    status: dict[str, int]  # all rows of the table by status, sorted by name
    position: Ints  # (N,) where each stands in the table
    predicted: Ints  # (N,) class index
    label: Ints  # (N,) class index, UNKNOWN for a label that is no class, NULL for none
    confidence: Floats  # (N,) in [0, 1]
    accepted: Bools  # (N,) false where the column is null
    label_score: Floats  # (N,) in [0, 1], NaN where it is not known
    label_rank: Ints  # (R,) from 1, of the labelled rows that carry one


def read_ok_rows(
    table: pa.Table | pa.RecordBatch, *, label_column: str | None, classes: Sequence[str]
) -> OkRows:
    """The judged columns of a predictions table; arguments as in `PredictionCounts.of`.

    Raises ValueError when a column is missing, a status is null, or an ok row has no prediction,
    a predicted label that is not a class, a label_score outside [0, 1] or a label_rank below 1.
    """
    table = _select_evaluated(table, label_column)
    status = _as_text(table["status"])
    if status.null_count:
        raise ValueError(f"column 'status' is null in {status.null_count} rows; each row needs one")
    by_status = {c["values"]: c["counts"] for c in pc.value_counts(status).to_pylist()}
    # A row without a prediction counts by its status alone; from here on every row is ok.
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
    )


def encode_classes(column: pa.ChunkedArray, classes: Sequence[str]) -> Ints:
    """(N,) int64 class indices of a column of names; UNKNOWN for no class, NULL for a null.

    Names are compared in Unicode NFC: a decomposed accent is the same letter. A blank name is null.
    A column that does not hold strings is compared by its text, so integer labels match classes
    named "0", "1", ...
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
    return of_entry[entry]


def _encode_names(values: pa.Array, names: pa.Array) -> Ints:
    # Large, because the text of a whole column may pass the 2 GiB that a plain string array holds.
    text = pc.utf8_normalize(values.cast(pa.large_string()), form="NFC")
    text = pc.if_else(pc.equal(pc.utf8_trim_whitespace(text), ""), None, text)
    codes = (
        pc.fill_null(pc.index_in(text, value_set=names), UNKNOWN_LABEL).to_numpy().astype(np.int64)
    )
    if text.null_count:
        codes[pc.is_null(text).to_numpy(zero_copy_only=False)] = NULL_LABEL
    return codes


def take_scores(column: pa.ChunkedArray, rows: Ints) -> NDArray[np.floating[Any]]:
    """(M, C) scores of the rows at `rows` (M,), none of them null, in the type they are stored in.

    column: fixed-size lists of C float32 or float16, null where a row has no prediction
    """
    lists = column.combine_chunks()
    values, width = lists.values, lists.type.list_size
    kind = np.dtype(values.type.to_pandas_dtype())
    # the buffer itself: nulls take room in it, and Arrow would copy all to hand them over
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
    # Filtering copies rows, and a table may carry embeddings and scores per class beside these.
    judged = table.select(needed)
    return pa.Table.from_batches([judged]) if isinstance(judged, pa.RecordBatch) else judged


def _check_predictions(ok: pa.Table, predicted: Ints) -> None:
    if without := int(np.count_nonzero(predicted == NULL_LABEL)) or ok["confidence"].null_count:
        raise ValueError(
            f"{without} rows have status ok but no predicted_label or no confidence;"
            " a row without a prediction must carry another status"
        )
    foreign = np.flatnonzero(predicted == UNKNOWN_LABEL)
    if len(foreign):
        name = ok["predicted_label"][int(foreign[0])].as_py()
        raise ValueError(
            f"{len(foreign)} rows predict a label that is not among the classes, such as {name!r};"
            " these predictions come from another model: pass the classes of its bundle"
        )


def _read_label_scores(ok: pa.Table, labelled: Bools) -> Floats:
    column = ok["label_score"]
    known = labelled & pc.is_valid(column).to_numpy()
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


def _read_label_ranks(ok: pa.Table, labelled: Bools) -> Ints:
    column = ok["label_rank"]
    known = labelled & pc.is_valid(column).to_numpy()
    ranks: Ints = pc.fill_null(column.cast(pa.int64()), 0).to_numpy()[known]
    if len(ranks) and ranks.min() < 1:
        raise ValueError(f"label_rank {ranks.min()} found; ranks start at 1, the prediction")
    return ranks


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # One type for every kind of string, dictionaries that differ by chunk included; large, because
    # the text of a whole column may pass the 2 GiB that a plain string array can address.
    return column.cast(pa.large_string())


def _as_floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
