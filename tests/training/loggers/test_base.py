"""Loggers get every epoch once, and a failing logger cannot stop a training."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from imgcls.config import load
from imgcls.errors import Interrupted, RequestError
from imgcls.training.config import TrackConfig
from imgcls.training.loggers import base
from imgcls.training.loggers.base import (
    MetricLoggers,
    check_loggers,
    flatten_settings,
    open_loggers,
)
from tests.training.loggers.runs import SETTINGS, log_interrupted_run, values


class RecordingLogger:
    """A logger that records its calls, and raises while `broken` is set."""

    name = "recording"

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.calls: list[Any] = []
        self.broken = False

    def _record(self, *call: Any) -> None:
        if self.broken:
            raise ConnectionError("no route to\nhost")
        self.calls.append(call)

    def check(self) -> None: ...

    def start(self, settings: Mapping[str, Any], first: int) -> str:
        self._record("start", dict(settings), first)
        return "in memory"

    def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
        self._record(number, dict(values))

    def finish(self, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        self._record("finish", dict(summary), dict(files))

    def stop(self, *, interrupted: bool) -> None:
        self._record("stop", interrupted)


# ------------------------------------------------------------------ calls and failures


def test_settings_are_flattened_and_nan_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = RecordingLogger()
    loggers = MetricLoggers([logger], "/out")
    loggers.start(SETTINGS)
    loggers.log_epoch(0, values(0))
    loggers.finish({"best_epoch": 1, "best_lr": math.nan}, ["plots/curves.png"])
    start, epoch, finish = logger.calls
    assert start[1] == {
        "model.name": "resnet18",
        "model.options": {},
        "epochs": 5,
        "classes": ["a", "b"],
    }
    assert epoch == (0, {k: v for k, v in values(0).items() if k != "lr"})
    assert finish == ("finish", {"best_epoch": 1}, {"plots/curves.png": "/out/plots/curves.png"})
    assert capsys.readouterr().out == "recording: in memory\n"


def test_an_epoch_is_logged_once() -> None:
    logger = RecordingLogger()
    loggers = MetricLoggers([logger], "/out")
    loggers.start(SETTINGS, first=2)
    for number in (1, 2, 1, 2, 3, 2):
        loggers.log_epoch(number, values(number))
    loggers.finish({})
    assert [call[0] for call in logger.calls[1:-1]] == [2, 3]


def test_flattening_keeps_values_that_are_no_section() -> None:
    assert flatten_settings({"a": {"b": {"c": 1}, "d": {}}, "e": None}) == {
        "a.b.c": 1,
        "a.d": {},
        "e": None,
    }


def test_a_failing_logger_is_reported_once_and_gets_the_missing_epochs_later(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, other = RecordingLogger(), RecordingLogger()
    loggers = MetricLoggers([failing, other], "/out")
    loggers.start(SETTINGS)
    capsys.readouterr()
    failing.broken = True
    for number in (1, 2, 3):
        loggers.log_epoch(number, values(number))
    printed = capsys.readouterr().out
    assert (
        printed.count("recording: logging failed (no route to host); the training continues") == 1
    )
    assert printed.count("\n") == 1
    failing.broken = False
    loggers.log_epoch(4, values(4))
    assert len(failing.calls) == 1, "it must not be called again before the pause is over"
    monkeypatch.setattr(base, "RETRY_PAUSE_S", 0.0)
    loggers.finish({})
    assert "reachable again" in capsys.readouterr().out
    assert failing.calls == other.calls


def test_lost_updates_are_reported_and_the_run_is_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Picky(RecordingLogger):
        def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
            raise ValueError("bad value")

    logger = Picky()
    loggers = MetricLoggers([logger], "/out")
    loggers.start({})
    loggers.log_epoch(1, values(1))
    loggers.finish({"best_epoch": 1})
    assert "recording: lost 2 of its updates (bad value)" in capsys.readouterr().out
    assert [call[0] for call in logger.calls] == ["start", "finish"]


def test_a_logger_that_never_started_is_not_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = RecordingLogger()
    logger.broken = True
    loggers = MetricLoggers([logger], "/out")
    loggers.start({})
    loggers.finish({})
    assert logger.calls == []
    assert "lost 2 of its updates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "interrupted"),
    [(Interrupted("SIGTERM"), True), (KeyboardInterrupt(), True), (ValueError("x"), False)],
)
def test_an_interrupted_or_failed_training_is_logged_as_such(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, interrupted: bool
) -> None:
    logger = RecordingLogger()
    monkeypatch.setattr(base, "_build_loggers", lambda *_: [logger])
    log_interrupted_run(TrackConfig(), Path("/out"), [1], error=error)
    assert [call[0] for call in logger.calls] == ["start", 1, "stop"]
    assert logger.calls[-1] == ("stop", interrupted)


def test_a_run_that_never_started_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RecordingLogger()
    monkeypatch.setattr(base, "_build_loggers", lambda *_: [logger])
    with open_loggers(TrackConfig(), "/out"):
        pass
    assert logger.calls == []


def test_a_finished_training_is_not_stopped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RecordingLogger()
    monkeypatch.setattr(base, "_build_loggers", lambda *_: [logger])
    with open_loggers(TrackConfig(), "/out") as loggers:
        loggers.start({})
        loggers.finish({})
    assert [call[0] for call in logger.calls] == ["start", "finish"]


def test_the_end_waits_for_an_epoch_that_another_thread_is_logging() -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow(RecordingLogger):
        def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
            begun.set()
            assert go.wait(10)
            super().log_epoch(number, values)

    logger = Slow()
    loggers = MetricLoggers([logger], "/out")
    loggers.start({})
    follower = threading.Thread(target=loggers.log_epoch, args=(1, values(1)))
    follower.start()
    assert begun.wait(10)
    threading.Timer(0.2, go.set).start()
    loggers.finish({})
    loggers.log_epoch(2, values(2))  # too late: ignored
    follower.join()
    assert [call[0] for call in logger.calls] == ["start", 1, "finish"]


# ------------------------------------------------------------------ configuration


def test_every_key_is_an_option() -> None:
    argv = "--mlflow http://m:5000 --wandb team/pets --experiment pets --run first".split()
    config = load(TrackConfig, argv)
    assert config == TrackConfig(
        mlflow="http://m:5000", wandb="team/pets", experiment="pets", run="first"
    )
    found = base._build_loggers(config, "/out/bundle", {})
    assert [logger.name for logger in found] == ["tensorboard", "mlflow", "wandb"]
    assert vars(found[1])["_experiment"] == "pets"
    assert vars(found[1])["_run"] == vars(found[2])["_name"] == "first"
    assert (vars(found[2])["_entity"], vars(found[2])["_project"]) == ("team", "pets")
    unnamed = base._build_loggers(TrackConfig(wandb="pets"), "s3://bucket/bundle/", {})
    assert vars(unnamed[1])["_name"] == "bundle"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mlflow": "http://me:secret@m:5000"}, "MLFLOW_TRACKING_PASSWORD"),
        ({"wandb": "a/b/c"}, "is not a project; pass PROJECT or ENTITY/PROJECT"),
        ({"wandb": ""}, "is not a project; pass PROJECT or ENTITY/PROJECT"),
    ],
)
def test_an_invalid_uri_or_project_is_refused(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrackConfig.model_validate(wrong)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = TrackConfig.model_validate({name: "here"})
    # None stands for a module that cannot be imported; an empty one for a folder of that name
    for absent in (None, types.ModuleType(name)):
        monkeypatch.setitem(sys.modules, name, absent)
        with pytest.raises(RequestError, match=rf"track.{name}: .* pip install 'imgcls\[{name}\]'"):
            check_loggers(config, "/out")


def test_packages_of_loggers_that_are_not_configured_are_not_imported() -> None:
    script = (
        "import sys\n"
        "from imgcls.training.config import TrackConfig\n"
        "from imgcls.training.loggers import base\n"
        "base.check_loggers(TrackConfig(), '/out')\n"
        "heavy = {'mlflow', 'wandb', 'tensorboardX', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
