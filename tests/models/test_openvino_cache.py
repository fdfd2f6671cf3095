"""A network is converted once on a machine; what is kept is what was converted, or is not used."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from imgcls.models import openvino_cache, openvino_engine
from imgcls.models.bundle import Bundle, load_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.openvino_cache import CachedNetwork
from tests.models.test_classifier import bundle_of, random_batch


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(str(bundle_of(tmp_path_factory.mktemp("small") / "b", "small_cnn")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path))
    return tmp_path / openvino_cache.FOLDER


@pytest.fixture
def conversions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times of all conversions, which take a little longer than usual."""
    made, convert = [], openvino_engine.convert_network

    def note(*arguments: object) -> object:
        made.append(time.monotonic())
        time.sleep(0.3)
        return convert(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(openvino_engine, "convert_network", note)
    return made


def build(bundle: Bundle) -> Classifier:
    return Classifier(bundle, precision="fp32", engine="openvino", device="cpu")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [None, cut, flip])
def test_a_network_that_was_kept_gives_the_same_bytes_and_a_damaged_one_is_converted_again(
    small: Bundle,
    folder: Path,
    conversions: list[float],
    damage: Callable[[bytes], bytes] | None,
) -> None:
    first = build(small)
    (file,) = folder.glob("*.zip")
    if damage is not None:
        file.write_bytes(damage(file.read_bytes()))
    again = build(small)
    batch = random_batch(first, 5)
    one, other = (each.classify(batch, embeddings=True) for each in (first, again))
    assert one.scores.tobytes() == other.scores.tobytes()
    assert one.embedding is not None
    assert other.embedding is not None
    assert one.embedding.tobytes() == other.embedding.tobytes()
    assert len(conversions) == (1 if damage is None else 2)
    assert sorted(each.name for each in folder.iterdir()) == [file.name, "lock"]
    assert CachedNetwork(small, "fp32").read() is not None


def test_workers_that_start_together_convert_once(small: Bundle, conversions: list[float]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(build, [small] * 4))
    assert len(conversions) == 1


def test_after_a_conversion_that_fails_the_others_do_not_wait_for_each_other(
    small: Bundle, folder: Path
) -> None:
    cached = CachedNetwork(small, "fp32")
    with ThreadPoolExecutor(2) as pool:

        def take_turn(_: int) -> None:
            with CachedNetwork(small, "fp32").take_turn():
                ends.append(time.monotonic())
                while len(ends) < 2:  # within the block of the other one
                    time.sleep(0.01)

        ends: list[float] = []
        with cached.take_turn():
            waiting = [pool.submit(take_turn, each) for each in range(2)]
            time.sleep(0.2)
            assert not ends
        for each in waiting:
            each.result(timeout=60)
    assert cached.read() is None


def test_what_changes_the_outputs_is_another_network(
    small: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small.spec
    preprocess = spec.preprocess.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    others = [
        replace(small, weights_sha256="0" * 64),
        replace(small, spec=spec.model_copy(update={"preprocess": preprocess})),
        replace(small, spec=spec.model_copy(update={"classes": [*spec.classes, "other"]})),
    ]
    with CachedNetwork(small, "fp32").take_turn():  # which makes the folder
        CachedNetwork(small, "fp32").write(b"")
    for bundle in others:
        CachedNetwork(bundle, "fp32").write(b"")
    CachedNetwork(small, "bf16").write(b"")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    CachedNetwork(small, "fp32").write(b"")
    warm = replace(small, spec=spec.model_copy(update={"temperature": 2.0, "threshold": 0.5}))
    CachedNetwork(warm, "fp32").write(b"")  # the same network
    assert len(list(folder.glob("*.zip"))) == len(others) + 3


def test_the_least_recently_used_networks_are_removed(small: Bundle, folder: Path) -> None:
    made = [
        CachedNetwork(replace(small, weights_sha256=str(each)), "fp32")
        for each in range(openvino_cache.MAX_FILES + 1)
    ]
    build(small)
    (file,) = folder.glob("*.zip")
    packed = file.read_bytes()
    file.unlink()
    for each in made[:-1]:
        each.write(packed)
    for age, path in enumerate(sorted(folder.glob("*.zip"))):
        os.utime(path, (age, age))
    assert made[0].read() is not None  # used now
    made[-1].write(packed)
    assert len(list(folder.glob("*.zip"))) == openvino_cache.MAX_FILES
    assert made[0].read() is not None
    assert made[-1].read() is not None


def test_a_folder_that_cannot_be_used_costs_only_the_conversion(
    small: Bundle, conversions: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "file"))
    found = build(small)
    assert found.classify(random_batch(found, 1)).scores.shape == (1, len(small.spec.classes))
    build(small)
    assert len(conversions) == 2
