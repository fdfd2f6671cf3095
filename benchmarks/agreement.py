"""What the fast decode routes change: labels and scores compared with a reference, real weights.

    python -m benchmarks.agreement [--images imagenet 12mp png] [--model squeezenet efficientnet]
    python -m benchmarks.agreement --images camera [--every 3]

The reference decodes with Pillow, resizes and crops with torchvision's documented transforms, and
runs the network as torchvision or timm builds it in float32. Over the sample's photographs as they
are, enlarged to 12 megapixels and encoded again, and as PNG, it prints for each decode setting and
precision (int8: calibrated on every other photograph):
  agree    share of images whose label is the reference's
  sure     the same, of images whose reference score is above 0.5
  score    the largest difference of the winning label's score
  pixels   mean absolute difference of the network's input, of 255; the mean image and the worst

`camera` encodes the photographs as cameras do: enlarged to 1, 3, 6 and 12 megapixels, with film
grain (standard deviation 0, 4 or 8 of 255) and quality 60, 75, 85 or 95 in turn, each at 4:4:4,
4:2:2 and 4:2:0. The labels are those in float32.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import read_cpu
from benchmarks.workloads import SAMPLE, photographs

SHARED = Path(os.environ.get("IMGCLS_SHARED", Path(__file__).parents[2] / "shared"))
BATCH = 32
MODELS = {
    "squeezenet": ("squeezenet1_0", "squeezenet1_0-imagenet.pth"),
    "efficientnet": ("timm:tf_efficientnet_lite0", "tf_efficientnet_lite0-imagenet.pth"),
}
SIZES = (1, 3, 6, 12)
"""Megapixels."""
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
QUALITIES = (60, 75, 85, 95)
GRAIN = (0, 4, 8)
"""Standard deviation, of 255."""
COLUMNS = f"{'agree':>8} {'sure':>8} {'score':>7} {'pixels':>14}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kinds = ["imagenet", "12mp", "png"]
    parser.add_argument("--images", nargs="+", default=kinds, choices=[*kinds, "camera"])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--every", type=int, default=1, help="use every Nth photograph (camera)")
    options = parser.parse_args()
    print(f"CPU: {read_cpu()}", flush=True)
    bundles = {name: bundle_of(*MODELS[name]) for name in options.model}
    for kind in options.images:
        if kind == "camera":
            compare_cameras(bundles, options.every)
            continue
        for name, bundle in bundles.items():
            print(f"{name}\n{'images':<10} {'route':<26} {COLUMNS}")
            compare(kind, bundle)


def bundle_of(arch: str, file: str) -> Any:
    """A bundle of ImageNet weights for an architecture."""
    import tempfile

    from imgcls.models import zoo
    from imgcls.models.bundle import BundleSpec, load_bundle, save_bundle

    weights = SHARED / "weights" / file
    if not weights.exists():
        raise SystemExit(f"no weights at {weights}; name their folder with IMGCLS_SHARED")
    architecture = zoo.resolve_architecture(arch)
    names = (SHARED / "weights" / "imagenet-classes.txt").read_text(encoding="utf-8").splitlines()
    spec = BundleSpec(
        architecture=architecture,
        classes=names,
        preprocess=zoo.get_default_preprocess(architecture),
    )
    folder = tempfile.mkdtemp(prefix="imgcls-agreement-")
    network = zoo.build_network(architecture, len(names))
    zoo.apply_weights(network, zoo.load_weights(str(weights), architecture), replace_head=False)
    save_bundle(folder, spec, network.state_dict())
    return load_bundle(folder)


def compare_cameras(bundles: dict[str, Any], every: int) -> None:
    """Print for each network, setting, size and subsampling how the labels agree."""
    print(f"{'network':<13} {'setting':<6} {'MP':>3} {'chroma':<7} {'images':>6} {COLUMNS}")
    totals: dict[tuple[str, str], list[Any]] = {}
    for cell, (megapixels, subsampling) in enumerate(itertools.product(SIZES, SUBSAMPLINGS)):
        inputs: dict[tuple[str, str], list[Any]] = {}
        for data in camera_files(megapixels, subsampling, cell, every):
            for name, bundle in bundles.items():
                for setting, decode in settings(bundle.spec.preprocess).items():
                    inputs.setdefault((name, setting), []).append(decode(data))
        for name, bundle in bundles.items():
            pillow = np.stack(inputs[name, "Pillow"])
            expected = plain(bundle, pillow)
            for setting in ("exact", "fast"):
                pixels = np.stack(inputs[name, setting])
                apart = np.abs(pixels.astype(int) - pillow).mean((1, 2, 3))
                row = [expected, plain(bundle, pixels), apart]
                totals.setdefault((name, setting), []).append(row)
                line = f"{name:<13} {setting:<6} {megapixels:>3} {subsampling:<7} {len(apart):>6}"
                print(line, described(*row), flush=True)
    for (name, setting), rows in totals.items():
        row = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        print(f"{name:<13} {setting:<6} {'all':<11} {len(row[2]):>6}", described(*row))


def described(expected: Any, found: Any, apart: Any) -> str:
    """The columns of a table. expected, found: (N, C) scores; apart: (N,) pixel differences."""
    label, best = expected.argmax(1), expected.max(1)
    same, sure = found.argmax(1) == label, best > 0.5
    moved = np.abs(found[np.arange(len(label)), label] - best).max()
    return (
        f"{same.mean():>8.1%} {same[sure].mean():>8.1%} {moved:>7.3f} "
        f"{apart.mean():>7.2f} {apart.max():>6.2f}"
    )


def camera_files(megapixels: int, subsampling: str, cell: int, every: int) -> Iterator[bytes]:
    """Photographs at a size, with grain, as a camera would encode them.

    cell: which photographs get which quality and grain, and which are taken, differs by it
    """
    from PIL import Image

    noise = np.random.default_rng(cell).standard_normal((1024, 1024, 3), np.float32)
    noise = 0.8 * noise[:, :, :1] + 0.6 * noise  # mostly in the luma, as grain is
    for index, file in enumerate(photographs(SAMPLE)):
        if (index + cell) % every:
            continue
        turn = index // every + cell
        image = at_size(Image.open(file).convert("RGB"), megapixels)
        grain = GRAIN[turn % len(GRAIN)]
        if grain:
            pixels = np.asarray(image).astype(np.float32)
            for top, left in itertools.product(
                range(0, image.height, 1024), range(0, image.width, 1024)
            ):
                part = pixels[top : top + 1024, left : left + 1024]
                part += grain * noise[: part.shape[0], : part.shape[1]]
            image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        sink, quality = io.BytesIO(), QUALITIES[turn % len(QUALITIES)]
        image.save(sink, "JPEG", quality=quality, subsampling=subsampling)
        yield sink.getvalue()


def at_size(image: Any, megapixels: float) -> Any:
    from PIL import Image

    scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def compare(kind: str, bundle: Any) -> None:
    from imgcls.models.bundle import Int8Calibration
    from imgcls.models.classifier import Classifier
    from imgcls.models.int8_calibration import record_int8_ranges

    decoders = settings(bundle.spec.preprocess)
    inputs: dict[str, list[Any]] = {name: [] for name in decoders}
    for data in blobs(kind):
        for name, decode in decoders.items():
            inputs[name].append(decode(data))
    expected = plain(bundle, np.stack(inputs["Pillow"]))
    for name, pixels in inputs.items():
        stacked = np.stack(pixels)
        apart = np.abs(stacked.astype(int) - np.stack(inputs["Pillow"])).mean((1, 2, 3))
        shown = stacked[::2]
        batches = (shown[i : i + BATCH] for i in range(0, len(shown), BATCH))
        calibration = Int8Calibration(
            ranges=record_int8_ranges(bundle, batches),
            calibration_images=len(shown),
            judged_images=0,
            agreement=0,
        )
        prepared = replace(bundle, spec=bundle.spec.model_copy(update={"int8": calibration}))
        for precision in ("fp32", "bf16", "int8"):
            classifier = Classifier(prepared, precision=precision, device="cpu")
            found = np.concatenate(
                [
                    classifier.classify(stacked[i : i + BATCH]).scores
                    for i in range(0, len(stacked), BATCH)
                ]
            )
            route = f"{name}, {precision}"
            print(f"{kind:<10} {route:<26}", described(expected, found, apart), flush=True)


def settings(spec: Any) -> dict[str, Callable[[bytes], Any]]:
    """Bytes to (3, crop, crop) uint8: by Pillow, and by either `decode` setting."""
    from PIL import Image
    from torchvision.transforms import v2

    from imgcls.data.decoding import decode

    filter_ = v2.InterpolationMode(spec.interpolation)
    steps = v2.Compose(
        [v2.Resize(spec.resize, interpolation=filter_, antialias=True), v2.CenterCrop(spec.crop)]
    )

    def by_pillow(data: bytes) -> Any:
        image = steps(Image.open(io.BytesIO(data)).convert("RGB"))
        return np.asarray(image).transpose(2, 0, 1)

    exact, fast = (spec.model_copy(update={"decode": each}) for each in ("exact", "fast"))
    return {
        "Pillow": by_pillow,
        "exact": lambda data: decode.decode_image(data, exact)[0],
        "fast": lambda data: decode.decode_image(data, fast)[0],
    }


def blobs(kind: str) -> Iterator[bytes]:
    from PIL import Image

    for file in photographs(SAMPLE):
        if kind == "imagenet":
            yield file.read_bytes()
            continue
        image, sink = Image.open(file).convert("RGB"), io.BytesIO()
        if kind == "12mp":
            at_size(image, 12).save(sink, "JPEG", quality=90)
        else:
            image.save(sink, "PNG", compress_level=1)
        yield sink.getvalue()


def plain(bundle: Any, pixels: Any) -> Any:
    """(N, C) float32 scores of the network as torchvision builds it."""
    import torch

    from imgcls.models import zoo
    from imgcls.models.bundle import load_bundle_weights

    spec = bundle.spec.preprocess
    network = zoo.build_network(bundle.spec.architecture, len(bundle.spec.classes)).eval()
    network.load_state_dict(load_bundle_weights(bundle))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    scores = []
    with torch.inference_mode():
        for start in range(0, len(pixels), BATCH):
            batch = torch.from_numpy(pixels[start : start + BATCH]).float() / 255
            scores.append(network((batch - mean) / std).softmax(1).numpy())
    return np.concatenate(scores)


if __name__ == "__main__":
    main()
