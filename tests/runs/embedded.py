"""Committed runs with embeddings, and bundles of one body with different heads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, load_bundle, save_bundle
from imgcls.runs import layout
from imgcls.runs.schema import build_prediction_schema

CLASSES = ["red", "green", "blue"]
OTHERS = ["dark", "light"]
PART_ROWS = 8


def save_with_head(
    folder: Path, classes: Sequence[str], head_seed: int, name: str = "small_cnn", **spec: Any
) -> Path:
    """A bundle of one random body, whatever the head."""
    architecture = zoo.resolve_architecture(name, {"width": 8} if name == "small_cnn" else None)
    torch.manual_seed(0)
    body = zoo.build_network(architecture, len(CLASSES)).state_dict()
    network = zoo.build_network(architecture, len(classes))
    torch.manual_seed(head_seed)
    _, head = zoo.find_head(network)
    head.reset_parameters()
    heads = tuple(f"{name}." for name in zoo.find_heads(network))
    weights = network.state_dict()
    weights |= {key: value for key, value in body.items() if not key.startswith(heads)}
    preprocess = spec.pop("preprocess", zoo.get_default_preprocess(architecture))
    save_bundle(
        str(folder),
        BundleSpec(architecture=architecture, classes=list(classes), preprocess=preprocess, **spec),
        weights,
    )
    return folder


def commit_run(
    folder: Path, bundle: Path, rows: int = 20, *, kind: str = "float32", lost: Sequence[int] = ()
) -> np.ndarray:
    """Commit a run with random embeddings; returns them, (rows, E) float32.

    Row 5 failed. lost: rows that are ok and have no embedding
    """
    made = load_bundle(str(bundle))
    network = zoo.build_network(made.spec.architecture, len(CLASSES))
    width = zoo.get_embedding_width(network)
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(kind)
    failed = np.arange(rows) == 5
    schema = build_prediction_schema(labeled=True, embedding=width, embedding_type=kind)
    columns: dict[str, Any] = {
        name: pa.nulls(rows, schema.field(name).type) for name in schema.names
    }
    columns |= {
        "row": pa.array(range(rows), pa.int64()),
        "accepted": pa.array(~failed),
        "embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.ravel()),
            width,
            mask=pa.array(failed | np.isin(np.arange(rows), lost)),
        ),
        "width": pa.array([64] * rows, pa.int32()),
        "status": pa.array(np.where(failed, "missing", "ok").tolist()).dictionary_encode(),
        "error": pa.array(["no such file" if each else None for each in failed], pa.string()),
    }
    kept = {
        "path": [f"{row}.jpg" for row in range(rows)],
        "label": [("dark", "light", "fox", None)[row % 4] for row in range(rows)],
        "camera": pa.array([f"c{row % 2}" for row in range(rows)]).dictionary_encode(),
    }
    table = pa.table({**kept, **{name: columns[name] for name in schema.names}})
    parts = folder / layout.PREDICTIONS_FOLDER
    parts.mkdir(parents=True)
    files = {}
    for part, start in enumerate(range(0, max(rows, 1), PART_ROWS)):
        name = layout.part_name(part)
        pq.write_table(table.slice(start, PART_ROWS), parts / name)
        files[name] = (parts / name).stat().st_size
    manifest = {"fingerprint": "f", "path_column": "path", "label_column": "label", "root": "/"}
    run = {
        "identity": {
            "manifest": manifest,
            "bundle": {"sha256": made.sha256},
            "settings": {"top_k": 2, "threshold": 0.0, "embeddings": kind},
        },
        "plan": {"run_id": "first", "rows": rows, "chunk_rows": 4, "part_rows": PART_ROWS},
        "provenance": {"config": {"model": str(bundle), "manifest": {"path": "m.csv"}}},
        "classes": CLASSES,
    }
    layout.write_run(str(folder), run)
    success = {
        "rows": rows, "files": files, "run_id": "first", "bundle_sha256": made.sha256,
        "manifest_fingerprint": "f", "precision": ["fp32"],
        "committed": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    (folder / layout.SUCCESS_FILE).write_text(json.dumps(success))
    return vectors.astype(np.float32)


def drop_predictions(folder: Path) -> None:
    """Make a run of `commit_run` one of `imgcls embed`."""
    for file in (folder / layout.PREDICTIONS_FOLDER).iterdir():
        table = pq.read_table(file)
        kept = build_prediction_schema(labeled=False, has_predictions=False, embedding=1).names
        names = [name for name in table.schema.names if name in (*kept, "path", "label", "camera")]
        pq.write_table(table.select(names), file)
    run = layout.load_run(str(folder))
    assert run is not None
    run["identity"]["settings"]["has_predictions"] = False
    layout.write_run(str(folder), {**run, "classes": []})
