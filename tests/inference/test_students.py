"""A student of a teacher's bundle, in one command: labeled, trained, resumed, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

import imgcls
from imgcls.errors import BundleError, ConfigError, OutputError, RequestError
from imgcls.inference import students
from imgcls.models.bundle import (
    load_bundle,
    load_bundle_weights,
    read_description,
    save_bundle,
)
from imgcls.runs import layout
from imgcls.runs.committed import open_run
from imgcls.training.config import TrainConfig
from imgcls.training.train import train
from tests.conftest import write_manifest
from tests.inference.test_registered_runs import warm
from tests.mlflow_store import ModelStore

ROWS, LABELED = 40, 18


@pytest.fixture
def request_of(colors: Callable[..., Path], color_bundle: Path) -> Callable[..., dict[str, Any]]:
    """Keys of a student of `color_bundle`: 18 labeled images, and 40 for the teacher."""
    images = colors(ROWS)
    rows = [tuple(line.split(",")[:2]) for line in images.read_text().splitlines()[1:]]
    labeled = write_manifest(images.parent / "labeled.csv", rows[:LABELED], ("path", "label"))
    pool = write_manifest(images.parent / "pool.csv", [row[:1] for row in rows], ("path",))

    def build(**changes: Any) -> dict[str, Any]:
        teacher = {"path": str(color_bundle), "manifest": str(pool), **changes.pop("teacher", {})}
        return {
            "data": {"train": str(labeled), "val_fraction": 0.2},
            "model": {"name": "small_cnn", "options": {"width": 4}},
            "output": str(images.parent / "student"),
            "epochs": 2,
            "scale": {"cpus_per_worker": 0.5},
            "teacher": teacher,
            **changes,
        }

    return build


def test_one_call_labels_the_images_and_trains_the_student(
    joined: None,
    request_of: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    color_bundle: Path,
) -> None:
    request = request_of()
    result = imgcls.train(**request)
    output = Path(request["output"])
    run = open_run(str(output / students.TEACHER_FOLDER))
    assert run.rows == ROWS
    assert run.has_scores
    spec = load_bundle(result.bundle).spec
    made = spec.provenance["teacher"]
    assert made["bundle_sha256"] == load_bundle(str(color_bundle)).sha256
    assert made["mode"] == "soft"
    held = spec.provenance["data"]["val_rows"]
    assert made["left_out"] == {"validation images": held}
    assert (made["images"], made["labeled"]) == (ROWS - held, LABELED - held)
    assert result.history[-1].train_rows == ROWS - held
    card = (output / "README.md").read_text()
    assert f"{ROWS - held} training images of a teacher, bundle" in card
    shown = capsys.readouterr().out
    assert f"data: {LABELED - held} training images of 3 classes" in shown
    assert f"teacher: {ROWS - held} images of" in shown
    columns = set(pd.read_parquet(output / "history.parquet").columns)
    assert "val_accuracy" in columns
    assert not {name for name in columns if "teacher" in name}

    again = imgcls.train(**request)
    shown = capsys.readouterr().out
    assert "committed before" in shown
    assert "already holds the bundle of this training" in shown
    assert again.history[-1].val_loss == result.history[-1].val_loss
    with pytest.raises(OutputError, match="already holds a bundle"):
        imgcls.train(**request_of(teacher={"temperature": 4.0}))


@pytest.mark.slow
def test_without_a_manifest_the_teacher_labels_the_training_images(
    joined: None, request_of: Callable[..., dict[str, Any]]
) -> None:
    result = imgcls.train(**request_of(teacher={"manifest": None, "mode": "soft"}))
    provenance = load_bundle(result.bundle).spec.provenance
    assert provenance["teacher"]["labeled"] == provenance["teacher"]["images"]
    assert provenance["teacher"]["images"] == provenance["data"]["train_rows"]


def test_what_the_training_would_refuse_is_refused_before_the_labeling(
    request_of: Callable[..., dict[str, Any]], multilabel_bundle: Path, tmp_path: Path
) -> None:
    rows = [(f"{row}.jpg", "ant" if row % 2 else "bee") for row in range(20)]
    other = str(write_manifest(tmp_path / "other.csv", rows, ("path", "label")))
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data": other}, RequestError, "has other classes than the training"),
        (
            {"teacher": {"path": str(multilabel_bundle)}},
            RequestError,
            "is multilabel, the training",
        ),
        ({"strategy": "finetune"}, RequestError, "strategy finetune needs weights"),
        ({"model": {"name": "resnet19"}}, RequestError, "did you mean resnet18"),
        ({"teacher": {"mode": "hard", "weight": 0.5}}, ConfigError, "teacher.weight: is for"),
        (
            {"teacher": {"mode": "hard", "manifest": None}},
            ConfigError,
            "teacher.mode hard: needs images without labels; set teacher.manifest",
        ),
    ]
    for changes, error, message in wrong:
        request = request_of(**changes)
        with pytest.raises(error, match=message):
            imgcls.train(**request)
        assert not (Path(request["output"]) / students.TEACHER_FOLDER).exists()
    request = request_of()
    Path(request["output"]).mkdir()
    (Path(request["output"]) / "bundle.json").write_text("{}")
    with pytest.raises(OutputError, match="already holds a bundle"):
        imgcls.train(**request)


def test_a_teacher_can_be_a_version_of_the_model_registry(
    joined: None,
    model_store: ModelStore,
    request_of: Callable[..., dict[str, Any]],
    color_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model_store.register("teacher", color_bundle, "champion")
    request = request_of(teacher={"path": "models:/teacher@champion", "mode": "hard"}, epochs=1)
    with pytest.raises(BundleError, match="versions: 1; aliases: champion"):
        imgcls.train(**request | {"teacher": {"path": "models:/teacher@other"}})
    registered = read_description("models:/teacher@champion").url
    with pytest.raises(ConfigError, match="output: is the bundle of the teacher"):
        imgcls.train(**request | {"output": registered})
    result = imgcls.train(**request)
    made = load_bundle(result.bundle).spec.provenance["teacher"]
    assert made["bundle_sha256"] == load_bundle(str(color_bundle)).sha256

    def read_version() -> Any:
        folder = Path(request["output"]) / students.TEACHER_FOLDER
        return json.loads((folder / "_run.json").read_text())["registered_model"]

    first = read_version()
    assert (first["uri"], first["version"]) == ("models:/teacher@champion", "1")
    bundle = load_bundle(str(color_bundle))
    other = bundle.spec.model_copy(update={"classes": ["ant", "bee", "cat"]})
    save_bundle(str(tmp_path / "other"), other, load_bundle_weights(bundle))
    model_store.register("teacher", tmp_path / "other", "champion")
    monkeypatch.setattr(students, "train", lambda config: config)
    imgcls.train(**request)  # resumed: with the version that it began with
    assert read_version() == first
    model_store.register("teacher", warm(color_bundle, tmp_path / "warm"), "champion")
    imgcls.train(**request, overwrite=True)
    assert read_version()["version"] == "3"


def test_a_search_takes_a_run_and_refuses_a_bundle(
    request_of: Callable[..., dict[str, Any]],
) -> None:
    config = TrainConfig.model_validate(request_of(teacher={"manifest": None}))
    with pytest.raises(RequestError, match=r"is a bundle\. .* then pass --teacher RUN"):
        train(config)


def test_a_request_without_a_teacher_has_the_identity_of_earlier_versions(
    request_of: Callable[..., dict[str, Any]],
) -> None:
    config = TrainConfig.model_validate(request_of() | {"teacher": None})
    assert "teacher" not in json.dumps(config.identity())
    taught = TrainConfig.model_validate(request_of())
    assert taught.identity()["teacher"]["path"]


@pytest.mark.slow
def test_overwrite_labels_again_with_another_teacher(
    joined: None, request_of: Callable[..., dict[str, Any]], tmp_path: Path, color_bundle: Path
) -> None:
    from imgcls.models.bundle import load_bundle_weights, save_bundle

    request = request_of(teacher={"mode": "hard"}, epochs=1)
    first = load_bundle(imgcls.train(**request).bundle).spec.provenance["teacher"]
    loaded = load_bundle(str(color_bundle))
    spec = loaded.spec.model_copy(update={"temperature": 2.0})
    save_bundle(str(tmp_path / "other"), spec, load_bundle_weights(loaded))
    request["teacher"]["path"] = str(tmp_path / "other")
    with pytest.raises(OutputError):
        imgcls.train(**request)
    second = load_bundle(imgcls.train(**request, overwrite=True).bundle).spec.provenance["teacher"]
    assert second["bundle_sha256"] != first["bundle_sha256"]
    part = Path(request["output"]) / students.TEACHER_FOLDER / layout.PREDICTIONS_FOLDER
    assert "scores" not in pq.read_table(part).schema.names
