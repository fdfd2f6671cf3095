"""Committed multilabel runs without a model: random scores, in the layout of `imgcls predict`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.models.multilabel import MULTILABEL
from imgcls.runs import layout
from tests.evaluation.runs import CLASSES, commit


class DrawnCells(NamedTuple):
    """Cells whose labels are drawn from the scores of `logits`; (N, C)."""

    logits: NDArray[np.float64]
    targets: NDArray[np.int8]


def draw_cells(
    rows: int, seed: int = 0, *, biases: Sequence[float] = (-1, -1, 0, -2, -3), unknown: float = 0.0
) -> DrawnCells:
    """Cells of a calibrated model: a label is drawn with the probability of its score."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(rows, 1))
    logits = 2 * rng.normal(size=(rows, len(biases))) + common + np.array(biases, float)
    targets = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    targets[rng.random(logits.shape) < unknown] = -1
    return DrawnCells(logits, targets)


def build_table(
    logits: NDArray[np.float64],
    targets: NDArray[np.int8] | None,
    *,
    classes: Sequence[str] = CLASSES,
    kind: str = "float32",
    threshold: float = 0.5,
    failed: float = 0.0,
    listed: bool = True,
) -> pa.Table:
    """The table of `imgcls predict` with these logits and labels.

    listed: a column of lists; otherwise one column per class, null where unknown
    """
    rows = len(logits)
    scores = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
    ok = np.random.default_rng(1).random(rows) >= failed
    made = MULTILABEL.build_columns(
        scores, classes, [threshold] * len(classes), top_k=3, scores_type=kind
    )
    place = pa.array(np.arange(rows), mask=~ok)
    columns: dict[str, Any] = {"path": [f"images/{row:06d}.jpg" for row in range(rows)]}
    if targets is not None and listed:
        columns["labels"] = pa.array(
            [[classes[c] for c in np.flatnonzero(row == 1)] for row in targets],
            pa.list_(pa.string()),
        )
    elif targets is not None:
        for c, name in enumerate(classes):
            columns[name] = pa.array(targets[:, c].astype(np.int64), mask=targets[:, c] < 0)
    columns["camera"] = [f"camera {row % 3}" for row in range(rows)]
    columns["row"] = pa.array(np.arange(rows), pa.int64())
    columns |= {name: column.take(place) for name, column in made.items()}
    columns["accepted"] = columns["accepted"].fill_null(False)
    columns["width"] = columns["height"] = pa.array(np.full(rows, 64, np.int32))
    columns["status"] = pa.array(np.where(ok, "ok", "missing").tolist()).dictionary_encode()
    columns["error"] = pa.array([None if good else "no such file" for good in ok], pa.string())
    return pa.table(columns)


def commit_multilabel(
    folder: Path, table: pa.Table, *, classes: Sequence[str] = CLASSES, **changes: Any
) -> Path:
    """Write a table of `build_table` as the committed output of `imgcls predict`."""
    labels = None
    if "labels" in table.schema.names:
        labels = LabelColumns("labels")
    elif classes[0] in table.schema.names:
        labels = LabelColumns(per_class=tuple(classes))
    label_column, root = changes.pop("label_column", None), changes.pop("root", None)
    commit(folder, table, classes=classes, label_column=label_column, **changes)
    record = json.loads((folder / layout.RUN_FILE).read_text())
    record["task"] = "multilabel"
    if root is not None:
        record["identity"]["manifest"]["root"] = root
    if labels is not None and label_column is None:
        record["identity"]["manifest"]["label_columns"] = labels.to_json()
    (folder / layout.RUN_FILE).write_text(json.dumps(record))
    return folder
