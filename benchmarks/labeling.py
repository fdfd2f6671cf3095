"""Labelling speed beside this machine's limit and the pattern that Ray Data's documentation shows.

    python benchmarks/labeling.py [--rows 4000] [--repeats 3] [--images FOLDER]

Three things are measured over the same images, in turn, in one run, and reported as medians:
  limit   decode and forward in bare processes, one per core, no Ray, no files written
  imgcls  `imgcls predict` as a user runs it; with start-up, and after it
  ray     the documented Ray Data pattern: map with Pillow and float32 tensors, then a float32 actor
The model is ResNet-18 at 224 with random weights; what it predicts does not matter here.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
SAMPLE = (
    Path(os.environ.get("IMGCLS_SHARED", Path(__file__).parents[2] / "shared"))
    / "data"
    / "imagenet-sample"
    / "images"
)


def main() -> None:
    options = parse()
    print(f"{platform.processor() or platform.machine()}, {CORES} cores; {options.rows:,} rows")
    with tempfile.TemporaryDirectory(prefix="imgcls-bench-") as name:
        folder = Path(name)
        manifest = write_manifest(folder, options.images, options.rows)
        bundle = make_bundle(folder, options.model)
        measured: dict[str, list[float]] = {}
        for repeat in range(options.repeats):
            limit = measure_limit(bundle, manifest)
            whole, steady = measure_imgcls(bundle, manifest, folder / f"out-{repeat}")
            note(measured, "limit: decode + forward in bare processes", limit)
            note(measured, "imgcls, after start-up", steady)
            note(measured, "imgcls, whole job", whole)
            if repeat < options.peer_repeats:
                peer = measure_ray_data(options.model, manifest, folder / f"ray-{repeat}")
                note(measured, "documented Ray Data pattern, whole job", peer)
    report(measured)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, default=1, help="the pattern takes minutes")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--images", type=Path, default=SAMPLE)
    options = parser.parse_args()
    if not options.images.is_dir():
        parser.error(f"no folder {options.images}; name one of photographs with --images")
    return options


def note(measured: dict[str, list[float]], name: str, value: float) -> None:
    measured.setdefault(name, []).append(value)
    print(f"  {name:<45} {value:8.1f} images/s", flush=True)


def report(measured: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in measured.items()}
    limit, steady, whole, *peer = medians.values()
    print(f"\n{'median':<47} {'images/s':>10} {'of limit':>10}")
    for name, value in medians.items():
        print(f"{name:<47} {value:>10.1f} {value / limit:>10.0%}")
    print(f"\nimgcls after start-up / limit           {steady / limit:.2f}   (at least 0.80)")
    if peer:
        print(f"imgcls whole job / documented pattern    {whole / peer[0]:.2f}   (at least 3.5)")


def write_manifest(folder: Path, images: Path, rows: int) -> Path:
    files = sorted(str(p.absolute()) for p in images.rglob("*") if p.is_file())
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path"])
        writer.writerows([files[i % len(files)]] for i in range(rows))
    return manifest


def make_bundle(folder: Path, model: str) -> Path:
    import torch

    from imgcls.models import zoo
    from imgcls.models.bundle import BundleSpec, save_bundle

    torch.manual_seed(0)
    architecture = zoo.architecture(model)
    spec = BundleSpec(
        architecture=architecture,
        classes=[f"class {i}" for i in range(1000)],
        preprocess=zoo.default_preprocess(architecture),
    )
    save_bundle(str(folder / "bundle"), spec, zoo.build(architecture, 1000).state_dict())
    return folder / "bundle"


def measure_limit(bundle: Path, manifest: Path) -> float:
    """Images per second of one bare process per core, start-up and warm-up left out."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(CORES + 1)
    arguments = [(bundle, manifest, index, barrier) for index in range(CORES)]
    processes = [context.Process(target=bare_worker, args=a) for a in arguments]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    return sum(1 for _ in manifest.open()) / (time.perf_counter() - start)


def bare_worker(bundle: Path, manifest: Path, index: int, barrier: Barrier) -> None:
    import numpy as np
    import torch

    from imgcls.data import images
    from imgcls.models.classifier import Classifier

    torch.set_num_threads(1)
    classifier = Classifier.load(str(bundle))
    with manifest.open(newline="") as stream:
        paths = [row["path"] for row in csv.DictReader(stream)][index::CORES]

    def run(batch: list[str]) -> None:
        pixels = [
            images.decode(Path(path).read_bytes(), classifier.preprocess)[0] for path in batch
        ]
        classifier.classify(np.stack(pixels))

    run(paths[:32])
    barrier.wait()
    for start in range(0, len(paths), 32):
        run(paths[start : start + 32])


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


def measure_ray_data(model: str, manifest: Path, output: Path) -> float:
    start = time.perf_counter()
    command = [sys.executable, __file__, "--ray-data", model, str(manifest), str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return sum(1 for _ in manifest.open()) / (time.perf_counter() - start)


def ray_data_pattern(model: str, manifest: str, output: str) -> None:
    """Offline image classification as docs.ray.io shows it, written for one machine of CPUs."""
    import numpy as np
    import ray
    import torch
    import torchvision
    from PIL import Image

    transform = torchvision.models.get_model_weights(model).DEFAULT.transforms()

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        image = Image.open(row["path"]).convert("RGB")
        return {"path": row["path"], "image": transform(image).numpy()}

    class Predictor:
        def __init__(self) -> None:
            self.model = torchvision.models.get_model(model, weights=None).eval()

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            with torch.inference_mode():
                logits = self.model(torch.from_numpy(np.stack(batch["image"])))
            return {"path": batch["path"], "predicted": logits.argmax(1).numpy()}

    ray.init(num_cpus=CORES, include_dashboard=False)
    (
        ray.data.read_csv(manifest)
        .map(preprocess)
        .map_batches(Predictor, compute=ray.data.ActorPoolStrategy(size=1), batch_size=32)
        .write_parquet(output)
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ray-data"]:
        ray_data_pattern(*sys.argv[2:])
    else:
        main()
