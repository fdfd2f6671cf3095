"""Workloads of the benchmarks: images of several kinds, their manifests, untrained bundles."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
from PIL import Image

CORES = len(os.sched_getaffinity(0))
SAMPLE = (
    Path(os.environ.get("IMGCLS_SHARED", Path(__file__).parents[2] / "shared"))
    / "data"
    / "imagenet-sample"
    / "images"
)
KINDS = ("imagenet", "12mp", "small", "png")
"""Kinds of images:

imagenet  the photographs as they are
12mp      enlarged to 4000 x 3000 and encoded again, as telephones write them
small     32 x 32, as in CIFAR, in PNG files
png       the photographs in PNG files
"""


def make_images(kind: str, source: Path, folder: Path) -> Path:
    """A folder of images of this kind, made of photographs; `source` itself where nothing is to do.

    Twelve-megapixel photographs take most of a second to make and are 24; others as many as there
    are photographs.
    """
    if kind == "imagenet":
        return source
    target = folder / kind
    target.mkdir()
    files = photographs(source)
    for number, file in enumerate(files[:: max(1, len(files) // 24)] if kind == "12mp" else files):
        image = Image.open(file).convert("RGB")
        if kind == "12mp":
            image = image.resize((4000, 3000), Image.Resampling.BICUBIC)
            image.save(target / f"{number:04d}.jpg", quality=90)
        elif kind == "small":
            image.resize((32, 32), Image.Resampling.BILINEAR).save(target / f"{number:04d}.png")
        else:
            image.save(target / f"{number:04d}.png", compress_level=6)
    return target


def photographs(folder: Path) -> list[Path]:
    return sorted(path.absolute() for path in folder.rglob("*") if path.is_file())


def write_manifest(folder: Path, images: Path, rows: int) -> Path:
    """A manifest with a number of rows that repeats the images of a folder."""
    files = photographs(images)
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path"])
        writer.writerows([str(files[i % len(files)])] for i in range(rows))
    return manifest


def read_manifest(manifest: Path) -> list[str]:
    with manifest.open(newline="") as stream:
        return [row["path"] for row in csv.DictReader(stream)]


def make_bundle(folder: Path, model: str) -> Path:
    """A bundle with random weights: what it predicts does not matter to its speed."""
    import torch

    from imgcls.models import zoo
    from imgcls.models.bundle import BundleSpec, save_bundle

    torch.manual_seed(0)
    architecture = zoo.resolve_architecture(model)
    spec = BundleSpec(
        architecture=architecture,
        classes=[f"class {i}" for i in range(1000)],
        preprocess=zoo.get_default_preprocess(architecture),
    )
    bundle = folder / f"bundle-{model}"
    save_bundle(str(bundle), spec, zoo.build_network(architecture, 1000).state_dict())
    return bundle


def mean_size(images: Path) -> float:
    """Bytes of an image file on average."""
    return float(np.mean([path.stat().st_size for path in photographs(images)]))
