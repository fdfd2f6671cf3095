"""What the fast routes change: labels and scores beside a reference, with real weights.

    python -m benchmarks.agreement [--images imagenet 12mp png]

The reference decodes with Pillow, resizes and crops with torchvision's documented transforms, and
runs the network as torchvision builds it in float32. Over the sample's photographs as they are,
enlarged to 12 megapixels and encoded anew, and as PNG, it prints for each route and precision (of
int8, every other photograph was seen before):
  agree    share of images whose label is the reference's
  sure     the same, of images whose reference score is above 0.5
  score    the largest difference of the winning label's score
  pixels   mean absolute difference of the network's input, of 255; the mean image and the worst
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import SAMPLE, photographs

SHARED = Path(os.environ.get("IMGCLS_SHARED", Path(__file__).parents[2] / "shared"))
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kinds = ["imagenet", "12mp", "png"]
    parser.add_argument("--images", nargs="+", default=kinds, choices=kinds)
    options = parser.parse_args()
    bundle = squeezenet()
    print(f"{'images':<10} {'route':<26} {'agree':>8} {'sure':>8} {'score':>7} {'pixels':>14}")
    for kind in options.images:
        compare(kind, bundle)


def squeezenet() -> Any:
    import tempfile

    from imgcls.models import zoo
    from imgcls.models.bundle import BundleSpec, load_bundle, save_bundle

    weights = SHARED / "weights" / "squeezenet1_0-imagenet.pth"
    if not weights.exists():
        raise SystemExit(f"no weights at {weights}; name their folder with IMGCLS_SHARED")
    architecture = zoo.architecture("squeezenet1_0")
    names = (SHARED / "weights" / "imagenet-classes.txt").read_text(encoding="utf-8").splitlines()
    spec = BundleSpec(
        architecture=architecture,
        classes=names,
        preprocess=zoo.default_preprocess(architecture),
    )
    folder = tempfile.mkdtemp(prefix="imgcls-agreement-")
    save_bundle(folder, spec, zoo.load_weights(str(weights), architecture))
    return load_bundle(folder)


def compare(kind: str, bundle: Any) -> None:
    from imgcls.models.bundle import Int8
    from imgcls.models.classifier import Classifier, observe

    decoders = routes(bundle.spec.preprocess)
    inputs: dict[str, list[Any]] = {name: [] for name in decoders}
    for data in blobs(kind):
        for name, decode in decoders.items():
            inputs[name].append(decode(data))
    expected = plain(bundle, np.stack(inputs["Pillow"]))
    label, best = expected.argmax(1), expected.max(1)
    sure = best > 0.5
    for name, pixels in inputs.items():
        stacked = np.stack(pixels)
        apart = np.abs(stacked.astype(int) - np.stack(inputs["Pillow"])).mean((1, 2, 3))
        shown = stacked[::2]
        batches = (shown[i : i + BATCH] for i in range(0, len(shown), BATCH))
        told = Int8(
            ranges=observe(bundle, batches),
            calibration_images=len(shown),
            judged_images=0,
            agreement=0,
        )
        prepared = replace(bundle, spec=bundle.spec.model_copy(update={"int8": told}))
        for precision in ("fp32", "bf16", "int8"):
            classifier = Classifier(prepared, precision=precision, device="cpu")
            found = np.concatenate(
                [
                    classifier.classify(stacked[i : i + BATCH]).scores
                    for i in range(0, len(stacked), BATCH)
                ]
            )
            same = found.argmax(1) == label
            moved = np.abs(found[np.arange(len(label)), label] - best).max()
            print(
                f"{kind:<10} {f'{name}, {precision}':<26} {same.mean():>8.1%} "
                f"{same[sure].mean():>8.1%} {moved:>7.3f} {apart.mean():>7.2f} {apart.max():>6.2f}",
                flush=True,
            )


def routes(spec: Any) -> dict[str, Callable[[bytes], Any]]:
    """Bytes to (3, crop, crop) uint8, by Pillow, as labelling does, and as torchvision does."""
    import torch
    import torchvision
    from PIL import Image
    from torchvision.transforms import v2

    from imgcls.data import images

    steps = v2.Compose([v2.Resize(spec.resize, antialias=True), v2.CenterCrop(spec.crop)])

    def by_pillow(data: bytes) -> Any:
        image = steps(Image.open(io.BytesIO(data)).convert("RGB"))
        return np.asarray(image).transpose(2, 0, 1)

    def by_torchvision(data: bytes) -> Any:
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return steps(torchvision.io.decode_image(tensor, torchvision.io.ImageReadMode.RGB)).numpy()

    return {
        "Pillow": by_pillow,
        "imgcls": lambda data: images.decode(data, spec)[0],
        "torchvision": by_torchvision,
    }


def blobs(kind: str) -> Iterator[bytes]:
    from PIL import Image

    for file in photographs(SAMPLE):
        if kind == "imagenet":
            yield file.read_bytes()
            continue
        image, sink = Image.open(file).convert("RGB"), io.BytesIO()
        if kind == "12mp":
            scale = (12e6 / (image.width * image.height)) ** 0.5
            size = (round(image.width * scale), round(image.height * scale))
            image.resize(size, Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
        else:
            image.save(sink, "PNG", compress_level=1)
        yield sink.getvalue()


def plain(bundle: Any, pixels: Any) -> Any:
    """(N, C) float32 scores of the network as torchvision builds it."""
    import torch

    from imgcls.models import zoo
    from imgcls.models.bundle import load_weights

    spec = bundle.spec.preprocess
    network = zoo.build(bundle.spec.architecture, len(bundle.spec.classes)).eval()
    network.load_state_dict(load_weights(bundle))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    scores = []
    with torch.inference_mode():
        for start in range(0, len(pixels), BATCH):
            batch = torch.from_numpy(pixels[start : start + BATCH]).float() / 255
            scores.append(network((batch - mean) / std).softmax(1).numpy())
    return np.concatenate(scores)


if __name__ == "__main__":
    main()
