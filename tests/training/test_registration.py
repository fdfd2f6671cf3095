"""`track.register_as`: a finished training becomes a version of a model in MLflow's registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls import train
from imgcls.errors import RequestError, RunFailed
from imgcls.models.bundle import load_bundle
from imgcls.training import registration
from imgcls.training.config import TrackConfig
from imgcls.training.loggers.base import check_loggers
from imgcls.training.registration import register_bundle
from tests.conftest import write_manifest
from tests.mlflow_store import ModelStore
from tests.runs.embedded import CLASSES, commit_run, save_with_head


def test_a_training_registers_its_bundle_in_its_own_run_and_only_once(
    model_store: ModelStore, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_with_head(tmp_path / "source", CLASSES, 1)
    vectors = commit_run(tmp_path / "run", source, 60)
    is_up = vectors @ np.linspace(-1, 1, vectors.shape[1]) > 0
    rows = [(f"/{n}.jpg", "up" if is_up[n] else "down") for n in range(60) if n != 5]
    labels = write_manifest(tmp_path / "labels.csv", rows, ("path", "label"))
    request = {
        "data": {"train": str(labels), "embeddings": str(tmp_path / "run")},
        "output": str(tmp_path / "bundle"),
        "track": {"mlflow": model_store.uri, "register_as": "trained"},
    }
    train(**request)
    bundle = load_bundle("models:/trained/1")
    assert bundle.sha256 == load_bundle(str(tmp_path / "bundle")).sha256
    assert bundle.spec.classes == ["down", "up"]
    version = model_store.client.get_model_version("trained", "1")
    run = model_store.client.get_run(version.run_id)
    assert (run.info.run_name, run.info.status) == ("bundle", "FINISHED")
    assert run.data.metrics["val_accuracy"] == bundle.spec.metrics["val_accuracy"]
    assert version.tags["imgcls.val_accuracy"] == f"{bundle.spec.metrics['val_accuracy']:.6g}"
    assert "registered: version 1 of 'trained'" in capsys.readouterr().out
    train(**request)
    assert "registered before: version 1 of 'trained'" in capsys.readouterr().out
    other = request | {"track": {"mlflow": model_store.uri, "register_as": "again"}}
    train(**other)  # the finished training is registered under another name, not repeated
    assert load_bundle("models:/again/1").sha256 == bundle.sha256


def test_nothing_is_registered_without_a_name(model_store: ModelStore, color_bundle: Path) -> None:
    assert register_bundle(TrackConfig(mlflow=model_store.uri), str(color_bundle)) is None


def test_a_registry_that_does_not_answer_keeps_the_bundle_and_names_the_fix(
    color_bundle: Path,
) -> None:
    config = TrackConfig(mlflow="http://127.0.0.1:9", register_as="colors")
    with pytest.raises(RequestError, match=r"track.mlflow http://127.0.0.1:9: "):
        check_loggers(config, "/out")
    with pytest.raises(RunFailed, match="which registers it without training again"):
        register_bundle(config, str(color_bundle))


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", " "])
def test_names_that_a_uri_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a model name; pass one without"):
        TrackConfig(mlflow="sqlite:///x.db", register_as=name)
    with pytest.raises(ValueError, match=r"set track\.mlflow to its URI"):
        TrackConfig(register_as="colors")


def test_a_bundle_that_another_command_registered_meanwhile_gets_no_second_version(
    model_store: ModelStore, color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = registration._upload_model

    def lose(*values: Any) -> None:
        monkeypatch.setattr(registration, "_upload_model", upload)
        model_store.register("raced", color_bundle)
        upload(*values)

    monkeypatch.setattr(registration, "_upload_model", lose)
    assert register_bundle(model_store.track("raced"), str(color_bundle)) == "1"
    assert len(model_store.client.search_model_versions("name='raced'")) == 1
