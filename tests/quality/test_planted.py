"""Faults put into real data, and how many of them are found."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from imgcls.data.duplicates import near_pairs
from imgcls.data.facts import MIRROR, facts_of
from imgcls.quality.copies import CopiesConfig, normalised
from imgcls.quality.labels import LabelsConfig, out_of_fold
from tests.data.pictures import encoded

Change = Callable[[Image.Image], Image.Image]


def cropped(image: Image.Image) -> Image.Image:
    """Without 5 % of its width and height."""
    return ImageOps.crop(image, (image.width // 40, image.height // 40) * 2)


CHANGES: dict[str, tuple[Change, int, float]] = {
    "recompressed": (lambda image: image, 50, 0.95),
    "resized": (lambda image: image.resize((image.width // 2, image.height // 2)), 85, 0.95),
    "mirrored": (ImageOps.mirror, 85, 0.95),
    "brightened": (lambda image: ImageEnhance.Brightness(image).enhance(1.3), 85, 0.9),
    "cropped": (cropped, 85, 0.8),
}
"""How, the JPEG quality it is saved in, and the share that must be found."""


def hashes_of(blobs: list[bytes]) -> np.ndarray:
    return np.stack([facts_of(blob).hash for blob in blobs]).view(np.uint64)


@pytest.fixture(scope="module")
def photographs(shared: Path) -> list[bytes]:
    files = sorted((shared / "data" / "imagenet-sample").rglob("*.JPEG"))
    assert len(files) == 334
    return [file.read_bytes() for file in files]


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_copies_of_photographs_are_found(photographs: list[bytes], kind: str) -> None:
    change, quality, wanted = CHANGES[kind]
    copies = [
        encoded(change(Image.open(io.BytesIO(blob)).convert("RGB")), "JPEG", quality=quality)
        for blob in photographs
    ]
    hashes = np.concatenate([hashes_of(photographs), hashes_of(copies)])
    pairs = near_pairs(hashes, MIRROR.view(np.uint64), most=CopiesConfig().near_bits)
    told = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    count = len(photographs)
    assert len(told & {(i, i + count) for i in range(count)}) >= wanted * count
    # every other pair is a false one
    false = {(i, j) for i, j in told if j - i != count}
    assert len(false) < 0.001 * count * (count - 1) / 2


@pytest.mark.slow
def test_flipped_labels_of_cats_and_dogs_are_ranked_first(shared: Path, tmp_path: Path) -> None:
    from imgcls.data import images
    from imgcls.models.classifier import Classifier
    from imgcls.models.importing import ImportConfig, import_model

    weights = shared / "weights"
    bundle = import_model(
        ImportConfig(
            arch="squeezenet1_0",
            weights=str(weights / "squeezenet1_0-imagenet.pth"),
            classes=str(weights / "imagenet-classes.txt"),
            output=str(tmp_path / "bundle"),
        )
    )
    classifier = Classifier(bundle)
    files = sorted((shared / "data" / "cats-dogs" / "train").rglob("*.jpg"))
    truth = np.array([file.parent.name == "dogs" for file in files]).astype(np.int64)
    embeddings = []
    for start in range(0, len(files), 50):
        blobs = [file.read_bytes() for file in files[start : start + 50]]
        pixels = images.stack([images.decode(blob, classifier.preprocess)[0] for blob in blobs])
        embeddings.append(classifier.classify(pixels, embeddings=True).embedding)
    unit = normalised(np.concatenate(embeddings).astype(np.float16))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    wrong = rng.choice(len(files), len(files) // 20, replace=False)
    given = truth.copy()
    given[wrong] = 1 - truth[wrong]
    scores = out_of_fold(unit, given, 2, LabelsConfig())
    own = scores[np.arange(len(given)), given]
    first = np.argsort(own)[: len(files) // 10]
    found = len(set(first.tolist()) & set(wrong.tolist())) / len(wrong)
    print(f"{found:.1%} of {len(wrong)} flipped labels among the first {len(first)}")
    assert found >= 0.7
