"""A folder of outputs of all kinds, most of them made by the functions that make real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from imgcls.evaluation.evaluate import evaluate
from imgcls.inference.history import CompactConfig, compact
from imgcls.models.bundle import load_bundle, load_bundle_weights, save_bundle
from imgcls.runs import layout
from tests.conftest import write_manifest
from tests.evaluation.runs import commit, drawn

LABELED = ("path", "label", "labeled_by", "labeled_at", "label_source")


def change_json(file: Path, **changes: Any) -> None:
    """Set top-level entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def train_bundle(folder: Path, source: Path, manifest: Path | None = None, **entries: Any) -> Any:
    """A copy of a bundle with the provenance of a training on a manifest."""
    from imgcls.data.manifests.manifest import ManifestConfig, open_manifest

    bundle = load_bundle(str(source))
    made: dict[str, Any] = {
        "created": "2026-01-01T01:00:00+00:00",
        "git_commit": "c0ffee",
        "versions": {"imgcls": "0.1.0"},
        "seed": 7,
        **entries,
    }
    if manifest is not None:
        fingerprint = open_manifest(ManifestConfig(path=str(manifest))).fingerprint()
        record = {"manifest": str(manifest), "fingerprint": fingerprint, "rows": 3}
        made["config"] = {"data": {"train": {"path": str(manifest)}}, "model": {"weights": "w.pth"}}
        made["data"] = {
            "manifests": {"data.train": record},
            "train_rows": 3,
            "val_rows": 40,
            "val_failed": 0,
        }
    spec = bundle.spec.model_copy(update={"provenance": made, "metrics": {"val_accuracy": 0.75}})
    return save_bundle(str(folder), spec, load_bundle_weights(bundle))


def write_labels(file: Path) -> Path:
    """A training manifest whose labels come from two annotators."""
    rows = [
        ("images/000001.jpg", "ant", "ann", "2026-01-01", "imgcls"),
        ("images/000002.jpg", "bee", "bob", "2026-01-03", "cvat"),
        ("images/000003.jpg", "bee", "ann", "2026-01-02", "imgcls"),
    ]
    return write_manifest(file, rows, LABELED)


def commit_night(
    folder: Path, sequence: int, bundle: Any, *, seed: int = 1, table: pa.Table | None = None
) -> Path:
    """A committed run of the folder of nights, with its metrics."""
    rows = drawn(60, seed, failed=0.1) if table is None else table
    commit(folder, rows, bundle_sha256=bundle.sha256, model=bundle.url)
    change_json(folder / layout.RUN_FILE, sequence=sequence, began=f"2026-01-0{sequence}T02:00:00")
    success = {
        "committed": f"2026-01-0{sequence}T03:00:00+00:00",
        "steady_images_per_second": 81.5,
        "seconds": {"wall": 61.0},
    }
    change_json(folder / layout.SUCCESS_FILE, **success)
    evaluate(predictions=str(folder), thumbnails=False)
    return folder


def make_outputs(folder: Path, source: Path) -> dict[str, Any]:
    """Two bundles, two committed nights of each, a history, an evaluation; returns the bundles."""
    labels = write_labels(folder / "train.csv")
    old = train_bundle(folder / "models" / "old", source, labels)
    new = train_bundle(folder / "models" / "new", source, labels, seed=8)
    commit_night(folder / "labels" / "date=2026-01-01", 1, old)
    night = commit_night(folder / "labels" / "date=2026-01-02", 2, new, seed=2)
    evaluate(predictions=str(night), output=str(folder / "evaluated"), thumbnails=False)
    compact(CompactConfig(source=str(folder / "labels"), output=str(folder / "latest")))
    return {"old": old, "new": new}
