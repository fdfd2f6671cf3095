"""Trackers see every epoch once, and none of them can stop a training."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from imgcls.config import load
from imgcls.data import filesystem
from imgcls.errors import Interrupted, RequestError
from imgcls.training.loggers import base
from imgcls.training.loggers.base import (
    MetricLoggers,
    TrackConfig,
    check_loggers,
    flatten_settings,
    open_loggers,
)
from imgcls.training.loggers.remote import build_mlflow_key
from imgcls.training.loggers.tensorboard import build_tag

SETTINGS = {"model": {"name": "resnet18", "options": {}}, "epochs": 5, "classes": ["a", "b"]}


def values(number: int) -> dict[str, float]:
    return {
        "train_loss": 1 / (number + 1),
        "val_loss": 2 / (number + 1),
        "val_accuracy": 0.5,
        "lr": math.nan if number == 0 else 1e-3,
        "images_per_second": 100.0,
        "wait_seconds": 1.5,
    }


def broken_off(
    config: TrackConfig,
    output: Path,
    numbers: Sequence[int],
    *,
    error: BaseException,
    settings: Mapping[str, Any] = SETTINGS,
    state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A training that ends in an error after some epochs; returns the state that was kept."""
    kept: dict[str, Any] = {}

    def train() -> None:
        with open_loggers(config, str(output), state) as tracked:
            tracked.start(settings, first=numbers[0])
            for number in numbers:
                tracked.log_epoch(number, values(number))
            kept.update(json.loads(json.dumps(tracked.state)))
            raise error

    with pytest.raises(type(error)) as caught:
        train()
    assert caught.value is error
    return kept


class Telling:
    """A tracker that remembers what it was told, and fails while it is told to."""

    name = "telling"

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.told: list[Any] = []
        self.broken = False

    def _tell(self, *what: Any) -> None:
        if self.broken:
            raise ConnectionError("no route to\nhost")
        self.told.append(what)

    def check(self) -> None: ...

    def start(self, settings: Mapping[str, Any], first: int) -> str:
        self._tell("start", dict(settings), first)
        return "in memory"

    def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
        self._tell(number, dict(values))

    def finish(self, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        self._tell("finish", dict(summary), dict(files))

    def stop(self, *, interrupted: bool) -> None:
        self._tell("stop", interrupted)


# ------------------------------------------------------------------ what trackers are told


def test_settings_come_flat_and_what_is_no_number_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = Telling()
    tracked = MetricLoggers([tracker], "/out")
    tracked.start(SETTINGS)
    tracked.log_epoch(0, values(0))
    tracked.finish({"best_epoch": 1, "best_lr": math.nan}, ["plots/curves.png"])
    start, epoch, finish = tracker.told
    assert start[1] == {
        "model.name": "resnet18",
        "model.options": {},
        "epochs": 5,
        "classes": ["a", "b"],
    }
    assert epoch == (0, {k: v for k, v in values(0).items() if k != "lr"})
    assert finish == ("finish", {"best_epoch": 1}, {"plots/curves.png": "/out/plots/curves.png"})
    assert capsys.readouterr().out == "telling: in memory\n"


def test_dotted_keeps_what_is_no_section() -> None:
    assert flatten_settings({"a": {"b": {"c": 1}, "d": {}}, "e": None}) == {
        "a.b.c": 1,
        "a.d": {},
        "e": None,
    }


def test_charts_of_one_kind_stand_together() -> None:
    assert build_tag("train_loss") == "loss/train"
    assert build_tag("val_loss") == "loss/val"
    assert build_tag("val_balanced_accuracy") == "balanced_accuracy/val"
    assert build_tag("lr") == "lr"
    for name in ("seconds", "wait_seconds", "images_per_second"):
        assert build_tag(name) == f"speed/{name}"


def test_a_tracker_that_fails_is_named_once_and_told_again_later(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, other = Telling(), Telling()
    tracked = MetricLoggers([failing, other], "/out")
    tracked.start(SETTINGS)
    capsys.readouterr()
    failing.broken = True
    for number in (1, 2, 3):
        tracked.log_epoch(number, values(number))
    said = capsys.readouterr().out
    assert said.count("telling: cannot be told (no route to host); the training goes on") == 1
    assert said.count("\n") == 1
    failing.broken = False
    tracked.log_epoch(4, values(4))
    assert len(failing.told) == 1, "it should be left alone for a while"
    monkeypatch.setattr(base, "RETRY_PAUSE_SECONDS", 0.0)
    tracked.finish({})
    assert "answers again" in capsys.readouterr().out
    assert failing.told == other.told


def test_what_was_lost_in_the_end_is_said_and_the_run_is_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Picky(Telling):
        def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
            raise ValueError("bad value")

    tracker = Picky()
    tracked = MetricLoggers([tracker], "/out")
    tracked.start({})
    tracked.log_epoch(1, values(1))
    tracked.finish({"best_epoch": 1})
    assert "telling: 2 of its messages were lost (bad value)" in capsys.readouterr().out
    assert [told[0] for told in tracker.told] == ["start", "finish"]


def test_a_tracker_that_never_started_is_not_told_to_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = Telling()
    tracker.broken = True
    tracked = MetricLoggers([tracker], "/out")
    tracked.start({})
    tracked.finish({})
    assert tracker.told == []
    assert "2 of its messages were lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "interrupted"),
    [(Interrupted("SIGTERM"), True), (KeyboardInterrupt(), True), (ValueError("x"), False)],
)
def test_a_training_that_breaks_off_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, interrupted: bool
) -> None:
    tracker = Telling()
    monkeypatch.setattr(base, "_build_loggers", lambda *_: [tracker])
    broken_off(TrackConfig(), Path("/out"), [1], error=error)
    assert [told[0] for told in tracker.told] == ["start", 1, "stop"]
    assert tracker.told[-1] == ("stop", interrupted)


def test_what_never_started_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Telling()
    monkeypatch.setattr(base, "_build_loggers", lambda *_: [tracker])
    with open_loggers(TrackConfig(), "/out"):
        pass
    assert tracker.told == []


def test_a_finished_training_is_not_stopped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Telling()
    monkeypatch.setattr(base, "_build_loggers", lambda *_: [tracker])
    with open_loggers(TrackConfig(), "/out") as tracked:
        tracked.start({})
        tracked.finish({})
    assert [told[0] for told in tracker.told] == ["start", "finish"]


def test_the_end_waits_for_an_epoch_that_is_being_told_by_another_thread() -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow(Telling):
        def log_epoch(self, number: int, values: Mapping[str, float]) -> None:
            begun.set()
            assert go.wait(10)
            super().log_epoch(number, values)

    tracker = Slow()
    tracked = MetricLoggers([tracker], "/out")
    tracked.start({})
    follower = threading.Thread(target=tracked.log_epoch, args=(1, values(1)))
    follower.start()
    assert begun.wait(10)
    threading.Timer(0.2, go.set).start()
    tracked.finish({})
    tracked.log_epoch(2, values(2))  # it came too late, and breaks nothing
    follower.join()
    assert [told[0] for told in tracker.told] == ["start", 1, "finish"]


# ------------------------------------------------------------------ the request


def test_every_key_is_a_flag() -> None:
    argv = "--mlflow http://m:5000 --wandb team/pets --experiment pets --run first".split()
    config = load(TrackConfig, argv, prog="x")
    assert config == TrackConfig(
        mlflow="http://m:5000", wandb="team/pets", experiment="pets", run="first"
    )
    found = base._build_loggers(config, "/out/bundle", {})
    assert [tracker.name for tracker in found] == ["tensorboard", "mlflow", "wandb"]
    assert vars(found[1])["_experiment"] == "pets"
    assert vars(found[1])["_run"] == vars(found[2])["_name"] == "first"
    assert (vars(found[2])["_entity"], vars(found[2])["_project"]) == ("team", "pets")
    unnamed = base._build_loggers(TrackConfig(wandb="pets"), "s3://bucket/bundle/", {})
    assert vars(unnamed[1])["_name"] == "bundle"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"mlflow": "http://me:secret@m:5000"}, "MLFLOW_TRACKING_PASSWORD"),
        ({"wandb": "a/b/c"}, "neither PROJECT nor ENTITY/PROJECT"),
        ({"wandb": ""}, "neither PROJECT nor ENTITY/PROJECT"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, str], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
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


def test_nothing_is_imported_that_was_not_asked_for() -> None:
    script = (
        "import sys\n"
        "from imgcls.training.loggers import base\n"
        "base.check_loggers(base.TrackConfig(), '/out')\n"
        "heavy = {'mlflow', 'wandb', 'tensorboardX', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ------------------------------------------------------------------ TensorBoard


def read_events(folder: Path) -> Any:
    """TensorBoard's own reader, on which its pages are built."""
    name = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(name, reason="needs tensorboard").EventAccumulator(str(folder))
    events.Reload()
    return events


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every chart that TensorBoard draws, as (step, value)."""
    events = read_events(folder)
    return {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_run_while_it_goes_on(tmp_path: Path) -> None:
    with open_loggers(TrackConfig(), str(tmp_path)) as tracked:
        tracked.start(SETTINGS)
        for number in (0, 1, 2):
            tracked.log_epoch(number, values(number))
            shown = points(tmp_path / "tensorboard")
            assert [step for step, _ in shown["loss/train"]] == list(range(number + 1))
        assert set(shown) == {
            "loss/train",
            "loss/val",
            "accuracy/val",
            "lr",
            "speed/images_per_second",
            "speed/wait_seconds",
        }
        assert [step for step, _ in shown["lr"]] == [1, 2]
        assert shown["loss/val"][2][1] == pytest.approx(2 / 3)
        tracked.finish({"best_epoch": 2})


def test_tensorboard_shows_the_settings(tmp_path: Path) -> None:
    with open_loggers(TrackConfig(), str(tmp_path)) as tracked:
        tracked.start(SETTINGS)
    events = read_events(tmp_path / "tensorboard")
    (name,) = events.Tags()["tensors"]
    assert name.startswith("settings")
    (shown,) = events.Tensors(name)
    assert b"    model.name: resnet18" in shown.tensor_proto.string_val[0]


def test_a_resumed_run_shows_every_epoch_once(tmp_path: Path) -> None:
    killed = MetricLoggers(base._build_loggers(TrackConfig(), str(tmp_path), {}), str(tmp_path))
    killed.start(SETTINGS, first=1)
    for number in (1, 2, 3):
        killed.log_epoch(number, values(number))
    state = json.loads(json.dumps(killed.state))
    for first in (3, 5):  # epoch 3 was told, but the checkpoint is older
        with open_loggers(TrackConfig(), str(tmp_path), state) as tracked:
            tracked.start(SETTINGS, first=first)
            for number in (first, first + 1):
                tracked.log_epoch(number, values(number) | {"val_loss": 9.0})
                tracked.log_epoch(number, values(number) | {"val_loss": 9.0})  # workers restarted
            state = tracked.state
    shown = points(tmp_path / "tensorboard")["loss/val"]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in shown][2:] == [9.0] * 4
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


def test_another_training_takes_the_place_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "notes.txt").write_text("mine")
    for epochs in (3, 1):
        with open_loggers(TrackConfig(), str(tmp_path)) as tracked:
            tracked.start(SETTINGS)
            for number in range(1, epochs + 1):
                tracked.log_epoch(number, values(number))
    assert [step for step, _ in points(tmp_path / "tensorboard")["loss/val"]] == [1]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_event_files_reach_a_remote_folder_after_every_epoch(tmp_path: Path) -> None:
    output = f"memory://tracked/{tmp_path.name}"
    with open_loggers(TrackConfig(), output) as tracked:
        tracked.start(SETTINGS)
        for number in (1, 2):
            tracked.log_epoch(number, values(number))
            (name,) = filesystem.list_names(f"{output}/tensorboard")
            data = filesystem.read(f"{output}/tensorboard/{name}")
            filesystem.write(str(tmp_path / name), data)
            assert [step for step, _ in points(tmp_path)["lr"]] == list(range(1, number + 1))
        state = tracked.state
    with open_loggers(TrackConfig(), output, state) as tracked:
        tracked.start(SETTINGS, first=3)
        tracked.log_epoch(3, values(3))
    for name in filesystem.list_names(f"{output}/tensorboard"):
        filesystem.write(str(tmp_path / name), filesystem.read(f"{output}/tensorboard/{name}"))
    assert [step for step, _ in points(tmp_path)["lr"]] == [1, 2, 3]


def test_an_upload_that_fails_is_made_up_for_without_doubled_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base, "RETRY_PAUSE_SECONDS", 0.0)
    output = f"memory://tracked/{tmp_path.name}"
    write, fails = filesystem.write, [False]

    def flaky(url: str, data: bytes) -> None:
        if fails[0]:
            raise ConnectionError("the store is away")
        write(url, data)

    monkeypatch.setattr(filesystem, "write", flaky)
    with open_loggers(TrackConfig(), output) as tracked:
        tracked.start(SETTINGS)
        for number in (1, 2, 3, 4):
            fails[0] = number in (2, 3)
            tracked.log_epoch(number, values(number))
        tracked.finish({})
    assert capsys.readouterr().out.count("the store is away") == 1
    (name,) = filesystem.list_names(f"{output}/tensorboard")
    write(str(tmp_path / name), filesystem.read(f"{output}/tensorboard/{name}"))
    assert [step for step, _ in points(tmp_path)["lr"]] == [1, 2, 3, 4]


# ------------------------------------------------------------------ MLflow


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
    with open_loggers(config, str(output)) as tracked:
        tracked.start(SETTINGS | {"many": many}, first=0)
        assert only_run(client).info.status == "RUNNING"
        for number in (0, 1, 2):
            tracked.log_epoch(number, values(number))
        tracked.finish({"best_epoch": 2, "best_val_accuracy": 0.5}, ["plots/curves.png"])
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


def test_mlflow_goes_on_with_the_run_of_a_killed_driver(mlflow: Any, tmp_path: Path) -> None:
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
    broken_off(config, tmp_path, [3, 4], error=error, settings=other, state=state)
    run = only_run(client)
    assert steps(client, run, "val_loss") == [1, 2, 3, 4]
    assert run.info.status == "KILLED"
    assert run.info.run_name == "first"


def test_mlflow_shows_a_failed_training_as_failed(mlflow: Any, tmp_path: Path) -> None:
    client, uri = mlflow
    config = TrackConfig(mlflow=uri, experiment="pets")
    state = broken_off(config, tmp_path, [1], error=ValueError("diverged"))
    assert only_run(client).info.status == "FAILED"
    with open_loggers(config, str(tmp_path), state) as tracked:
        tracked.start(SETTINGS, first=2)
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
    with open_loggers(TrackConfig(mlflow=uri, experiment="pets"), str(tmp_path)) as tracked:
        tracked.start(SETTINGS | {"classes": {"cat [wild]": 3}})
        tracked.log_epoch(1, columns)
        tracked.finish({"best_epoch": 1}, [])
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
        open_loggers(TrackConfig(mlflow=uri, experiment="pets"), str(tmp_path)) as tracked,
    ):
        patch.setattr("imgcls.training.loggers.remote.build_mlflow_key", lambda name: name)
        tracked.start(SETTINGS | refused)
        if error is not None:
            raise error
        tracked.finish({}, [])
    assert only_run(client).info.status == status


def test_files_that_mlflow_cannot_take_leave_no_run_running(
    mlflow: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, uri = mlflow
    with open_loggers(TrackConfig(mlflow=uri, experiment="pets"), str(tmp_path)) as tracked:
        tracked.start(SETTINGS)
        tracked.finish({}, ["gone.png"])
    assert only_run(client).info.status == "FINISHED"
    assert "mlflow: 1 of its messages were lost" in capsys.readouterr().out


def test_an_mlflow_server_that_does_not_answer_is_refused_at_once(mlflow: Any) -> None:
    before = dict(os.environ)
    with pytest.raises(RequestError, match=r"track.mlflow http://127.0.0.1:9: .*sqlite:///"):
        check_loggers(TrackConfig(mlflow="http://127.0.0.1:9"), "/out")
    assert dict(os.environ) == before


# ------------------------------------------------------------------ Weights & Biases


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, offline, in a folder of its own."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("needs pip install 'imgcls[wandb]'")
    for key in list(os.environ):
        if key.startswith("WANDB_"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    package: Any = importlib.import_module("wandb")
    package.teardown()  # else it would still know the variables of another test
    yield package
    package.teardown()


def sent(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[import-not-found, unused-ignore]

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(file: Path) -> list[dict[str, Any]]:
    rows = [record.history.item for record in sent(file) if record.HasField("history")]
    return [{i.nested_key[0]: json.loads(i.value_json) for i in row} for row in rows]


def test_wandb_keeps_settings_metrics_and_files(
    wandb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrackConfig(wandb="team/pets", run="first")
    output = tmp_path / "bundle"
    filesystem.write(str(output / "plots" / "curves.png"), b"picture")
    check_loggers(config, str(output))
    with open_loggers(config, str(output)) as tracked:
        tracked.start(SETTINGS, first=0)
        (folder,) = (tmp_path / "wandb").glob("offline-run-*")
        assert f"wandb: offline; send it with `wandb sync {folder}`" in capsys.readouterr().out
        for number in (0, 1, 2):
            tracked.log_epoch(number, values(number))
        state = tracked.state
        tracked.finish({"best_epoch": 2}, ["plots/curves.png"])
    wandb.teardown()  # `finish` may return before the file is written
    file = folder / f"run-{state['wandb']['id']}.wandb"
    records = list(sent(file))
    run = next(record.run for record in records if record.HasField("run"))
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.entity, run.project, run.display_name) == ("team", "pets", "first")
    assert settings["model.name"] == "resnet18"
    rows = history(file)
    assert [row["_step"] for row in rows] == [0, 1, 2]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[2]["loss/val"] == 2 / 3
    assert "lr" not in rows[0]
    assert (folder / "files" / "plots" / "curves.png").read_bytes() == b"picture"
    assert records[-1].exit.exit_code == 0


def test_wandb_goes_on_with_the_same_run_and_says_how_it_ended(wandb: Any, tmp_path: Path) -> None:
    config = TrackConfig(wandb="pets")
    state: dict[str, Any] = {}
    for numbers in ([1, 2], [3, 4]):
        error = Interrupted("SIGTERM")
        state = broken_off(config, tmp_path, numbers, error=error, state=state)
    wandb.teardown()
    name = f"run-{state['wandb']['id']}.wandb"
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    files = [folder / name for folder in folders]
    assert len(files) == 2
    assert [row["_step"] for file in files for row in history(file)] == [1, 2, 3, 4]
    assert [list(sent(file))[-1].exit.exit_code for file in files] == [130, 130]


def test_wandb_without_a_key_is_refused_with_the_remedy(
    wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    with pytest.raises(RequestError, match="has no key; run `wandb login`, set WANDB_API_KEY"):
        check_loggers(TrackConfig(wandb="pets"), "/out")


@pytest.mark.slow  # how long wandb takes to give up is its own affair: seconds, or minutes
def test_a_wandb_server_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    """In a process of its own: within ours, wandb's end would be waited for, for minutes."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("needs pip install 'imgcls[wandb]'")
    script = (
        "from imgcls.training.loggers.base import TrackConfig, check\n"
        "check(TrackConfig(wandb='pets'), '/out')\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_DIR": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "RequestError: track.wandb pets: " in done.stderr
    assert "WANDB_MODE=offline" in done.stderr
