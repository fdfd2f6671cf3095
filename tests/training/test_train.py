"""The whole of training: what is refused before Ray starts, and one run with two workers."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import ray.train
import yaml
from PIL import Image

from imgcls.config import Section, load
from imgcls.errors import (
    BundleError,
    OutputError,
    RequestError,
    ResourcesError,
    RunFailed,
    TooManyErrors,
)
from imgcls.models.classifier import Classifier
from imgcls.training.fit import _told
from imgcls.training.train import TrainConfig, TrainResult, train
from tests.conftest import REPOSITORY, write_manifest

TRAIN_ROWS, VAL_ROWS = 397, 83  # primes: nothing divides by workers or batches


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits as files, train.csv with one file that is no image, and val.csv."""
    from sklearn.datasets import load_digits

    data = load_digits()
    folder = tmp_path_factory.mktemp("digits")
    rows = []
    for i in np.random.default_rng(0).permutation(len(data.target))[: TRAIN_ROWS + VAL_ROWS]:
        pixels = (data.images[i] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append((f"{i}.png", str(data.target[i])))
    (folder / "broken.png").write_bytes(b"\x89PNG")
    header = ("path", "label")
    train_rows = [*rows[:100], ("broken.png", "3"), *rows[100:TRAIN_ROWS]]
    write_manifest(folder / "train.csv", train_rows, header)
    write_manifest(folder / "val.csv", rows[TRAIN_ROWS:], header)
    return folder


def config(digits: Path, output: Path, **changes: Any) -> TrainConfig:
    settings = {
        "data": {"train": str(digits / "train.csv"), "val": str(digits / "val.csv")},
        "model": {"name": "small_cnn", "options": {"width": 16}},
        "optim": {"lr": 4e-3},
        "scale": {"num_workers": 2},
        "output": str(output),
        "epochs": 6,
        "batch_size": 30,
    }
    return TrainConfig.model_validate(settings | changes)


def leaves(section: type[Section], prefix: str = "") -> Iterator[str]:
    from imgcls.config import _section_of

    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None or (inner.shorthand and not field.is_required()):
            yield prefix + name
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def test_the_shipped_yaml_loads_and_shows_every_key() -> None:
    file = REPOSITORY / "jobs" / "train.yaml"
    load(TrainConfig, ["--config", str(file)], prog="imgcls train")

    def shown(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from shown(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    assert set(shown(yaml.safe_load(file.read_text()))) == set(leaves(TrainConfig))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 1}, RequestError, "without an image; give at least 2"),
        ({"batch_size": 9999}, RequestError, "larger than the training set of 398 images"),
        ({"model": {"name": "resnet19"}}, BundleError, "did you mean resnet18"),
        ({"model": {"name": "small_cnn", "image_size": 4}}, BundleError, "set model.image_size"),
        ({"model": {"name": "small_cnn", "options": {"depth": 9}}}, BundleError, "model.options"),
        ({"model": {"name": "small_cnn", "weights": "gone.pth"}}, BundleError, "no such file"),
    ],
)
def test_a_wrong_request_starts_nothing(
    digits: Path, tmp_path: Path, changes: Any, error: type[Exception], message: str
) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(error, match=message):
        train(config(digits, output, **changes))
    assert not output.exists()


def test_a_bundle_is_not_overwritten_unasked(digits: Path, colour_bundle: Path) -> None:
    before = sorted(file.read_bytes() for file in colour_bundle.iterdir())
    with pytest.raises(OutputError, match="already holds a bundle; say --overwrite"):
        train(config(digits, colour_bundle))
    assert sorted(file.read_bytes() for file in colour_bundle.iterdir()) == before


def test_an_output_that_cannot_be_written_is_refused(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot be written"):
        train(config(digits, tmp_path / "file" / "bundle"))


def test_what_is_told_is_the_failure_and_not_that_others_lost_touch() -> None:
    failures = {
        0: RuntimeError("[gloo/transport] Connection closed by peer"),
        1: RuntimeError("Traceback\n  ...\nRuntimeError: CUDA out of memory. Tried to allocate"),
    }
    told = _told(ray.train.WorkerGroupError("", failures))
    assert told.startswith("training worker 1 failed: RuntimeError: CUDA out of memory")
    assert told.endswith("give a smaller batch_size")


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def trained(two_cpus: None, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(config(digits, tmp_path_factory.mktemp("trained") / "bundle"))


def test_two_workers_use_every_good_row_exactly_once_per_epoch(trained: TrainResult) -> None:
    assert [epoch.epoch for epoch in trained.history] == [1, 2, 3, 4, 5, 6]
    assert {epoch.train_rows for epoch in trained.history} == {TRAIN_ROWS}
    assert {epoch.val_rows for epoch in trained.history} == {VAL_ROWS}
    assert trained.failed == 1


def test_the_bundle_predicts_as_well_as_was_told(trained: TrainResult, digits: Path) -> None:
    classifier = Classifier.load(trained.bundle, precision="fp32")
    val = pd.read_csv(digits / "val.csv", dtype=str)
    predictions = classifier.predict([digits / path for path in val.path])
    correct = sum(p.label == label for p, label in zip(predictions, val.label, strict=True))
    assert correct / VAL_ROWS >= 0.9
    # the workers may have judged it in bf16, which can move a row or two
    assert abs(correct - trained.best.val_accuracy * VAL_ROWS) <= 2


def test_the_bundle_holds_the_best_epoch_and_how_it_was_made(
    trained: TrainResult, digits: Path
) -> None:
    body = json.loads((Path(trained.bundle) / "bundle.json").read_text())
    assert trained.best == max(trained.history, key=lambda e: (e.val_accuracy, -e.val_loss))
    assert body["metrics"]["val_accuracy"] == trained.best.val_accuracy
    assert body["metrics"]["epoch"] == trained.best.epoch
    made = body["provenance"]
    assert made["config"]["optim"]["lr"] == 4e-3
    assert made["seed"] == 0
    assert made["versions"]["ray"] == ray.__version__
    assert made["data"]["train_rows"] == TRAIN_ROWS + 1
    assert made["data"]["train_failed"] == 1
    source = made["data"]["manifests"]["data.val"]
    assert (source["manifest"], source["rows"]) == (str(digits / "val.csv"), VAL_ROWS)
    assert len(source["fingerprint"]) == 32


def test_the_history_is_a_table_of_every_epoch(trained: TrainResult) -> None:
    table = pd.read_parquet(Path(trained.bundle) / "history.parquet")
    assert table.epoch.tolist() == [1, 2, 3, 4, 5, 6]
    assert table.val_accuracy.tolist() == [epoch.val_accuracy for epoch in trained.history]
    assert {"train_loss", "train_accuracy", "val_loss", "lr", "images_per_second", "seconds"} < set(
        table.columns
    )


def test_nothing_but_the_bundle_is_left(trained: TrainResult) -> None:
    names = {path.name for path in Path(trained.bundle).iterdir()}
    assert names == {"README.md", "bundle.json", "history.parquet", "model.safetensors"}


def test_too_many_bad_images_train_nothing(
    two_cpus: None, tmp_path: Path, colours: Callable[[int], Path]
) -> None:
    manifest = colours(30)
    for name in ("00003", "00011"):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(b"")
    output = tmp_path / "bundle"
    request = {"data": {"train": str(manifest)}, "model": {"name": "small_cnn"}, "batch_size": 8}
    with pytest.raises(TooManyErrors, match=r"2 of 30 images .*\n.*00003.jpg: the file has no"):
        train(TrainConfig.model_validate(request | {"output": str(output)}))
    assert list(output.iterdir()) == []


def test_workers_that_do_not_fit_are_refused(two_cpus: None, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourcesError, match="do not fit the machines"):
        train(config(digits, tmp_path / "bundle", scale={"num_workers": 3}))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(two_cpus: None, digits: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(config(digits, tmp_path / name, epochs=2))
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_a_diverging_run_says_so_and_leaves_no_bundle(
    two_cpus: None, digits: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(RunFailed, match="train_loss is nan in epoch 1; lower optim"):
        train(config(digits, output, optim={"lr": 1e18}, precision="fp32"))
    assert list(output.iterdir()) == []


@pytest.mark.slow
def test_an_interrupted_run_ends_at_once_and_leaves_no_bundle(digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    command = [sys.executable, "-u", str(REPOSITORY / "jobs" / "train.py")]
    command += ["--data.train", str(digits / "train.csv"), "--output", str(output)]
    command += ["--model.name", "small_cnn", "--epochs", "1000", "--scale.num-workers", "2"]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a Ray of its own, not one that another test left its address of
        env=os.environ | {"RAY_ADDRESS": "local"},
    )
    assert run.stdout is not None
    assert run.stderr is not None
    while not run.stdout.readline().startswith("epoch    2/1000"):
        assert run.poll() is None, run.stderr.read()
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 1
    assert "imgcls train: stopped by SIGTERM" in errors
    assert list(output.iterdir()) == []
