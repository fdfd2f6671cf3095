"""End-to-end demo (`make demo`): train, predict and evaluate on scikit-learn's handwritten digits.

Writes the digits as PNG files in one folder per class and a manifest per split, trains the small
CNN with two data-parallel workers, predicts the test split, evaluates the predictions, and lists
the files it wrote. Calls the same functions as the jobs.
"""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from imgcls import log
from imgcls.config import Section
from imgcls.data.manifests.manifest import ManifestConfig
from imgcls.data.storage import filesystem
from imgcls.errors import OutputError, RequestError
from imgcls.evaluation.config import EvaluateConfig
from imgcls.inference.config import PredictConfig
from imgcls.runs import layout
from imgcls.training.augment.recipe import AugmentConfig
from imgcls.training.config import DataConfig, ModelConfig, TrainConfig, TrainScaleConfig

if TYPE_CHECKING:
    import numpy as np

TEST_EVERY = 5


class DemoConfig(Section):
    """Train, predict and evaluate on handwritten digits."""

    output: str = "demo"
    """Output folder, on this machine's disk."""
    epochs: PositiveInt = 8
    """Number of training epochs."""
    num_workers: PositiveInt = 2
    """Number of training workers."""


def demo(config: DemoConfig) -> None:
    """Run the demo and print where the results are."""
    started = time.monotonic()
    folder = _open_output(config.output)
    train_manifest, test_manifest = write_digits(folder)
    seconds = time.monotonic() - started
    log.show(f"1. digits written to {folder / 'digits'} ({seconds:.0f} s)")

    from imgcls.training.train import train

    log.show(f"2. train: the small CNN from scratch, {config.num_workers} workers")
    bundle = folder / "bundle"
    train(
        TrainConfig(
            data=DataConfig(train=ManifestConfig(path=str(train_manifest))),
            model=ModelConfig(name="small_cnn"),
            # mirrored digits are not digits
            augment=AugmentConfig(preset="light", hflip=0.0),
            scale=TrainScaleConfig(num_workers=config.num_workers, cpus_per_worker=0.5),
            epochs=config.epochs,
            output=str(bundle),
            overwrite=True,
        )
    )

    from imgcls.inference.predict import predict

    log.show(f"3. predict: {test_manifest}")
    predictions = folder / "predictions"
    predict(
        PredictConfig(
            manifest=ManifestConfig(path=str(test_manifest)),
            model=str(bundle),
            output=str(predictions),
            scores=True,
            overwrite=True,
        )
    )
    from imgcls.evaluation.evaluate import evaluate

    log.show(f"4. evaluate: {predictions}")
    evaluate(EvaluateConfig(predictions=str(predictions)))
    log.show(f"5. done in {time.monotonic() - started:.0f} s; results:")
    for name, path in (
        ("images", folder / "digits"),
        ("manifests", f"{train_manifest}, {test_manifest}"),
        ("model bundle", bundle),
        ("predictions", predictions / "predictions"),
        ("metrics", predictions / "metrics"),
        ("report", predictions / "report.html"),
        ("commit marker", predictions / "_SUCCESS"),
    ):
        log.show(f"   {name:<16} {path}")


def _open_output(output: str) -> Path:
    """The output folder; raises OutputError where no files can be written to it."""
    if not filesystem.is_local(output):
        raise OutputError(f"output {output}: is a URL; pass a folder on this machine's disk")
    layout.check_output_writable(output)
    return Path(filesystem.local_path(output))


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Write scikit-learn's 1,797 digits as 8x8 PNG files, and a manifest per split.

    Every fifth digit is a test digit. Returns the manifests, whose paths are relative to `folder`.
    Raises RequestError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RequestError(
            "the demo needs scikit-learn. Run pip install 'imgcls[demo]'."
        ) from error
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
    """Write an 8x8 digit with values 0 to 16 as a grayscale PNG, unless the file exists."""
    from PIL import Image

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(temporary, format="PNG")
    os.replace(temporary, path)
