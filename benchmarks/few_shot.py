"""Accuracy from few labeled images: imgcls, scikit-learn on the same features, and fastai.

    python -m benchmarks.few_shot photos/train photos/test --arch timm:tf_efficientnet_lite0 \\
        --weights weights.pth [--per-class 10 50 200] [--seeds 3] [--methods probe sklearn]

Draws the images of each class with a seed, trains by each method and evaluates on all test images:

    probe    imgcls train --data.embeddings: the head alone, on the features of the center crop
    sklearn  LogisticRegressionCV on the same features, standardized
    train    imgcls train with default settings
    fastai   vision_learner and fine_tune with the same network and weights (pip install fastai)
    timm     the parts and settings of timm's training script: its transforms, AdamW with a cosine
             schedule and warmup, label smoothing, 20 epochs of the whole network
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import read_cpu


@dataclass(frozen=True)
class Task:
    """One training set: rows of (path, label), and where its files go."""

    rows: list[tuple[str, str]]
    seed: int
    folder: Path
    options: argparse.Namespace

    @property
    def manifest(self) -> Path:
        return write_rows(self.folder / "train.csv", self.rows)


@dataclass(frozen=True)
class Features:
    """Embeddings by path, and those of the test images with their labels."""

    run: Path
    by_path: dict[str, np.ndarray]
    test: np.ndarray
    test_labels: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--arch", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--per-class", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("few-shot"))
    options = parser.parse_args()
    print(f"CPU: {read_cpu()}", flush=True)
    features = compute_features(options)
    for count in options.per_class:
        for method in options.methods:
            found = []
            for seed in range(options.seeds):
                folder = options.output / f"{method}-{count}-{seed}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                task = Task(draw_rows(options.train, count, seed), seed, folder, options)
                start = time.perf_counter()
                accuracy = METHODS[method](task, features)
                found.append((accuracy, time.perf_counter() - start))
            accuracies = ", ".join(f"{100 * accuracy:.1f}" for accuracy, _ in found)
            mean = 100 * float(np.mean([accuracy for accuracy, _ in found]))
            seconds = float(np.mean([seconds for _, seconds in found]))
            line = f"{count:>6} per class  {method:<8} {mean:5.1f} %  ({accuracies})"
            print(f"{line}  {seconds:6.1f} s", flush=True)


def draw_rows(folder: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """At most `count` images of each class."""
    rng = random.Random(seed)
    rows = []
    for place in sorted(folder.iterdir()):
        files = sorted(place.iterdir())
        rows += [
            (str(file.absolute()), place.name) for file in rng.sample(files, min(count, len(files)))
        ]
    return rows


def write_rows(path: Path, rows: Sequence[tuple[str, ...]]) -> Path:
    """A manifest of paths, or of paths and labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label")[: len(rows[0])], *rows])
    return path


def compute_features(options: argparse.Namespace) -> Features:
    """Embeddings of all images, by `imgcls embed`."""
    import pyarrow.parquet as pq

    backbone, found = options.output / "backbone", {}
    run_imgcls(
        *("model", "import", "--arch", options.arch, "--weights", options.weights),
        *("--output", backbone, "--overwrite"),
    )
    for name, folder in (("train", options.train), ("test", options.test)):
        run_imgcls("embed", folder, "--model", backbone, "--output", options.output / name)
        table = pq.read_table(options.output / name / "predictions")
        found[name] = (
            [str((folder / path).absolute()) for path in table["path"].to_pylist()],
            np.array(table["embedding"].to_pylist(), np.float32),
            np.array(table["label"].to_pylist()),
        )
    paths, vectors, _ = found["train"]
    return Features(
        run=options.output / "train",
        by_path=dict(zip(paths, vectors, strict=True)),
        test=found["test"][1],
        test_labels=found["test"][2],
    )


def run_probe(task: Task, features: Features) -> float:
    from imgcls.models.bundle import load_bundle
    from imgcls.models.linear_head import load_linear_head

    bundle = task.folder / "bundle"
    run_imgcls(
        *("train", task.manifest, "--data.embeddings", features.run, "--output", bundle),
        *("--seed", task.seed),
    )
    loaded = load_bundle(str(bundle))
    head = load_linear_head(loaded)
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    predicted = np.array(loaded.spec.classes)[(features.test @ weight.T + bias).argmax(1)]
    return float((predicted == features.test_labels).mean())


def run_sklearn(task: Task, features: Features) -> float:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors = np.stack([features.by_path[path] for path, _ in task.rows])
    model = make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(Cs=np.logspace(-5, 2, 8), cv=5, max_iter=1000, scoring="neg_log_loss"),
    )
    model.fit(vectors, [label for _, label in task.rows])
    return float((model.predict(features.test) == features.test_labels).mean())


def run_train(task: Task, features: Features) -> float:
    bundle, output = task.folder / "bundle", task.folder / "test"
    run_imgcls(
        *("train", task.manifest, "--model.name", task.options.arch),
        *("--model.weights", task.options.weights, "--output", bundle, "--seed", task.seed),
    )
    run_imgcls("predict", task.options.test, "--model", bundle, "--output", output)
    return read_accuracy(output)


def run_fastai(task: Task, features: Features) -> float:
    """`vision_learner` and `fine_tune(4)`, as fastai documents them."""
    import pandas as pd
    import torch
    from fastai.vision.all import (
        ImageDataLoaders,
        Normalize,
        Resize,
        aug_transforms,
        vision_learner,
    )

    from imgcls.models import zoo

    preprocess = zoo.get_default_preprocess(zoo.resolve_architecture(task.options.arch))
    frame = pd.DataFrame(task.rows, columns=["path", "label"])
    loaders = ImageDataLoaders.from_df(
        frame,
        path="/",
        seed=task.seed,
        valid_pct=0.1,
        item_tfms=Resize(preprocess.resize),
        batch_tfms=[
            *aug_transforms(size=preprocess.crop),
            Normalize.from_stats(preprocess.mean, preprocess.std),
        ],
        bs=min(64, max(8, len(frame) // 8)),
        num_workers=0,
    )
    torch.manual_seed(task.seed)
    learner = vision_learner(loaders, task.options.arch.removeprefix("timm:"), pretrained=False)
    load_fastai_body(learner, task.options.weights)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(4)
        files = sorted(path for path in task.options.test.rglob("*") if path.is_file())
        scores, _ = learner.get_preds(dl=learner.dls.test_dl(files))
    names = np.array(list(learner.dls.vocab))[scores.argmax(1).numpy()]
    return float(
        np.mean([name == file.parent.name for name, file in zip(names, files, strict=True)])
    )


def run_timm(task: Task, features: Features) -> float:
    """As timm's `train.py --opt adamw --lr 5e-4 --epochs 20 --warmup-epochs 3 --smoothing 0.1`."""
    import timm
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_data_config
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    torch.manual_seed(task.seed)
    classes = sorted({label for _, label in task.rows})
    model = timm.create_model(task.options.arch.removeprefix("timm:"), num_classes=len(classes))
    state = torch.load(task.options.weights, weights_only=True)
    own = model.state_dict()
    fitting = {key: value for key, value in state.items() if value.shape == own[key].shape}
    missing, _ = model.load_state_dict(fitting, strict=False)
    assert len([key for key in missing if not key.endswith("num_batches_tracked")]) == 2, missing
    config = resolve_data_config({}, model=model)
    size, mean, std = config["input_size"], config["mean"], config["std"]
    # its RandAugment fails with Pillow 13 (posterize to 0 bits)
    train_transform = create_transform(size, is_training=True, mean=mean, std=std)
    test_transform = create_transform(**config)

    def load(path: str, transform: Callable[[Any], Any]) -> torch.Tensor:
        with Image.open(path) as image:
            pixels: torch.Tensor = transform(image.convert("RGB"))
            return pixels

    batch = min(64, max(8, len(task.rows) // 8))
    steps = -(-len(task.rows) // batch)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=20, warmup_epochs=3, updates_per_epoch=steps
    )
    loss = LabelSmoothingCrossEntropy(0.1)
    rows = list(task.rows)
    for epoch in range(epochs):
        model.train()
        random.Random(task.seed + epoch).shuffle(rows)
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            if len(part) < 2:
                continue
            pixels = torch.stack([load(path, train_transform) for path, _ in part])
            targets = torch.tensor([classes.index(label) for _, label in part])
            optimizer.zero_grad()
            loss(model(pixels), targets).backward()
            optimizer.step()
        scheduler.step(epoch + 1)
    model.eval()
    files = sorted(path for path in task.options.test.rglob("*") if path.is_file())
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(files), 64):
            chosen = files[start : start + 64]
            scores = model(torch.stack([load(str(file), test_transform) for file in chosen]))
            correct += sum(
                classes[index] == file.parent.name
                for index, file in zip(scores.argmax(1).tolist(), chosen, strict=True)
            )
    return correct / len(files)


def load_fastai_body(learner: Any, weights: str) -> None:
    """Load the weights into the body, and freeze it as `pretrained=True` does."""
    import torch

    state = torch.load(weights, weights_only=True)
    body = learner.model[0].model
    own = body.state_dict()
    missing, _ = body.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    assert not [key for key in missing if not key.endswith("num_batches_tracked")], missing
    learner.freeze()


def read_accuracy(output: Path) -> float:
    import pyarrow.parquet as pq

    rows = pq.read_table(output / "metrics" / "summary.parquet").to_pylist()
    return next(float(row["value"]) for row in rows if row["metric"] == "accuracy")


def run_imgcls(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imgcls", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{json.dumps([str(word) for word in words])}\n{done.stderr[-2000:]}")


METHODS: dict[str, Callable[[Task, Features], float]] = {
    "probe": run_probe,
    "sklearn": run_sklearn,
    "train": run_train,
    "fastai": run_fastai,
    "timm": run_timm,
}

if __name__ == "__main__":
    main()
