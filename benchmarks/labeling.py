"""Throughput of `imgcls predict` against the limits of this machine and against other tools.

    python -m benchmarks.labeling [--models resnet18] [--images imagenet] [--rows 4000]
                                  [--repeats 3] [--peers all]

Over the same files, in turn, in one run, and reported as medians, in images per second:
  limits  decoding alone by each route, the network alone, both together, in bare processes
  imgcls  `imgcls predict` as a user runs it; the whole command, and after start-up
  peers   Ray Data, Daft, timm, a DataLoader loop and Hugging Face's pipeline, each as documented
          and tuned to the same precision; the whole program, from its imports to its output
The networks have random weights: what they predict does not matter here. Prints a table, and leaves
a bar chart and a Parquet file with a description of the machine in bench-results/.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import limits, peers
from benchmarks.workloads import (
    CORES,
    KINDS,
    SAMPLE,
    make_bundle,
    make_images,
    mean_size,
    read_manifest,
    write_manifest,
)

RESULTS = Path("bench-results")
PATIENCE = 1200
"""Seconds that a peer may take."""
LIMIT, PLAIN = "limit: both", "limit: both by torchvision"
STEADY, WHOLE = "imgcls, after start-up", "imgcls, whole job"


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="imgcls-bench-") as name:
        for model in options.models:
            for kind in options.images:
                folder = Path(name) / f"{model}-{kind}"
                folder.mkdir()
                measure(model, kind, folder, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["resnet18"])
    parser.add_argument("--images", nargs="+", default=["imagenet"], choices=KINDS)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["all"], help="all, or names of peers")
    parser.add_argument("--peer-repeats", type=int, default=1, help="some take minutes")
    parser.add_argument("--source", type=Path, default=SAMPLE, help="a folder of photographs")
    options = parser.parse_args()
    if not options.source.is_dir():
        parser.error(f"no folder {options.source}; name one of photographs with --source")
    unknown = set(options.peers) - {"all", *peers.PEERS}
    if unknown:
        parser.error(f"no peer {unknown.pop()!r}; there are {', '.join(peers.PEERS)}")
    return options


def measure(model: str, kind: str, folder: Path, options: argparse.Namespace) -> None:
    images = make_images(kind, options.source, folder)
    manifest = write_manifest(folder, images, options.rows)
    bundle = make_bundle(folder, model)
    print(
        f"{model}, {kind} images of {mean_size(images) / 1000:.0f} KB, {options.rows:,} rows; "
        f"{processor()}, {CORES} cores",
        flush=True,
    )
    names = list(peers.PEERS) if "all" in options.peers else options.peers
    measured: dict[str, list[float]] = {}
    for repeat in range(options.repeats):
        for what in limits.WHAT:
            if repeat and not what.startswith("both"):
                continue
            note(measured, f"limit: {what}", limits.measure(what, bundle, manifest))
        whole, steady = measure_imgcls(bundle, manifest, folder / f"out-{repeat}")
        note(measured, STEADY, steady)
        note(measured, WHOLE, whole)
        for name in names if repeat < options.peer_repeats else ():
            rate = measure_peer(name, model, manifest, folder / f"{name}-{repeat}")
            if rate is not None:
                note(measured, name, rate)
    report(measured)
    keep(measured, model, kind, options.rows)


def note(measured: dict[str, list[float]], name: str, value: float) -> None:
    measured.setdefault(name, []).append(value)
    print(f"  {name:<45} {value:8.1f} images/s", flush=True)


def report(measured: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in measured.items()}
    limit, plain, whole = medians[LIMIT], medians[PLAIN], medians[WHOLE]
    print(
        f"\n{'median':<35} {'images/s':>10} {'of the limit':>13} {'of torchvision':>15} "
        f"{'imgcls is':>11}"
    )
    for name, value in medians.items():
        ratio = f"{whole / value:9.2f} x" if name in peers.PEERS else ""
        print(
            f"{name:<35} {value:>10.1f} {value / limit:>13.0%} {value / plain:>15.0%} {ratio:>11}"
        )
    print("imgcls as a whole job and each peer as a whole program\n", flush=True)


def keep(measured: dict[str, list[float]], model: str, kind: str, rows: int) -> None:
    """A Parquet file of all measurements and a bar chart of their medians."""
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "processor": processor(), "cores": CORES, "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("ray", "torch", "torchvision")},
    }  # fmt: skip
    table = pa.table(
        {
            "name": [name for name, values in measured.items() for _ in values],
            "images_per_second": [value for values in measured.values() for value in values],
        }
    )
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"model": model, "images": kind, "rows": rows, "measured": stamp, **machine}
    table = table.replace_schema_metadata({"imgcls.benchmark": json.dumps(record)})
    place = RESULTS / f"labeling-{model}-{kind}"
    pq.write_table(table, place.with_suffix(".parquet"))
    draw(measured, f"{model}, {kind} images, {CORES} cores", place.with_suffix(".png"))
    print(f"kept in {place}.parquet and .png\n")


def draw(measured: dict[str, list[float]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    shown = {
        name: statistics.median(values)
        for name, values in measured.items()
        if not name.startswith(("limit: decode", "limit: forward"))
    }
    figure = Figure(figsize=(8, 0.4 * len(shown) + 1), layout="constrained")
    axis = figure.subplots()
    colors = [
        "0.6"
        if name in (LIMIT, PLAIN)
        else "tab:blue"
        if name.startswith("imgcls")
        else "tab:orange"
        for name in shown
    ]
    bars = axis.barh(list(shown), list(shown.values()), color=colors)
    axis.bar_label(bars, fmt="%.0f", padding=3)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set(xlabel="images per second", title=title)
    figure.savefig(file, dpi=120)


def processor() -> str:
    with Path("/proc/cpuinfo").open() as stream:
        names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure_imgcls(bundle: Path, manifest: Path, output: Path) -> tuple[float, float]:
    """Images per second of `imgcls predict`: of the whole command, and after start-up."""
    command = [
        *(sys.executable, "-m", "imgcls.cli", "predict", "--manifest", str(manifest)),
        *("--model", str(bundle), "--output", str(output)),
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    success: dict[str, Any] = json.loads((output / "_SUCCESS").read_text())
    return success["rows"] / whole, success["steady_images_per_second"]


def measure_peer(name: str, model: str, manifest: Path, output: Path) -> float | None:
    """Images per second of a peer's whole program; None, and a line, when it did not end well."""
    command = [sys.executable, "-m", "benchmarks.peers", name, model, str(manifest), str(output)]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        print(f"  {name:<45} gave up after {PATIENCE} s", flush=True)
        return None
    took = time.perf_counter() - start
    if done.returncode:
        print(f"  {name:<45} failed: {(done.stderr.strip() or '?').splitlines()[-1]}", flush=True)
        return None
    return len(read_manifest(manifest)) / took


if __name__ == "__main__":
    main()
