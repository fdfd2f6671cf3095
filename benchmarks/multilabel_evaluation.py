"""Time and memory of `imgcls evaluate` for a run with any number of labels per image.

    python -m benchmarks.multilabel_evaluation [--rows 2000000] [--classes 100]

Predictions are generated once and repeated under other file names, as in `benchmarks.evaluation`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.evaluation import commit, measure
from benchmarks.machine import read_cpu
from imgcls.data.manifests.label_columns import LabelColumns, build_name_lists
from imgcls.models.multilabel import MULTILABEL

LABELS_PER_ROW = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--classes", type=int, default=100)
    options = parser.parse_args()
    rows = options.rows
    print(f"CPU: {read_cpu()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="imgcls-bench-") as name:
        folder = Path(name) / "run"
        commit_labels(folder, rows, options.classes)
        seconds, peak, base = measure(folder)
    print(
        f"{rows:,} rows x {options.classes} classes: {seconds:.1f} s, {rows / seconds:,.0f} rows/s,"
        f" peak {peak / 1e6:,.0f} MB, {(peak - base) / 1e6:,.0f} MB over Ray"
    )


def commit_labels(folder: Path, rows: int, classes: int) -> None:
    """Write a committed run of random predictions, as `benchmarks.evaluation` does."""
    manifest = {"label_column": None, "label_columns": LabelColumns("labels").to_json()}
    commit(folder, rows, classes, draw, task="multilabel", manifest=manifest)


def draw(rows: int, names: list[str]) -> pa.Table:
    """Predictions of about three labels per row; scores are higher for the labels."""
    rng = np.random.default_rng(0)
    shape = (rows, len(names))
    targets = (rng.random(shape, np.float32) < LABELS_PER_ROW / len(names)).astype(np.int8)
    logits = rng.standard_normal(shape, np.float32) - 3
    logits += 4 * targets
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    columns = MULTILABEL.build_columns(
        scores, names, [0.5] * len(names), top_k=5, scores_type="float16"
    )
    cameras = pa.array([f"camera {i}" for i in range(20)])
    return pa.table(
        {
            "path": [f"s3://bucket/images/2026/{i:012d}.jpg" for i in range(rows)],
            "labels": build_name_lists(targets, names),
            "camera": cameras.take(pa.array(rng.integers(0, 20, rows))),
            "row": pa.array(np.arange(rows)),
            **columns,
            "width": np.full(rows, 500, np.int32),
            "height": np.full(rows, 375, np.int32),
            "status": pa.array(["ok"] * rows).dictionary_encode(),
        }
    )


if __name__ == "__main__":
    main()
