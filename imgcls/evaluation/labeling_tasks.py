"""Labeling tasks for the selected rows of a run: the images, and the predictions of its model."""

from __future__ import annotations

import posixpath
from typing import Any

import pyarrow as pa

from imgcls.data.annotations.tasks import LabelingTask, LabelingTasks
from imgcls.runs.committed import CommittedRun

_SCORE_DIGITS = 6
"""Digits of a score, a float32, that are written."""


def build_tasks(run: CommittedRun, rows: pa.Table, image_root: str | None) -> LabelingTasks:
    """The tasks for rows of a run, in their order.

    rows:       with absolute paths
    image_root: folder or prefix where a tool's names of images start
    """
    names = [run.path_column, "width", "height", "topk_labels", "topk_scores"]
    names.append("predicted_labels" if run.task == "multilabel" else "predicted_label")
    tasks = [_build_task(run, row) for row in rows.select(names).to_pylist()]
    return LabelingTasks(tasks, run.classes, run.task == "multilabel", _name_model(run), image_root)


def _build_task(run: CommittedRun, row: dict[str, Any]) -> LabelingTask:
    if run.task == "multilabel":
        labels = row["predicted_labels"] or []
    else:
        labels = [] if row["predicted_label"] is None else [row["predicted_label"]]
    top = zip(row["topk_labels"] or (), row["topk_scores"] or (), strict=True)
    scores = {name: round(score, _SCORE_DIGITS) for name, score in top}
    return LabelingTask(
        row[run.path_column],
        tuple(labels),
        tuple(scores.get(name) for name in labels),
        row["width"],
        row["height"],
    )


def _name_model(run: CommittedRun) -> str:
    """Name of the bundle's folder and the start of its hash."""
    model = run.provenance.get("config", {}).get("model")
    folder = posixpath.basename(str(model).rstrip("/")) if model else ""
    return "@".join(each for each in (folder, run.bundle_sha256[:12]) if each)
