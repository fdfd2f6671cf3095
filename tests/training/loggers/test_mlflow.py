"""MLflow runs: settings, metrics, files, resume and failure, on a store in files."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from imgcls.data.storage import filesystem
from imgcls.errors import Interrupted, RequestError
from imgcls.training.config import TrackConfig
from imgcls.training.loggers import base
from imgcls.training.loggers.base import MetricLoggers, check_loggers, open_loggers
from imgcls.training.loggers.mlflow import build_mlflow_key
from tests.training.loggers.runs import SETTINGS, log_interrupted_run, values


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a store in files, and its URI."""
    package = pytest.importorskip("mlflow", reason="needs pip install 'imgcls[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    return package.MlflowClient(uri), uri


def only_run(client: Any) -> Any:
    home = client.get_experiment_by_name("pets").experiment_id
    (run,) = client.search_runs([home])
    return run


def steps(client: Any, run: Any, name: str) -> list[int]:
    return sorted(p.step for p in client.get_metric_history(run.info.run_id, name))


def test_mlflow_keeps_settings_metrics_and_files(mlflow: Any, tmp_path: Path) -> None:
    client, uri = mlflow
    config = TrackConfig(mlflow=uri, experiment="pets")
    output = tmp_path / "bundle"
    filesystem.write(str(output / "plots" / "curves.png"), b"picture")
    check_loggers(config, str(output))
    many = {f"key{i}": "x" * 600 for i in range(150)}
    with open_loggers(config, str(output)) as loggers:
        loggers.start(SETTINGS | {"many": many}, first=0)
        assert only_run(client).info.status == "RUNNING"
        for number in (0, 1, 2):
            loggers.log_epoch(number, values(number))
        loggers.finish({"best_epoch": 2, "best_val_accuracy": 0.5}, ["plots/curves.png"])
    run = only_run(client)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "bundle"
    assert run.data.params["model.name"] == "resnet18"
    assert run.data.params["many.key149"] == "x" * 500
    assert steps(client, run, "val_loss") == [0, 1, 2]
    assert steps(client, run, "lr") == [1, 2]
    assert run.data.metrics["best_val_accuracy"] == 0.5
    folder = client.download_artifacts(run.info.run_id, "plots")
    assert (Path(folder) / "curves.png").read_bytes() == b"picture"


def test_mlflow_continues_the_run_of_a_killed_driver(mlflow: Any, tmp_path: Path) -> None:
    client, uri = mlflow
    config = TrackConfig(mlflow=uri, experiment="pets", run="first")
    killed = MetricLoggers(base._build_loggers(config, str(tmp_path), {}), str(tmp_path))
    killed.start(SETTINGS)
    for number in (1, 2, 3):
        killed.log_epoch(number, values(number))
    state = json.loads(json.dumps(killed.state))
    # a setting that may differ between runs: MLflow would refuse to change a parameter
    other = SETTINGS | {"epochs": 9}
    error = Interrupted("SIGTERM")
    log_interrupted_run(config, tmp_path, [3, 4], error=error, settings=other, state=state)
    run = only_run(client)
    assert steps(client, run, "val_loss") == [1, 2, 3, 4]
    assert run.info.status == "KILLED"
    assert run.info.run_name == "first"


def test_mlflow_shows_a_failed_training_as_failed(mlflow: Any, tmp_path: Path) -> None:
    client, uri = mlflow
    config = TrackConfig(mlflow=uri, experiment="pets")
    state = log_interrupted_run(config, tmp_path, [1], error=ValueError("diverged"))
    assert only_run(client).info.status == "FAILED"
    with open_loggers(config, str(tmp_path), state) as loggers:
        loggers.start(SETTINGS, first=2)
        assert only_run(client).info.status == "RUNNING"


NAMES = [
    "cat [wild]",
    "a//b",
    "../up",
    "/root",
    "50 %",
    "ключ",
    "cat -u5b-",
    "a\nb",
    ".",
    "",
    "x" * 300,
]


def test_names_that_mlflow_refuses_are_kept_in_a_form_that_it_takes(
    mlflow: Any, tmp_path: Path
) -> None:
    client, uri = mlflow
    columns = {f"{name}": float(place) for place, name in enumerate(NAMES)}
    with open_loggers(TrackConfig(mlflow=uri, experiment="pets"), str(tmp_path)) as loggers:
        loggers.start(SETTINGS | {"classes": {"cat [wild]": 3}})
        loggers.log_epoch(1, columns)
        loggers.finish({"best_epoch": 1}, [])
    run = only_run(client)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {build_mlflow_key(k): v for k, v in columns.items()} | {
        "best_epoch": 1.0
    }
    assert run.data.params["classes.cat -u5b-wild-u5d-"] == "3"


def test_names_that_mlflow_takes_stay_and_others_can_be_read_back() -> None:
    for name in ("val_loss", "recall/cat.wild", "a: b-c_d", "dog-u", "ключ"):
        assert build_mlflow_key(name) == name
    keys = [build_mlflow_key(name) for name in NAMES]
    assert len(set(keys)) == len(NAMES)
    for name, key in zip(NAMES[:-2], keys, strict=False):  # not the blank and the long one
        assert re.sub(r"-u([0-9a-f]+)-", lambda found: chr(int(found[1], 16)), key) == name


@pytest.mark.parametrize(("error", "status"), [(ValueError("x"), "FAILED"), (None, "FINISHED")])
def test_a_run_whose_start_failed_halfway_is_ended(
    mlflow: Any, tmp_path: Path, error: Exception | None, status: str
) -> None:
    client, uri = mlflow
    refused = {"x" * 7000: 1} if error else {"y" * 7000: 1}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.suppress(ValueError),
        open_loggers(TrackConfig(mlflow=uri, experiment="pets"), str(tmp_path)) as loggers,
    ):
        patch.setattr("imgcls.training.loggers.mlflow.build_mlflow_key", lambda name: name)
        loggers.start(SETTINGS | refused)
        if error is not None:
            raise error
        loggers.finish({}, [])
    assert only_run(client).info.status == status


def test_files_that_mlflow_cannot_take_leave_no_run_running(
    mlflow: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, uri = mlflow
    with open_loggers(TrackConfig(mlflow=uri, experiment="pets"), str(tmp_path)) as loggers:
        loggers.start(SETTINGS)
        loggers.finish({}, ["gone.png"])
    assert only_run(client).info.status == "FINISHED"
    assert "mlflow: lost 1 of its updates" in capsys.readouterr().out


def test_an_mlflow_server_that_does_not_answer_is_refused_at_once(mlflow: Any) -> None:
    before = dict(os.environ)
    with pytest.raises(RequestError, match=r"track.mlflow http://127.0.0.1:9: .*sqlite:///"):
        check_loggers(TrackConfig(mlflow="http://127.0.0.1:9"), "/out")
    assert dict(os.environ) == before
