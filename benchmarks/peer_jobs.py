"""Input and output of a peer: a bundle, a manifest and a precision; the file of its labels.

Nothing here imports torch: a program that does without it starts sooner.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.workloads import read_manifest

BATCH = 32


@dataclass(frozen=True)
class Job:
    """One run of a peer.

    bundle: folder of the network; the exported networks are in a folder next to it
    output: CSV file or folder of Parquet files with the columns path and predicted
    precision: fp32 or bf16; another name is OpenVINO's
    model: torchvision's name of the network
    resize, crop: sides in pixels
    mean, std: of the channels, for values from 0 to 1
    """

    bundle: Path
    manifest: Path
    output: Path
    precision: str
    tuned: bool
    model: str
    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def in_bf16(self) -> bool:
        return self.precision == "bf16"

    @property
    def resample(self) -> Any:
        """Pillow's name of the interpolation."""
        from PIL import Image

        return Image.Resampling[self.interpolation.upper()]

    def load_weights(self) -> dict[str, Any]:
        """The tensors of the bundle, by torchvision's names."""
        from safetensors.torch import load_file

        weights: dict[str, Any] = load_file(self.bundle / "model.safetensors")
        return weights


def read_job(bundle: Path, manifest: Path, output: Path, precision: str, *, tuned: bool) -> Job:
    """The run of a peer with the network and the preprocessing of a bundle."""
    description = json.loads((bundle / "bundle.json").read_text())
    preprocess = description["preprocess"]
    return Job(
        bundle=bundle,
        manifest=manifest,
        output=output,
        precision=precision,
        tuned=tuned,
        model=description["architecture"]["name"],
        resize=preprocess["resize"],
        crop=preprocess["crop"],
        interpolation=preprocess["interpolation"],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
    )


def write_labels(job: Job, found: list[int]) -> None:
    """Write the class of each row of the manifest, in its order."""
    with job.output.open("w", newline="") as stream:
        rows = zip(read_manifest(job.manifest), found, strict=True)
        csv.writer(stream).writerows([("path", "predicted"), *rows])
