"""What every test may use: drawn images, small bundles, the shared data, and a Ray of its own."""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.processes import RayCluster

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("IMGCLS_SHARED", REPOSITORY.parent / "shared"))
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real photographs and weights; tests that need them skip where they are absent."""
    if not (SHARED / "data" / "imagenet-sample" / "manifest.csv").exists():
        pytest.skip(f"no shared data at {SHARED}; set IMGCLS_SHARED")
    return SHARED


def draw(name: str, size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    """A noisy picture whose colour is its class."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-25, 26, (size[1], size[0], 3))
    pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    corner = (int(rng.integers(0, size[0])), int(rng.integers(0, size[1])))
    ImageDraw.Draw(image).ellipse((*corner, corner[0] + 9, corner[1] + 9), fill=(128, 128, 128))
    return image


@pytest.fixture(scope="session")
def colour_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CNN that was never trained: deterministic, quick, and right about nothing."""
    import torch

    from imgcls.models import zoo
    from imgcls.models.bundle import BundleSpec, save_bundle

    folder = tmp_path_factory.mktemp("colours") / "bundle"
    architecture = zoo.architecture("small_cnn", {"width": 8})
    torch.manual_seed(0)
    network = zoo.build(architecture, len(COLOURS))
    spec = BundleSpec(
        architecture=architecture,
        classes=list(COLOURS),
        preprocess=zoo.default_preprocess(architecture),
    )
    save_bundle(str(folder), spec, network.state_dict())
    return folder


def write_manifest(path: Path, rows: Sequence[tuple[str, ...]], header: Sequence[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def colours(tmp_path: Path) -> Callable[[int], Path]:
    """Draws N coloured images and a labelled manifest of them."""

    def make(count: int) -> Path:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        rows = []
        for i in range(count):
            name = list(COLOURS)[i % len(COLOURS)]
            file = folder / f"{i:05d}.jpg"
            draw(name, seed=i).save(file, quality=90)
            rows.append((f"images/{file.name}", name, f"camera {i % 2}"))
        return write_manifest(tmp_path / "manifest.csv", rows, ("path", "label", "camera"))

    return make


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A Ray cluster with two logical CPUs in processes of its own, for jobs run as commands."""
    with RayCluster.start(cpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Where an S3 store answers."""
    from tests.s3 import serving

    with serving() as url:
        yield url


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket as a client of its own, for all that this test starts."""
    from tests.s3 import bucket

    with bucket(endpoint, monkeypatch) as client:
        yield client
