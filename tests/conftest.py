"""What every test may use: drawn images, small bundles, the shared data, and a Ray of its own."""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"
# a test process and its commands per core: with more threads each would wait for the others'
os.environ.setdefault("OMP_NUM_THREADS", "1")
# where a worker has several threads, they sleep while they wait for one that has no core
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# one process less per training; the test of a drained node turns it on
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

import csv
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image, ImageDraw
from upath import UPath

from imgcls import log
from imgcls.data.containers.archive_index import set_process_index_folder
from tests.mlflow_store import ModelStore, open_store
from tests.processes import RayCluster
from tests.s3 import bucket, environment, serving, url

# until all tests are collected there is little garbage, and every search for it would visit all
gc.disable()

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("IMGCLS_SHARED", REPOSITORY.parent / "shared"))
hypothesis.settings.register_profile("imgcls", deadline=None)
hypothesis.settings.load_profile("imgcls")

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


LONG = ("e2e", "training")
"""Folders of which files take minutes: begun first, they leave no process waiting for the last."""
CLUSTER = pytest.StashKey[RayCluster]()
CLUSTER_FILES = pytest.StashKey[set[Path]]()
"""Files of which tests use the shared cluster."""


@pytest.hookimpl(tryfirst=True)  # before any fixture
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path not in item.config.stash[CLUSTER_FILES]:
        end_cluster(item.config)
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    users = {item.path for item in items if "cluster" in getattr(item, "fixturenames", ())}
    config.stash[CLUSTER_FILES] = users
    items.sort(key=lambda item: (item.path not in users, not set(LONG) & set(item.path.parts)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave the modules of torch, Ray and all tests out of every garbage collection."""
    gc.freeze()
    gc.set_threshold(10_000)  # tests are short; with 700, collections take 4 % of their time
    gc.enable()


def end_cluster(config: pytest.Config) -> None:
    """Kill the shared cluster after the last file that uses it: idle, it takes 6 % of a core."""
    if CLUSTER in config.stash:
        import ray

        if not ray.is_initialized():
            config.stash[CLUSTER].kill()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Converted networks are kept for the tests of this process, not for the user."""
    os.environ["IMGCLS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def command_output() -> Iterator[None]:
    """What the functions of commands log is shown as the command shows it."""
    with log.command_handler():
        yield


@pytest.fixture(autouse=True)
def no_index_folder() -> Iterator[None]:
    """The folder of indexes that a worker sets for its process ends with the test."""
    yield
    set_process_index_folder(None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real photographs and weights; tests that need them skip where they are absent."""
    if not (SHARED / "data" / "imagenet-sample" / "manifest.csv").exists():
        pytest.skip(f"no shared data at {SHARED}; set IMGCLS_SHARED")
    return SHARED


def draw(name: str, size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    """A noisy image whose color is its class."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-25, 26, (size[1], size[0], 3))
    pixels = np.clip(np.array(COLORS[name]) + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    corner = (int(rng.integers(0, size[0])), int(rng.integers(0, size[1])))
    ImageDraw.Draw(image).ellipse((*corner, corner[0] + 9, corner[1] + 9), fill=(128, 128, 128))
    return image


@pytest.fixture(scope="session")
def color_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CNN that was never trained: deterministic, quick, and right about nothing."""
    import torch

    from imgcls.models import zoo
    from imgcls.models.bundle import BundleSpec, save_bundle

    folder = tmp_path_factory.mktemp("colors") / "bundle"
    architecture = zoo.resolve_architecture("small_cnn", {"width": 8})
    torch.manual_seed(0)
    network = zoo.build_network(architecture, len(COLORS))
    spec = BundleSpec(
        architecture=architecture,
        classes=list(COLORS),
        preprocess=zoo.get_default_preprocess(architecture),
    )
    save_bundle(str(folder), spec, network.state_dict())
    return folder


@pytest.fixture(scope="session")
def multilabel_bundle(color_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`color_bundle` for any number of colors per image.

    The scores of any drawn image are about 0.90, 0.61 and 0.24. By the thresholds of the classes,
    its labels are red and blue.
    """
    from imgcls.models.bundle import VectorScaling, load_bundle, load_bundle_weights, save_bundle

    loaded = load_bundle(str(color_bundle))
    changes = {
        "task": "multilabel",
        "format_version": 2,
        "threshold": 0.5,
        "thresholds": {"green": 0.7, "blue": 0.2},
        "vector_scaling": VectorScaling(scale=[1.0, 1.0, 1.0], bias=[2.0, 0.3, -1.0]),
    }
    folder = tmp_path_factory.mktemp("multilabel") / "bundle"
    spec = type(loaded.spec).model_validate(loaded.spec.model_dump() | changes)
    save_bundle(str(folder), spec, load_bundle_weights(loaded))
    return folder


@pytest.fixture(scope="session")
def overflowing_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CNN of finite weights whose first logit is infinite for a white image only."""
    import torch

    from imgcls.data.decoding import decode
    from imgcls.models import zoo
    from imgcls.models.bundle import BundleSpec, save_bundle

    folder = tmp_path_factory.mktemp("overflowing") / "bundle"
    architecture = zoo.resolve_architecture("small_cnn", {"width": 8})
    preprocess = zoo.get_default_preprocess(architecture)
    torch.manual_seed(0)
    network = zoo.build_network(architecture, len(COLORS)).eval()
    *_, norm = (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    _, head = zoo.find_head(network)
    shown = [draw(name, seed=seed) for seed, name in enumerate(COLORS)]
    shown.append(Image.new("RGB", (64, 48), "white"))
    pixels = torch.from_numpy(
        decode.stack_images([decode.preprocess_pil_image(image, preprocess) for image in shown])
    )
    inputs = (pixels / 255 - 0.5) / 0.25  # the mean and deviation of the small CNN
    with torch.no_grad():
        norm.weight.mul_(1e4)
        caught: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        network(inputs)
        hook.remove()
        features = caught[0].flatten(1)
        white, others = features[-1], features[:-1].amax(0)
        place = int((white / others.clamp_min(1e-3)).argmax())
        middle = float((white[place] + others[place]) / 2)
        head.weight.zero_()
        head.weight[0, place] = torch.finfo(torch.float32).max / middle
        head.bias.zero_()
    spec = BundleSpec(architecture=architecture, classes=list(COLORS), preprocess=preprocess)
    save_bundle(str(folder), spec, network.state_dict())
    return folder


def write_manifest(path: Path, rows: Sequence[tuple[str, ...]], header: Sequence[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def save(image: Image.Image, file: Path, **options: Any) -> None:
    """Write an image, in the format of the suffix, to a disk or a store."""
    with file.open("wb") as stream:
        image.save(stream, Image.registered_extensions()[file.suffix], **options)


def copied(source: Path, target: Path) -> Path:
    """A folder and all in it, on a disk or a store."""
    for file in source.rglob("*"):
        if file.is_file():
            to = target / file.relative_to(source).as_posix()
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(file.read_bytes())
    return target


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest) -> Path:
    """An empty folder on disk, and one on an object store: what holds here holds there."""
    if request.param == "disk":
        return UPath(request.getfixturevalue("tmp_path"))
    request.getfixturevalue("s3")
    return UPath(url("place"), use_listings_cache=False)


@pytest.fixture
def placed_bundle(place: Path, color_bundle: Path) -> Path:
    """`color_bundle`, where everything else is."""
    return copied(color_bundle, place / "bundle")


@pytest.fixture
def colors(tmp_path: Path) -> Callable[..., Path]:
    """Draws N colored images and a labeled manifest of them, in a folder of the test."""

    def make(count: int, place: Path = tmp_path) -> Path:
        folder = place / "images"
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(count):
            name = list(COLORS)[i % len(COLORS)]
            file = folder / f"{i:05d}.jpg"
            save(draw(name, seed=i), file, quality=90)
            rows.append((f"images/{file.name}", name, f"camera {i % 2}"))
        return write_manifest(place / "manifest.csv", rows, ("path", "label", "camera"))

    return make


@pytest.fixture(scope="session")
def cluster(endpoint: str, pytestconfig: pytest.Config) -> Iterator[RayCluster]:
    """A Ray cluster with two logical CPUs in processes of its own, for jobs run as commands.

    Its machines know the way to the object store, as those of a real one do.
    """
    with RayCluster.start(cpus=2, fork=True, env=environment(endpoint)) as running:
        pytestconfig.stash[CLUSTER] = running
        yield running


@pytest.fixture(scope="module")
def joined(cluster: RayCluster) -> Iterator[None]:
    """This process is a driver of the test cluster."""
    with cluster.joined():
        yield


@pytest.fixture(scope="session")
def shared_model_store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """One MLflow registry for all tests, each with names of its own."""
    return open_store(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def model_store(
    shared_model_store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ModelStore:
    """The MLflow registry that `models:/` means in this test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_model_store.uri)
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "cache"))
    return shared_model_store


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Where an S3 store answers."""
    with serving() as url:
        yield url


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket as a client of its own, for all that this test starts."""
    with bucket(endpoint, monkeypatch) as client:
        yield client
