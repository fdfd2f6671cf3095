"""Committed multilabel runs without a model: random predictions, in the layout of a real run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcls.data.manifests.label_columns import LabelColumns, build_name_lists
from imgcls.models.multilabel import MULTILABEL
from imgcls.models.ood import OodScores
from imgcls.runs import layout
from tests.evaluation.runs import commit

CLASSES = ("ant", "bee", "cat", "dog", "eel")
LISTS = LabelColumns("labels")
THRESHOLDS = (0.5, 0.4, 0.6, 0.5, 0.3)


def draw_targets(rows: int, seed: int = 0, classes: int = len(CLASSES)) -> npt.NDArray[np.int8]:
    """(N, C) int8 targets, all known; the classes have different frequencies."""
    rng = np.random.default_rng(seed)
    return (rng.random((rows, classes)) < np.linspace(0.1, 0.5, classes)).astype(np.int8)


def draw_scores(
    targets: npt.NDArray[np.int8], seed: int = 0, sharpness: float = 2.0
) -> npt.NDArray[np.float16]:
    """(N, C) float16 scores that are higher for the labels."""
    rng = np.random.default_rng(seed + 1000)
    logits = rng.normal(size=targets.shape) - 1 + sharpness * (targets > 0)
    return (1 / (1 + np.exp(-logits))).astype(np.float16)


def build_run_table(
    targets: npt.NDArray[np.int8],
    scores: npt.NDArray[np.floating[Any]],
    *,
    classes: Sequence[str] = CLASSES,
    failed: float = 0.0,
    unlabeled: float = 0.0,
    labels: str | None = "lists",
    scores_type: str = "float16",
    ood: bool = False,
    embedding: bool = False,
) -> pa.Table:
    """A table of predictions.

    labels: "lists": column `labels`; "columns": one column per class; None: no labels
    """
    rows = len(targets)
    rng = np.random.default_rng(1)
    ok = rng.random(rows) >= failed
    taken = pa.array(np.arange(rows), mask=~ok)
    columns: dict[str, Any] = {"path": [f"images/{i:06d}.jpg" for i in range(rows)]}
    if labels == "lists":
        names = build_name_lists(targets, classes)
        kept = pa.array(np.arange(rows), mask=rng.random(rows) < unlabeled)
        columns["labels"] = names.take(kept)
    elif labels == "columns":
        for code, name in enumerate(classes):
            columns[name] = pa.array(targets[:, code], mask=targets[:, code] < 0)
    columns["camera"] = [f"camera {i % 3}" for i in range(rows)]
    columns["row"] = pa.array(np.arange(rows), pa.int64())
    found = None
    if ood:
        values = rng.random(rows).astype(np.float32)
        found = OodScores(values, values > 0.9)
    predicted = MULTILABEL.build_columns(
        scores.astype(np.float32),
        classes,
        THRESHOLDS[: len(classes)] if len(classes) <= len(THRESHOLDS) else [0.5] * len(classes),
        top_k=3,
        ood=found,
        scores_type=scores_type,
    )
    for name, column in predicted.items():
        columns[name] = column.take(taken)
    columns["accepted"] = pa.array(columns["accepted"].fill_null(False))
    if embedding:
        flat = pa.array(rng.normal(size=rows * 8).astype(np.float32))
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, 8).take(taken)
    columns["width"] = pa.array(np.full(rows, 64, np.int32))
    columns["height"] = pa.array(np.full(rows, 48, np.int32))
    status = np.where(ok, "ok", "missing")
    columns["status"] = pa.array(status.tolist(), pa.string()).dictionary_encode()
    columns["error"] = pa.array([None if good else "no such file" for good in ok], pa.string())
    return pa.table(columns)


def commit_multilabel(
    folder: Path,
    table: pa.Table,
    *,
    labels: LabelColumns | None = LISTS,
    classes: Sequence[str] = CLASSES,
    **options: Any,
) -> Path:
    """Write a table as the committed output of a multilabel bundle."""
    commit(folder, table, classes=classes, label_column=None, **options)
    place = folder / layout.RUN_FILE
    run = json.loads(place.read_text())
    run["task"] = "multilabel"
    if labels is not None:
        run["identity"]["manifest"]["label_columns"] = labels.to_json()
    place.write_text(json.dumps(run))
    return folder
