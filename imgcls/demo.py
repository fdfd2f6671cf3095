"""`make demo`: the main job from nothing, on handwritten digits that come with scikit-learn.

Writes the digits as PNG files in one folder per class, builds manifests from them, trains the small
CNN with two data-parallel workers, labels the test manifest, judges the labels, and says where
everything is. It calls the same functions as the jobs do.
"""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from imgcls.config import Section
from imgcls.data.manifest import ManifestConfig
from imgcls.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

TEST_EVERY = 5


class DemoConfig(Section):
    """Run the main job on handwritten digits."""

    output: str = "demo"
    """The folder to write."""
    epochs: int = 8
    """Passes over the training digits."""
    num_workers: int = 2
    """Training workers."""


def demo(config: DemoConfig) -> None:
    """Train on handwritten digits, label the test set, print what came of it."""
    started = time.monotonic()
    folder = Path(config.output)
    train_manifest, test_manifest = write_digits(folder)
    said = f"1. digits written to {folder / 'digits'} ({time.monotonic() - started:.0f} s)"
    print(said, flush=True)

    from imgcls.training import train as training
    from imgcls.training.augment.augment import AugmentConfig

    print(f"2. train: the small CNN from scratch, {config.num_workers} workers", flush=True)
    bundle = folder / "bundle"
    training.train(
        training.TrainConfig(
            data=training.DataConfig(train=ManifestConfig(path=str(train_manifest))),
            model=training.ModelConfig(name="small_cnn"),
            # a mirrored digit is no digit
            augment=AugmentConfig(preset="light", hflip=0.0),
            scale=training.TrainScaleConfig(num_workers=config.num_workers, cpus_per_worker=0.5),
            epochs=config.epochs,
            output=str(bundle),
            overwrite=True,
        )
    )

    from imgcls.inference import predict as labeling

    print(f"3. predict: label {test_manifest}", flush=True)
    predictions = folder / "predictions"
    labeling.predict(
        labeling.PredictConfig(
            manifest=ManifestConfig(path=str(test_manifest)),
            model=str(bundle),
            output=str(predictions),
            scores=True,
            overwrite=True,
        )
    )
    from imgcls.evaluation import evaluate

    print("4. evaluate: judge what it said", flush=True)
    evaluate.evaluate(evaluate.EvaluateConfig(predictions=str(predictions)))
    print(f"5. done in {time.monotonic() - started:.0f} s; look at")
    for what, where in (
        ("images", folder / "digits"),
        ("manifests", f"{train_manifest}, {test_manifest}"),
        ("model bundle", bundle),
        ("predictions", predictions / "predictions"),
        ("metrics", predictions / "metrics"),
        ("report", predictions / "report.html"),
        ("proof of commit", predictions / "_SUCCESS"),
    ):
        print(f"   {what:<16} {where}")


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Write scikit-learn's 1,797 digits as 8x8 PNG files and a manifest each for train and test.

    Every fifth digit is a test digit. Returns the manifests, whose paths are relative to `folder`.
    Raises RequestError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RequestError("the demo needs scikit-learn: pip install 'imgcls[demo]'") from error
    digits = load_digits()
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if index % TEST_EVERY == TEST_EVERY - 1 else "train"
        path = f"digits/{split}/{label}/{index:04d}.png"
        rows[split].append((path, str(label)))
        _write_png(folder / path, pixels)
    manifests = []
    for split, entries in rows.items():
        manifest = folder / f"digits-{split}.csv"
        with manifest.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(("path", "label"))
            writer.writerows(entries)
        manifests.append(manifest)
    return manifests[0], manifests[1]


def _write_png(path: Path, pixels: np.ndarray) -> None:
    """Store an 8x8 digit with values 0 to 16 as a grey PNG, anew only if it is not there."""
    from PIL import Image

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(temporary, format="PNG")
    os.replace(temporary, path)
