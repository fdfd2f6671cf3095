"""Workloads of the benchmarks: images of several kinds, their manifests, untrained bundles."""

from __future__ import annotations

import copy
import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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
KNOWN_IMAGES = 100
"""Maximum number of images that a bundle of random weights recognizes."""


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


def make_bundle(folder: Path, model: str, images: Path | None = None) -> Path:
    """A bundle with random weights: which labels it predicts does not change its speed.

    images: a folder of images that the network is to recognize, so that labels of two programs can
        be compared; without it, it gives most images the same label
    """
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
    network = zoo.build_network(architecture, 1000)
    if images is not None:
        recognize_images(network, spec.preprocess, list_known_images(images))
    bundle = folder / f"bundle-{model}"
    save_bundle(str(bundle), spec, network.state_dict())
    return bundle


def list_known_images(images: Path) -> list[Path]:
    """The images of a folder that a bundle recognizes."""
    files = photographs(images)
    return files[:: max(1, len(files) // KNOWN_IMAGES)][:KNOWN_IMAGES]


def recognize_images(network: Any, preprocess: Any, files: list[Path]) -> None:
    """Set the Linear head of a network so that an image gets the class of the file nearest to it.

    Class i is the i-th file. The logits are those of the distance to the features c_i of a file,
    c_i f - |c_i|^2 / 2. The direction of the mean feature is removed from c_i: the products stay
    small, and the rounding of bfloat16 changes few labels. Other heads stay random.
    """
    import torch

    from imgcls.data.decoding import decode
    from imgcls.models import zoo
    from imgcls.models.head import HeadNetwork
    from imgcls.models.normalize import Normalizer

    _, head = zoo.find_head(network)
    if not isinstance(head, torch.nn.Linear):
        return
    pixels = [decode.decode_image(file.read_bytes(), preprocess)[0] for file in files]
    reader = HeadNetwork(copy.deepcopy(network).eval(), in_fp32=False)
    normalize = Normalizer(preprocess, torch.device("cpu"))
    with torch.inference_mode():
        features = torch.cat(
            [
                reader(normalize(np.stack(pixels[i : i + 16])))[1].float()
                for i in range(0, len(pixels), 16)
            ]
        )
    mean = torch.nn.functional.normalize(features.mean(0), dim=0)
    centers = features - torch.outer(features @ mean, mean)
    squares = (centers**2).sum(1)
    scale = 20 / float(squares.mean())
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1e4)
        head.weight[: len(files)] = scale * centers
        head.bias[: len(files)] = -scale * squares / 2


def mean_size(images: Path) -> float:
    """Bytes of an image file on average."""
    return float(np.mean([path.stat().st_size for path in photographs(images)]))
