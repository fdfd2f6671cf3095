"""Problems planted in real data, and the share of them that is found."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, ImageOps

from imgcls.curation.checks import label_errors
from imgcls.curation.checks.hash_search import find_near_pairs
from imgcls.curation.config import DuplicatesConfig, LabelErrorsConfig
from imgcls.data.decoding.image_features import MIRROR_BITS, compute_features
from tests.conftest import write_manifest
from tests.curation.pictures import Row, images_of
from tests.data.pictures import encoded
from tests.processes import RayCluster, imgcls

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
    return np.stack([compute_features(blob).hash for blob in blobs]).view(np.uint64)


@pytest.fixture(scope="module")
def photographs(shared: Path) -> list[bytes]:
    files = sorted((shared / "data" / "imagenet-sample").rglob("*.JPEG"))
    assert len(files) == 334
    return [file.read_bytes() for file in files]


@pytest.fixture(scope="module")
def photograph_hashes(photographs: list[bytes]) -> np.ndarray:
    return hashes_of(photographs)


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_copies_of_photographs_are_found(
    photographs: list[bytes], photograph_hashes: np.ndarray, kind: str
) -> None:
    wanted = CHANGES[kind][2]
    copies = [planted(kind, blob) for blob in photographs]
    hashes = np.concatenate([photograph_hashes, hashes_of(copies)])
    pairs = find_near_pairs(
        hashes, MIRROR_BITS.view(np.uint64), max_distance=DuplicatesConfig().max_hash_distance
    )
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    count = len(photographs)
    assert len(found & {(i, i + count) for i in range(count)}) >= wanted * count
    # every other pair is a false one
    false = {(i, j) for i, j in found if j - i != count}
    assert len(false) < 0.001 * count * (count - 1) / 2


@pytest.mark.slow
def test_flipped_labels_of_cats_and_dogs_are_ranked_first(shared: Path, tmp_path: Path) -> None:
    from imgcls.data.decoding import decode
    from imgcls.models.classifier import Classifier
    from imgcls.models.config import ImportConfig
    from imgcls.models.import_weights import import_model

    weights = shared / "weights"
    bundle = import_model(
        ImportConfig(
            arch="squeezenet1_0",
            weights=str(weights / "squeezenet1_0-imagenet.pth"),
            classes=str(weights / "imagenet-classes.txt"),
            output=str(tmp_path / "bundle"),
        )
    )
    classifier = Classifier(bundle, device="cpu")
    files = sorted((shared / "data" / "cats-dogs" / "train").rglob("*.jpg"))
    embeddings = []
    for start in range(0, len(files), 50):
        blobs = [file.read_bytes() for file in files[start : start + 50]]
        pixels = decode.stack_images(
            [decode.decode_image(blob, classifier.preprocess)[0] for blob in blobs]
        )
        embeddings.append(classifier.classify(pixels, embeddings=True).embedding)
    rows: list[Row] = [(file.name, file.read_bytes(), file.parent.name) for file in files]
    images_ = images_of(tmp_path, rows, embeddings=np.concatenate(embeddings))
    truth = np.array([images_.classes.index(file.parent.name) for file in files])
    shares = []
    for seed in range(3):
        wrong = np.random.default_rng(seed).choice(len(files), len(files) // 20, replace=False)
        given = truth.copy()
        given[wrong] = 1 - truth[wrong]
        (errors, *_) = label_errors.find_label_issues(
            replace(images_, label=given), LabelErrorsConfig()
        )
        first = errors.indices[errors.sort_worst_first()][: len(files) // 10]
        shares.append(len(set(first.tolist()) & set(wrong.tolist())) / len(wrong))
    print(f"flipped labels among the first 10 %: {', '.join(f'{each:.1%}' for each in shares)}")
    assert min(shares) >= 0.7


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_check_finds_planted_problems_in_photographs(
    photographs: list[bytes], tmp_path: Path, cluster: RayCluster
) -> None:
    kinds = ["same bytes", "truncated", *CHANGES]
    rows = []
    for number, blob in enumerate(photographs):
        (tmp_path / f"{number}.jpg").write_bytes(blob)
        rows.append((f"{number}.jpg",))
    for number, blob in enumerate(photographs):
        name = f"copy-{number}.jpg"
        (tmp_path / name).write_bytes(planted(kinds[number % len(kinds)], blob))
        rows.append((name,))
    manifest = write_manifest(tmp_path / "m.csv", rows, ("path",))
    output = tmp_path / "out"
    done = imgcls("manifest", "check", manifest, "--output", output, env=cluster.environment())
    assert done.returncode == 0, done.stderr
    issues = pq.read_table(output / "issues.parquet").to_pylist()
    group = {
        (row["issue"], row["row"]): row["group"]
        for row in issues
        if row["issue"] in ("exact-duplicates", "near-duplicates", "unreadable")
    }
    count = len(photographs)
    for place, kind in enumerate(kinds):
        issue = {"same bytes": "exact-duplicates", "truncated": "unreadable"}.get(
            kind, "near-duplicates"
        )
        at = range(place, count, len(kinds))
        found = [
            (issue, count + i) in group
            and (issue == "unreadable" or group[issue, count + i] == group.get((issue, i)))
            for i in at
        ]
        wanted = CHANGES[kind][2] if kind in CHANGES else 1.0
        print(f"{kind:<13} {sum(found)} of {len(found)} found")
        assert sum(found) >= wanted * len(found)
    # an original is with nothing but its copy
    sizes = Counter(row["group"] for row in issues if row["issue"] == "near-duplicates")
    assert max(sizes.values()) == 2


def planted(kind: str, blob: bytes) -> bytes:
    """The copy of a photograph with a fault of that kind."""
    if kind == "same bytes":
        return blob
    if kind == "truncated":
        return blob[: len(blob) // 2]
    change, quality, _ = CHANGES[kind]
    return encoded(change(Image.open(io.BytesIO(blob)).convert("RGB")), "JPEG", quality=quality)
