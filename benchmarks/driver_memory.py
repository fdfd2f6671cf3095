"""Peak memory of the labelling driver on a small and a large manifest, with the work simulated.

    python benchmarks/driver_memory.py [--rows 10000 5000000]

Planning, the Ray Data pipeline, the ledger, the roll-up and the commit are the real ones; only a
worker's fetch, decode and model are replaced by a table of made-up predictions. Each size runs in a
process of its own, whose peak resident memory is read from the operating system when it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LIMIT_MB = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 5_000_000])
    sizes = parser.parse_args().rows
    print(f"{'rows':>12} {'peak MB':>9} {'seconds':>9} {'rows/s':>10}")
    peaks = []
    for rows in sizes:
        command = [sys.executable, "-m", "benchmarks.driver_memory", "--child", str(rows)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, seconds = map(float, done.stdout.split()[-2:])
        peaks.append(peak)
        print(f"{rows:>12,} {peak:>9.0f} {seconds:>9.1f} {rows / seconds:>10,.0f}", flush=True)
    print(f"growth {peaks[-1] - peaks[0]:.0f} MB (at most {LIMIT_MB})")


class SimulatedWorker:
    """Writes a chunk of made-up predictions where a real worker would write real ones."""

    def __init__(self, spec: Any, threads: int) -> None:
        from imgcls.models.bundle import load_bundle

        self._spec = spec
        self._classes = load_bundle(spec.bundle_url).spec.classes

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        import pickle

        from imgcls import output as names
        from imgcls.labeling import chunk
        from imgcls.labeling.work import Done, Seconds

        work = pickle.loads(batch.column("work")[0].as_py())
        rows = chunk.rows_of(self._spec, work)
        seconds = Seconds()
        count = rows.num_rows
        start = self._spec.plan.rows_of(work.chunk).start
        rng = np.random.default_rng(work.chunk)
        labels = pa.array(self._classes).take(pa.array(rng.integers(0, 2, count)))
        confidence = rng.uniform(0.5, 1, count).astype(np.float32)
        schema = names.prediction_schema(labelled=False)
        columns = {
            "row": np.arange(start, start + count),
            "predicted_label": labels,
            "confidence": confidence,
            "accepted": np.ones(count, bool),
            "topk_labels": [[label] for label in labels.to_pylist()],
            "topk_scores": [[score] for score in confidence],
            "width": np.full(count, 500, np.int32),
            "height": np.full(count, 375, np.int32),
            "status": pa.array(["ok"] * count).dictionary_encode(),
            "error": pa.nulls(count, pa.string()),
        }
        table = pa.table([columns[name] for name in schema.names], schema=schema)
        chunk.commit(self._spec, work, table, seconds)
        done = Done(work, count, 0, seconds, "simulated", str(os.getpid()))
        return {"done": [pickle.dumps(done)]}


def child(rows: int) -> None:
    from benchmarks.workloads import make_bundle
    from imgcls.data.manifest import ManifestConfig
    from imgcls.labeling import pipeline
    from imgcls.labeling.predict import PredictConfig, predict

    with tempfile.TemporaryDirectory(prefix="imgcls-bench-") as name:
        folder = Path(name)
        bundle = make_bundle(folder, "squeezenet1_0")
        manifest = write_manifest(folder / "manifest.parquet", rows)
        pipeline.LabelWorker = SimulatedWorker  # type: ignore[assignment,misc]
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            predict(
                PredictConfig(
                    manifest=ManifestConfig(path=str(manifest)),
                    model=str(bundle),
                    output=str(folder / "out"),
                )
            )
        seconds = time.perf_counter() - start
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds)


def write_manifest(path: Path, rows: int) -> Path:
    with pq.ParquetWriter(path, pa.schema([("path", pa.string())])) as writer:
        for start in range(0, rows, 100_000):
            stop = min(rows, start + 100_000)
            names = [f"camera/{i % 997:04d}/image-{i:09d}.jpg" for i in range(start, stop)]
            writer.write_table(pa.table({"path": names}))
    return path


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]))
    else:
        main()
