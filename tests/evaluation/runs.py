"""Committed runs without a model: random predictions, in the layout of `imgcls predict`."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.runs import layout
from tests.conftest import draw

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def drawn(
    rows: int,
    seed: int = 0,
    *,
    classes: Sequence[str] = CLASSES,
    failed: float = 0.0,
    unlabeled: float = 0.0,
    unknown: float = 0.0,
    sharpness: float = 3.0,
    scores: bool = True,
    threshold: float = 0.5,
) -> pa.Table:
    """A table of predictions with path, label, camera and all columns of `imgcls predict`.

    sharpness: how much the label's logit exceeds the others; higher is a better model
    """
    rng = np.random.default_rng(seed)
    size = len(classes)
    truth = rng.integers(0, size, rows)
    logits = rng.normal(size=(rows, size)).astype(np.float32) * 2
    logits[np.arange(rows), truth] += sharpness
    softmax = np.exp(logits - logits.max(1, keepdims=True))
    softmax = (softmax / softmax.sum(1, keepdims=True)).astype(np.float16)
    exact = softmax.astype(np.float32)
    ok = rng.random(rows) >= failed
    order = np.argsort(-exact, axis=1, kind="stable")
    names = np.array(classes)
    kind = rng.random(rows)
    labels: list[str | None] = names[truth].tolist()
    for i in np.flatnonzero(kind < unlabeled):
        labels[i] = None
    for i in np.flatnonzero((kind >= unlabeled) & (kind < unlabeled + unknown)):
        labels[i] = "unknown"
    evaluated = ok & np.array([label in classes for label in labels])
    rank = 1 + np.argmax(order == truth[:, None], axis=1)
    best = exact[np.arange(rows), order[:, 0]]
    taken = pa.array(np.arange(rows), mask=~ok)
    top = order[:, : min(3, size)]
    columns: dict[str, Any] = {
        "path": [f"images/{i:06d}.jpg" for i in range(rows)],
        "label": pa.array(labels, pa.string()),
        "camera": [f"camera {i % 3}" for i in range(rows)],
        "row": pa.array(np.arange(rows), pa.int64()),
        "predicted_label": pa.array(names[order[:, 0]]).take(taken),
        "confidence": pa.array(best).take(taken),
        "accepted": pa.array((best >= threshold) & ok),
        "topk_labels": pa.array(names[top].tolist(), pa.list_(pa.string())).take(taken),
        "topk_scores": pa.array(
            np.take_along_axis(exact, top, 1).tolist(), pa.list_(pa.float32())
        ).take(taken),
        "label_score": pa.array(exact[np.arange(rows), truth], mask=~evaluated),
        "label_rank": pa.array(rank.astype(np.int32), mask=~evaluated),
    }
    if scores:
        flat = pa.array(softmax.ravel())
        columns["scores"] = pa.FixedSizeListArray.from_arrays(flat, size).take(taken)
    columns["width"] = pa.array(np.full(rows, 64, np.int32))
    columns["height"] = pa.array(np.full(rows, 48, np.int32))
    status = np.where(ok, "ok", "missing")
    columns["status"] = pa.array(status.tolist(), pa.string()).dictionary_encode()
    columns["error"] = pa.array([None if good else "no such file" for good in ok], pa.string())
    return pa.table(columns)


def commit(
    folder: Path,
    table: pa.Table,
    *,
    classes: Sequence[str] = CLASSES,
    label_column: str | None = "label",
    parts: int = 1,
    group_rows: int = 1000,
    bundle_sha256: str = "b" * 64,
    fingerprint: str = "f" * 32,
    model: str = "bundle",
) -> Path:
    """Write a table as the committed output of `imgcls predict`."""
    where = folder / layout.PREDICTIONS_FOLDER
    where.mkdir(parents=True)
    files = {}
    ends = np.linspace(0, table.num_rows, parts + 1).astype(int)
    for part, (start, end) in enumerate(itertools.pairwise(ends)):
        name = layout.part_name(part)
        pq.write_table(table.slice(start, end - start), where / name, row_group_size=group_rows)
        files[name] = (where / name).stat().st_size
    run = {
        "format_version": layout.RUN_FORMAT_VERSION,
        "identity": {
            "manifest": {
                "fingerprint": fingerprint, "path_column": "path", "label_column": label_column,
                "root": str(folder),
            },
            "bundle": {"sha256": bundle_sha256},
            "settings": {"top_k": 3, "threshold": 0.5},
        },
        "plan": {"run_id": "drawn", "rows": table.num_rows, "chunk_rows": 10, "part_rows": 10},
        "provenance": {"config": {"model": model, "manifest": {"path": "drawn.csv"}}},
        "classes": list(classes),
    }  # fmt: skip
    (folder / layout.RUN_FILE).write_text(json.dumps(run))
    success = {
        "rows": table.num_rows, "status": dict(Counter(table["status"].to_pylist())),
        "run_id": "drawn", "bundle_sha256": bundle_sha256,
        "manifest_fingerprint": fingerprint, "files": files, "seconds": {"wall": 1.0},
        "precision": ["fp32"], "versions": {"imgcls": "0"}, "committed": "2026-01-01T00:00:00",
        "settings": {"top_k": 3},
    }  # fmt: skip
    (folder / layout.SUCCESS_FILE).write_text(json.dumps(success))
    return folder


def draw_images(folder: Path, rows: int, size: tuple[int, int]) -> None:
    """Write the images of a run, but for every 50th."""
    (folder / "images").mkdir()
    for i in range(rows):
        if i % 50:
            color = ("red", "green", "blue")[i % 3]
            draw(color, size, seed=i).save(folder / "images" / f"{i:06d}.jpg")
