"""How prediction scales: with rows, with interrupted rows, and with nodes.

    python -m benchmarks.scale work   [--rows 10000 100000 1000000]
    python -m benchmarks.scale plan   [--rows 10000 100000 1000000]
    python -m benchmarks.scale resume [--rows 100000000] [--done 0.5]
    python -m benchmarks.scale nodes  [--nodes 1 2 4 8] [--rows 200000]
    python -m benchmarks.scale paper | cost

  work    images of 32 x 32 through the small CNN, by the command that a user types
  plan    the same with the work simulated: what the driver, the plan and the commit cost
  resume  a run of which a share is done: from the command to the first chunk that is new
  nodes   logical nodes of one CPU each on this machine, the work simulated: who does how much
  paper, cost  see `scale_costs`
Each run has a process of its own, whose time and peak memory are read when it ends. `--spot-price`
(USD per hour for a machine like this one), `--put-price` and `--get-price` (USD per million
requests) give what a million images would cost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pickle
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
from PIL import Image

from benchmarks import scale_costs
from benchmarks.machine import read_cpu

IMAGES = 1000
"""Number of image files; the rows of a manifest repeat them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["work", "plan", "resume", "nodes", "paper", "cost"])
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--chunk-rows", type=int, help="of work and plan; default: automatic")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--done", type=float, default=0.5, help="the share that is done before")
    parser.add_argument("--spot-price", type=float, default=0.04)
    parser.add_argument("--put-price", type=float, default=5.0)
    parser.add_argument("--get-price", type=float, default=0.4)
    scale_costs.add_options(parser)
    options = parser.parse_args()
    if options.what in ("paper", "cost"):
        (scale_costs.show_growth if options.what == "paper" else scale_costs.show_costs)(options)
        return
    print(f"CPU: {read_cpu()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="imgcls-scale-") as folder:
        if options.what in ("work", "plan"):
            grow(options, Path(folder))
        elif options.what == "resume":
            resume(options.rows or [100_000_000], options.done, Path(folder))
        else:
            spread((options.rows or [200_000])[0], options.nodes, Path(folder))


def grow(options: argparse.Namespace, folder: Path) -> None:
    print(
        f"{'rows':>12} {'seconds':>9} {'driver CPU s':>13} {'steady/s':>9} {'us/row':>8} "
        f"{'driver MB':>10} {'written':>8} {'USD per million':>16}"
    )
    simulated = options.what == "plan"
    for rows in options.rows or [10_000, 100_000, 1_000_000]:
        result = in_a_process(
            "label", rows, folder, simulated=simulated, chunk_rows=options.chunk_rows
        )
        steady = result["steady"] or rows / result["seconds"]
        requests = (result["written"] * options.put_price / rows) + (
            0 if simulated else options.get_price
        )
        cost = 1e6 / steady / 3600 * options.spot_price + requests
        print(
            f"{rows:>12,} {result['seconds']:>9.1f} {result['cpu']:>13.1f} {steady:>9,.0f} "
            f"{1e6 / steady:>8.0f} {result['memory']:>10.0f} {result['written']:>8,} {cost:>16.2f}",
            flush=True,
        )


def resume(sizes: list[int], done: float, folder: Path) -> None:
    print(f"{'rows':>12} {'done':>12} {'planned in s':>13} {'resumed in s':>13} {'driver MB':>10}")
    for rows in sizes:
        result = in_a_process("resume", rows, folder, share=done)
        print(
            f"{rows:>12,} {result['done']:>12,} {result['planned']:>13.1f} "
            f"{result['resumed']:>13.1f} {result['memory']:>10.0f}",
            flush=True,
        )


def spread(rows: int, counts: list[int], folder: Path) -> None:
    print(f"{'nodes':>6} {'workers':>8} {'seconds':>9} {'least':>7} {'most':>7}   chunks per node")
    for nodes in counts:
        result = in_a_process("spread", rows, folder, nodes=nodes)
        print(
            f"{nodes:>6} {result['workers']:>8} {result['seconds']:>9.1f} "
            f"{min(result['chunks']):>7} {max(result['chunks']):>7}",
            flush=True,
        )


def in_a_process(what: str, rows: int, folder: Path, **more: Any) -> dict[str, Any]:
    order = json.dumps({"rows": rows, "folder": str(folder), **more})
    command = [sys.executable, "-m", "benchmarks.scale", "--child", what, order]
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    lines = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line[:1] == "{"))
    result["memory"] = result.pop("kilobytes") / 1024
    return result


def child(what: str, order: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        work: Any = {"label": label, "resume": broken_off, "spread": over_nodes}[what]
        result = work(**order)
    used = resource.getrusage(resource.RUSAGE_SELF)
    result |= {"kilobytes": used.ru_maxrss, "cpu": used.ru_utime + used.ru_stime}
    print(json.dumps(result))


def label(rows: int, folder: str, simulated: bool, chunk_rows: int | None = None) -> dict[str, Any]:
    place = Path(folder) / f"{rows}-{simulated}"
    place.mkdir()
    if simulated:
        simulate()
    config = order_for(place, rows, draw(Path(folder)))
    from imgcls.inference.predict import predict

    config = config.model_copy(update={"chunk_rows": chunk_rows})
    start = time.perf_counter()
    predict(config)
    seconds = time.perf_counter() - start
    success = json.loads((place / "out" / "_SUCCESS").read_text())
    plan = json.loads((place / "out" / "_run.json").read_text())["plan"]
    chunks, parts = -(-rows // plan["chunk_rows"]), -(-rows // plan["part_rows"])
    kept = sum(len(files) for _, _, files in os.walk(place / "out"))
    return {
        "seconds": seconds,
        "steady": success["steady_images_per_second"],
        "written": chunks + parts + kept,
    }


def broken_off(rows: int, folder: str, share: float) -> dict[str, Any]:
    """Plan a run, put down what a share of its rows would have left, and take it up again."""
    from imgcls.execution import pipeline
    from imgcls.inference.predict import predict

    place = Path(folder) / f"{rows}-resume"
    place.mkdir()
    config = order_for(place, rows, draw(Path(folder)))
    clock = [time.perf_counter()]

    class BrokenOff(Exception):
        pass

    def stop(*_: Any) -> Any:
        clock.append(time.perf_counter())
        raise BrokenOff

    real: Any = pipeline.Pipeline.run
    replace(stop)
    with contextlib.suppress(BrokenOff):
        predict(config)
    done = leave_behind(place / "out", share)
    simulate()

    def first(*given: Any) -> Any:
        for receipt in real(*given):
            clock.append(time.perf_counter())
            yield receipt
            stop()

    replace(first)
    start = time.perf_counter()
    with contextlib.suppress(BrokenOff):
        predict(config)
    return {"done": done, "planned": clock[1] - clock[0], "resumed": clock[2] - start}


def leave_behind(output: Path, share: float) -> int:
    """Finished parts and, of one more part, half its chunks; the rows that they stand for."""
    from imgcls.execution.plan import parse_plan
    from imgcls.runs import layout

    run = layout.load_run(str(output))
    assert run is not None
    plan = parse_plan(run)
    if plan.num_parts < 2:
        raise SystemExit(f"resume: pass --rows above {plan.part_rows:,}, the rows of a final file")
    full = min(max(1, int(plan.num_parts * share)), plan.num_parts - 1)
    table = made_up(0, plan.part_rows, run["classes"])
    shards = pq.read_table(layout.shard_url(str(output), 0))
    for name in table.schema.names:
        shards = shards.append_column(table.schema.field(name), table.column(name))
    Path(layout.part_url(str(output), 0)).parent.mkdir(parents=True, exist_ok=True)
    first = Path(layout.part_url(str(output), 0))
    pq.write_table(shards, first, compression="zstd")
    for part in range(1, full):
        os.link(first, layout.part_url(str(output), part))
    chunks = plan.chunks_of(full)[: len(plan.chunks_of(full)) // 2]
    Path(layout.part_staging_folder(str(output), full)).mkdir(parents=True, exist_ok=True)
    for chunk in chunks:
        pq.write_table(
            made_up(plan.rows_of(chunk).start, plan.chunk_rows, run["classes"]),
            layout.chunk_url(str(output), full, chunk, plan.run_id),
        )
    return full * plan.part_rows + len(chunks) * plan.chunk_rows


def over_nodes(rows: int, folder: str, nodes: int) -> dict[str, Any]:
    import ray
    from ray.cluster_utils import Cluster

    from imgcls.execution import pipeline
    from imgcls.inference.predict import predict

    place = Path(folder) / f"{nodes}-nodes"
    place.mkdir()
    simulate()
    chunks: collections.Counter[str] = collections.Counter()
    real: Any = pipeline.Pipeline.run

    def counted(*given: Any) -> Any:
        for receipt in real(*given):
            chunks[receipt.worker] += 1
            yield receipt

    replace(counted)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(nodes):
        cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        start = time.perf_counter()
        predict(order_for(place, rows, draw(Path(folder))))
        seconds = time.perf_counter() - start
    finally:
        ray.shutdown()
        cluster.shutdown()
    by_node: collections.Counter[str] = collections.Counter()
    for worker, count in chunks.items():
        by_node[worker.partition("/")[0]] += count
    return {"workers": len(chunks), "seconds": seconds, "chunks": list(by_node.values())}


def order_for(place: Path, rows: int, files: list[str]) -> Any:
    from benchmarks.workloads import make_bundle
    from imgcls.data.manifests.manifest import ManifestConfig
    from imgcls.inference.predict import PredictConfig

    manifest = place / "manifest.parquet"
    with pq.ParquetWriter(manifest, pa.schema([("path", pa.string())])) as writer:
        paths = pa.array(files)
        for start in range(0, rows, 1_000_000):
            wanted = np.arange(start, min(rows, start + 1_000_000)) % len(files)
            writer.write_table(pa.table({"path": paths.take(pa.array(wanted))}))
    return PredictConfig(
        manifest=ManifestConfig(path=str(manifest)),
        model=str(make_bundle(place, "small_cnn")),
        output=str(place / "out"),
        progress_seconds=60,
    )


def draw(folder: Path) -> list[str]:
    target = folder / "images"
    if not target.exists():
        target.mkdir()
        rng = np.random.default_rng(0)
        for number in range(IMAGES):
            small = rng.integers(0, 256, (8, 8, 3), np.uint8)
            image = Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)
            image.save(target / f"{number:04d}.png")
    return sorted(str(path) for path in target.iterdir())


def replace(receipts: Any) -> None:
    """Have the driver call this where it would have work done."""
    from imgcls.execution import pipeline

    pipeline.Pipeline.run = receipts  # type: ignore[method-assign]


def simulate() -> None:
    from imgcls.execution.worker import Job
    from imgcls.inference import predict

    predict.LABELING = Job("labeling", SimulatedWorker)  # type: ignore[arg-type, attr-defined]


class SimulatedWorker:
    """Writes a chunk of made-up predictions where a real worker would write real ones."""

    def __init__(self, spec: Any, threads: int, device: str) -> None:
        import ray

        from imgcls.models.bundle import load_bundle

        self._spec = spec
        self._classes = load_bundle(spec.bundle_url).spec.classes
        self._name = f"{ray.get_runtime_context().get_node_id()}/{os.getpid()}"

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        from imgcls.execution.completed import read_chunk_rows, write_chunk
        from imgcls.execution.messages import ChunkResult, StageTimings

        task = pickle.loads(batch.column("task")[0].as_py())
        rows = read_chunk_rows(self._spec, task).num_rows
        timings = StageTimings()
        table = made_up(self._spec.plan.rows_of(task.chunk).start, rows, self._classes)
        write_chunk(self._spec, task, table, timings)
        result = ChunkResult(task, rows, {"ok": rows}, timings, self._name)
        return {"result": [pickle.dumps(result)]}


def made_up(start: int, count: int, classes: list[str]) -> pa.Table:
    """Predictions of `count` rows from `start` on."""

    from imgcls.runs.schema import build_prediction_schema

    rng = np.random.default_rng(start)
    labels = pa.array(classes).take(pa.array(rng.integers(0, len(classes), count)))
    confidence = pa.array(rng.uniform(0.5, 1, count).astype(np.float32))
    offsets = pa.array(np.arange(count + 1, dtype=np.int32))
    schema = build_prediction_schema(labeled=False)
    columns: dict[str, Any] = {
        "row": np.arange(start, start + count),
        "predicted_label": labels,
        "confidence": confidence,
        "accepted": np.ones(count, bool),
        "topk_labels": pa.ListArray.from_arrays(offsets, labels),
        "topk_scores": pa.ListArray.from_arrays(offsets, confidence),
        "width": np.full(count, 32, np.int32),
        "height": np.full(count, 32, np.int32),
        "status": pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["ok"]),
        "error": pa.nulls(count, pa.string()),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
