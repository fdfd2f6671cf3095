"""A network is converted once on a machine; what is kept is what was converted, or is not used."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from imgcls.errors import BundleError, RequestError
from imgcls.models import openvino_cache, openvino_engine
from imgcls.models.bundle import Bundle, load_bundle
from imgcls.models.cache_folder import find_cache_folder
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


def replace_whole(_: bytes) -> bytes:
    return b"no zip file"


@pytest.mark.parametrize("damage", [None, cut, flip, replace_whole])
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
    assert sorted(each.name for each in folder.iterdir()) == [f"{file.stem}.lock", file.name]
    assert CachedNetwork(small, "fp32").read() is not None


def test_workers_that_start_together_convert_each_network_once(
    small: Bundle, conversions: list[float]
) -> None:
    spec = small.spec.preprocess.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    other = replace(small, spec=small.spec.model_copy(update={"preprocess": spec}))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(build, [small, other] * 3))
    assert len(conversions) == 2


def test_after_a_conversion_that_fails_the_others_do_not_wait_for_each_other(
    small: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[int] = []
    asked, wait = [], openvino_cache._wait_for

    def note(lock: int) -> bool:
        asked.append(lock)
        return wait(lock)

    monkeypatch.setattr(openvino_cache, "_wait_for", note)

    def take_turn(number: int) -> None:
        with CachedNetwork(small, "fp32").take_turn():
            inside.append(number)
            while len(inside) < 2:  # until the other one is within its block, too
                time.sleep(0.01)

    with ThreadPoolExecutor(2) as pool:
        with CachedNetwork(small, "fp32").take_turn():
            waiting = [pool.submit(take_turn, number) for number in range(2)]
            while len(asked) < 3:
                time.sleep(0.01)
            time.sleep(0.2)
            assert not inside
        for each in waiting:
            each.result(timeout=60)
    assert CachedNetwork(small, "fp32").read() is None


def test_a_process_that_does_not_end_its_conversion_is_not_waited_for_forever(
    small: Bundle, conversions: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_cache, "MAX_WAIT_S", 0.2)
    with CachedNetwork(small, "fp32").take_turn():
        build(small)
    assert len(conversions) == 1


def test_the_weights_of_the_bundle_are_verified_also_where_the_network_is_kept(
    small: Bundle, folder: Path, tmp_path: Path
) -> None:
    build(small)
    copy = tmp_path / "copy"
    shutil.copytree(small.url, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(flip(weights.read_bytes()))
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        build(replace(small, url=str(copy)))


def test_a_folder_without_write_permission_is_read(
    small: Bundle, folder: Path, conversions: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    build(small)
    monkeypatch.setattr(os, "utime", refuse)  # root may write everywhere
    build(small)
    assert len(conversions) == 1


def test_what_changes_the_outputs_is_another_network(
    small: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_cache, "MAX_FILES", 99)
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
    architecture = spec.architecture.model_copy(update={"options": {"width": 5}})
    others.append(replace(small, spec=spec.model_copy(update={"architecture": architecture})))
    CachedNetwork(others[-1], "fp32").write(b"")
    CachedNetwork(small, "bf16").write(b"")
    for name, changed in (
        ("_CODE", "of other modules"),
        ("read_cpu_flags", lambda: {"sse4_2"}),
        ("_PACKAGES", ("torch",)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(openvino_cache, name, changed)
            CachedNetwork(small, "fp32").write(b"")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    CachedNetwork(small, "fp32").write(b"")
    warm = replace(small, spec=spec.model_copy(update={"temperature": 2.0, "threshold": 0.5}))
    CachedNetwork(warm, "fp32").write(b"")  # the same network
    assert len(list(folder.glob("*.zip"))) == len(others) + 6


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
    for name, age in ((".draft-now", 0), (".draft-lost", 7200)):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (time.time() - age,) * 2)
    made[-1].write(packed)
    assert [each.name for each in folder.glob(".draft-*")] == [".draft-now"]
    assert len(list(folder.glob("*.zip"))) == openvino_cache.MAX_FILES
    assert made[0].read() is not None
    assert made[-1].read() is not None


@pytest.mark.parametrize("problem", ["a file", "no home"])
def test_a_folder_that_cannot_be_used_costs_only_the_conversion(
    small: Bundle,
    conversions: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if problem == "a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "file"))
    else:
        for name in ("IMGCLS_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # of no user
        with pytest.raises(RequestError, match="no home folder; set IMGCLS_CACHE"):
            find_cache_folder("models")
    before = set(tmp_path.rglob("*"))
    found = build(small)
    assert found.classify(random_batch(found, 1)).scores.shape == (1, len(small.spec.classes))
    build(small)
    assert len(conversions) == 2
    assert set(tmp_path.rglob("*")) == before
