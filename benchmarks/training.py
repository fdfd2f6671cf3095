"""Training throughput against the limit of this machine and torchvision's reference training.

    python -m benchmarks.training [--model resnet18 small_cnn] [--images 320] [--workers 1 2]

Measured over the same images, in turn, in one run, and reported as medians of the repeats:
  limit      a bare loop over the decoded images, in memory already, with our augmentation
  plain      the same without augmentation, for information: what the network alone costs
  imgcls     `imgcls train` as a user runs it: by its own clock of the steps, and by the wall clock
             from the end of one epoch to the end of the next, validation and saving included
  reference  torchvision's references/classification: ImageFolder, its transforms, DataLoader

All start from random weights and do the same: random resized crop and mirroring, autocast to
`--precision` (auto: bf16 where the machine has it), channels-last, fused AdamW, no average of
weights, the same global batch; several workers are processes under DDP, who share the cores. All
processes keep freed memory, as those of a Ray session of ours do. `ONEDNN_MAX_CPU_ISA=AVX2`
imitates a CPU without AVX-512 for all of them. Starting up and the first epoch (of
the bare loop: some steps) are not counted. The ratio to the limit is to the loop with augmentation,
which does the same work. The reference is given what its script leaves out and would gain from:
channels-last, running statistics that are not sent about, loader processes that live on, and the
better of two numbers of them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.machine import CORES, read_cpu
from benchmarks.training_loops import (
    CROP,
    GPUS,
    MIRROR,
    Task,
    bare_loop,
    in_processes,
    reference_loop,
)
from imgcls.cluster.session import build_malloc_env
from imgcls.data.decoding import decode
from imgcls.formatting import format_count
from imgcls.models import zoo
from imgcls.models.precision import choose_precision
from imgcls.training.data.batches import DecodeSettings

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("IMGCLS_SHARED", ROOT.parent / "shared")) / "data"
VAL_IMAGES = 20

LIMIT, PLAIN = "limit: bare loop, our augmentation", "bare loop, no augmentation"
STEPS, WALL = "imgcls, its steps", "imgcls, epoch end to epoch end"
REFERENCE = "torchvision's reference"


@dataclass
class Measured:
    """images/s by what was measured, in order of repeats; and how busy the GPU was."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    busy: list[float] = field(default_factory=list)

    def note(self, name: str, rate: float) -> None:
        self.rates.setdefault(name, []).append(rate)
        print(f"  {name:<42} {rate:8.1f} images/s", flush=True)

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])


def main() -> None:
    options = parse()
    os.environ.update(build_malloc_env()["env_vars"])
    described = machine()
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    rows: list[dict[str, Any]] = []
    for model in options.model:
        with tempfile.TemporaryDirectory(prefix="imgcls-bench-") as name:
            task = prepare(Path(name), model, options)
            for workers in options.workers:
                measured = measure(task, workers, options.repeats)
                report(task, workers, measured)
                rows += table(task, workers, measured, described)
    results = ROOT / "bench-results"
    results.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(results / "training.parquet", index=False)
    print(f"\nwritten to {results / 'training.parquet'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    gpu = GPUS > 0
    parser.add_argument("--model", nargs="+", default=["resnet50"] if gpu else list(SIZES))
    parser.add_argument("--images", type=int, help="per epoch; repeated if there are fewer")
    parser.add_argument("--epochs", type=int, default=6 if gpu else 2, help="one is not counted")
    parser.add_argument("--repeats", type=int, default=3)
    most = GPUS or CORES
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2] if most > 1 else [1])
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 64, help="of all workers")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first is not counted")
    if max(options.workers) > most:
        parser.error(f"--workers: there are {most} {'GPUs' if gpu else 'cores'}")
    if not DATA.is_dir():
        parser.error(f"no folder {DATA}; set IMGCLS_SHARED to the folder shared/")
    return options


SIZES = {"resnet18": 320, "small_cnn": 4000}
"""Images of an epoch on a CPU."""


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "cpu": str(read_cpu()),
        "cores": CORES,
        "gpu": f"{GPUS} x {torch.cuda.get_device_name()}" if GPUS else "none",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
    }


# ---------------------------------------------------------------------------- the same for all


def prepare(folder: Path, model: str, options: argparse.Namespace) -> Task:
    """Choose the images and decode them, as a training of ours would keep them in memory."""
    source = DATA / ("cifar10" if model == "small_cnn" else "cats-dogs")
    count = options.images or (20_000 if GPUS else SIZES.get(model, 320))
    train = link(source / "train", folder / "train", count)
    link(source / "test", folder / "val", VAL_IMAGES)
    preprocess = zoo.get_default_preprocess(zoo.resolve_architecture(model))
    spec = DecodeSettings.from_preprocess(preprocess, cropped=True).train
    decoded: dict[Path, decode.Pixels] = {}
    for path, _ in train:
        if path not in decoded:
            decoded[path] = decode.decode_image(path.read_bytes(), spec)[0]
    np.save(folder / "pixels.npy", np.stack([decoded[path] for path, _ in train]))
    np.save(folder / "labels.npy", np.array([label for _, label in train]))
    device = torch.device("cuda" if GPUS else "cpu")
    precision, reason = choose_precision(options.precision, device)
    classes = len({label for _, label in train})
    task = Task(
        model=model,
        folder=folder,
        classes=classes,
        images=count,
        epochs=options.epochs,
        batch_size=options.batch_size,
        precision=precision,
        preprocess=preprocess,
    )
    print(
        f"\n{model} at {preprocess.crop}: {count:,} images of {classes} classes from {source.name},"
        f" batches of {task.batch_size}, {precision} ({reason})",
        flush=True,
    )
    return task


def link(source: Path, folder: Path, count: int) -> list[tuple[Path, int]]:
    """A folder per class of links to `count` images, as many of each class; the files and labels.

    If there are fewer, they are repeated under other names.
    """
    classes = sorted(path for path in source.iterdir() if path.is_dir())
    files = [sorted(path.iterdir()) for path in classes]
    chosen = []
    for at in range(count):
        number, label = divmod(at, len(classes))
        path = files[label][number % len(files[label])].resolve()
        place = folder / classes[label].name / f"{number:06d}{path.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
        chosen.append((path, label))
    return chosen


def measure(task: Task, workers: int, repeats: int) -> Measured:
    """All in turn; the first time, the reference with each number of loader processes."""
    measured = Measured()
    loaders = [1, 2] if not GPUS else [max(1, CORES // workers // 2), max(1, CORES // workers)]
    print(f"{task.model}, {format_count(workers, 'worker')}:")
    for repeat in range(repeats):
        augmented, plain = in_processes(bare_loop, task, workers)
        measured.note(LIMIT, augmented)
        measured.note(PLAIN, plain)
        steps, wall, busy = measure_imgcls(task, workers, repeat)
        measured.note(STEPS, steps)
        measured.note(WALL, wall)
        measured.busy += busy
        rates = {n: in_processes(reference_loop, task, workers, n)[0] for n in loaders}
        best = max(rates, key=rates.__getitem__)
        if len(rates) > 1:
            tried = ", ".join(f"{rate:.1f} with {n}" for n, rate in rates.items())
            print(f"  loader processes per worker of the reference: {best} (images/s: {tried})")
        loaders = [best]
        measured.note(REFERENCE, rates[best])
    return measured


def report(task: Task, workers: int, measured: Measured) -> None:
    limit = measured.median(LIMIT)
    of = f"{task.model}, {format_count(workers, 'worker')}: median"
    print(f"\n{of:<44} {'images/s':>10} {'of limit':>10}")
    for name in (LIMIT, PLAIN, STEPS, WALL, REFERENCE):
        rate = measured.median(name)
        print(f"{name:<44} {rate:>10.1f} {rate / limit:>10.0%}")
    print(f"\nimgcls / limit       {measured.median(STEPS) / limit:.2f}   (at least 0.90)")
    ahead = measured.median(STEPS) / measured.median(REFERENCE)
    print(f"imgcls / reference   {ahead:.2f}   (ahead: above 1)")
    if GPUS:
        busy = f"{statistics.mean(measured.busy):.0f} %" if measured.busy else "unknown: no pynvml"
        print(f"GPU busy in imgcls, after its first epoch: {busy}")
    print(flush=True)


def table(
    task: Task, workers: int, measured: Measured, described: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for every figure, with all that it holds for."""
    settings = {
        "model": task.model,
        "workers": workers,
        "images": task.images,
        "epochs": task.epochs,
        "batch_size": task.batch_size,
        "precision": task.precision,
    }
    return [
        {**settings, "measured": name, "repeat": repeat, "images_per_second": rate, **described}
        for name, rates in measured.rates.items()
        for repeat, rate in enumerate(rates)
    ]


# ---------------------------------------------------------------------------- imgcls


def measure_imgcls(task: Task, workers: int, repeat: int) -> tuple[float, float, list[float]]:
    """`imgcls train` after its first epoch.

    Returns its images per second, by its own clock and by ours, and how busy the first GPU was at
    each look, in percent.
    """
    output = task.folder / f"bundle-{workers}-{repeat}"
    command = [
        *(sys.executable, "-m", "imgcls.cli", "train", "--output", str(output)),
        *("--data.train", str(task.folder / "train"), "--data.val", str(task.folder / "val")),
        *("--model.name", task.model, "--precision", task.precision, "--optim.ema", "none"),
        *("--epochs", str(task.epochs), "--batch-size", str(task.batch_size)),
        *("--augment.preset", "none", "--augment.hflip", str(MIRROR)),
        *("--augment.crop-scale", str(list(CROP)), "--scale.num-workers", str(workers)),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    lines: list[str] = []
    ends: list[float] = []
    with gpu_watched() as busy:
        for line in process.stdout:
            lines.append(line)
            if re.match(r"epoch +\d+/", line):
                ends.append(time.perf_counter())
                if len(ends) == 1:
                    busy.clear()
    if process.wait() != 0 or len(ends) != task.epochs:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{''.join(lines)}")
    history = pd.read_parquet(output / "history.parquet")
    history = history[history["epoch"] >= 2]
    seconds = (history["train_rows"] / history["images_per_second"]).sum()
    return history["train_rows"].sum() / seconds, task.counted / (ends[-1] - ends[0]), list(busy)


@contextmanager
def gpu_watched() -> Iterator[list[float]]:
    """Samples of the utilization of the first GPU, in percent, ten per second."""
    seen: list[float] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.1):
            seen.append(torch.cuda.utilization(0))

    try:
        if GPUS:
            torch.cuda.utilization(0)
    except ModuleNotFoundError:
        watched = False
    else:
        watched = GPUS > 0
    watcher = threading.Thread(target=look, daemon=True)
    if watched:
        watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        if watched:
            watcher.join()


if __name__ == "__main__":
    main()
