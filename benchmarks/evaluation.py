"""Time and memory of `imgcls evaluate` as the number of predictions grows.

    python -m benchmarks.evaluation [--rows 2000000 20000000] [--classes 1000]

Predictions are generated once and repeated under other file names. Each size is evaluated in
separate processes, whose total peak memory is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import read_cpu
from imgcls.runs import layout

PART_ROWS = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000_000, 20_000_000])
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args()
    print(f"CPU: {read_cpu()}", flush=True)
    print(f"{'rows':>12} {'seconds':>9} {'rows/s':>11} {'peak memory':>12} {'over Ray':>9}")
    found = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="imgcls-bench-") as name:
            folder = Path(name) / "run"
            commit(folder, rows, options.classes)
            seconds, peak, base = measure(folder)
        found.append((rows, seconds))
        print(
            f"{rows:>12,} {seconds:>9.1f} {rows / seconds:>11,.0f} {peak / 1e6:>9,.0f} MB"
            f" {(peak - base) / 1e6:>6,.0f} MB",
            flush=True,
        )
    (few, fast), (many, slow) = found[0], found[-1]
    if many > few:
        print(f"\n{many / few:.0f} times the rows take {slow / fast:.1f} times the time")


def commit(
    folder: Path,
    rows: int,
    classes: int,
    draw: Callable[[int, list[str]], pa.Table] | None = None,
    **fields: Any,
) -> None:
    """Write a committed run of random predictions, in parts of a million rows.

    draw: makes the table of a part from its rows and the class names; `drawn` if None
    fields: of `_run.json`; `manifest` has those of the manifest
    """
    names = [f"class {i:04d}" for i in range(classes)]
    where = folder / layout.PREDICTIONS_FOLDER
    where.mkdir(parents=True)
    files = {}
    first = None
    for part in range(-(-rows // PART_ROWS)):
        name = layout.part_name(part)
        if first is None:
            first = where / name
            table = (draw or drawn)(min(rows, PART_ROWS), names)
            pq.write_table(table, first, row_group_size=65_536)
        else:
            os.link(first, where / name)
        files[name] = first.stat().st_size
    run = {
        "format_version": layout.RUN_FORMAT_VERSION,
        "identity": {
            "manifest": {
                "fingerprint": "0", "path_column": "path", "label_column": "label", "root": "/",
                **fields.pop("manifest", {}),
            },
            "bundle": {"sha256": "0"},
            "settings": {"top_k": 5},
        },
        "plan": {}, "classes": names,
        "provenance": {"config": {"model": "drawn", "manifest": {"path": "drawn"}}},
        **fields,
    }  # fmt: skip
    (folder / layout.RUN_FILE).write_text(json.dumps(run))
    success = {
        "rows": rows, "run_id": "0", "bundle_sha256": "0", "manifest_fingerprint": "0",
        "files": files, "seconds": {"wall": 0.0}, "precision": ["fp32"], "versions": {},
        "committed": "2026-11-28T00:00:00+00:00",
    }  # fmt: skip
    (folder / layout.SUCCESS_FILE).write_text(json.dumps(success))


def drawn(rows: int, names: list[str]) -> pa.Table:
    """Predictions that are right in about three of four rows."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, len(names), rows)
    right = rng.random(rows) < 0.75
    predicted = np.where(right, label, rng.integers(0, len(names), rows))
    right = predicted == label
    confidence = rng.beta(5, np.where(right, 1, 3)).astype(np.float32)
    own = np.where(right, confidence, (1 - confidence) * rng.random(rows)).astype(np.float32)
    texts = pa.array(names)
    top = (predicted[:, None] + np.arange(5)) % len(names)
    offsets = pa.array(np.arange(0, 5 * rows + 1, 5, dtype=np.int32))
    return pa.table(
        {
            "path": [f"s3://bucket/images/2026/{i:012d}.jpg" for i in range(rows)],
            "label": texts.take(pa.array(label)),
            "camera": pa.array([f"camera {i}" for i in range(20)]).take(
                pa.array(rng.integers(0, 20, rows))
            ),
            "row": pa.array(np.arange(rows)),
            "predicted_label": texts.take(pa.array(predicted)),
            "confidence": confidence,
            "accepted": confidence > 0.5,
            "topk_labels": pa.ListArray.from_arrays(offsets, texts.take(pa.array(top.ravel()))),
            "topk_scores": pa.ListArray.from_arrays(
                offsets, pa.array(np.repeat(confidence, 5) / 2)
            ),
            "label_score": own,
            "label_rank": np.where(right, 1, rng.integers(2, 50, rows)).astype(np.int32),
            "width": np.full(rows, 500, np.int32),
            "height": np.full(rows, 375, np.int32),
            "status": pa.array(["ok"] * rows).dictionary_encode(),
        }
    )


def measure(folder: Path) -> tuple[float, float, float]:
    """Seconds of the command, peak bytes of all its processes, and bytes of Ray at the start."""
    command = [
        *(sys.executable, "-m", "imgcls.cli", "evaluate", "--predictions", str(folder)),
        *("--no-thumbnails",),
    ]
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        text=True,
    )
    seen: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            seen.append(memory(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert process.stdout is not None
    base = 0.0
    for line in process.stdout:
        if line.startswith("counted") and not base:
            base = min(seen[-3:], default=0.0)
    code = process.wait()
    stop.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return time.perf_counter() - start, max(seen), base


def memory(pid: int) -> float:
    """Bytes of a process and its descendants (PSS: shared pages divided among processes)."""
    total = 0.0
    try:
        parent = psutil.Process(pid)
        for each in (parent, *parent.children(recursive=True)):
            try:
                total += each.memory_full_info().pss
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total


if __name__ == "__main__":
    main()
