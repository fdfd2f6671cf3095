"""TensorBoard event files: written at once, one point per epoch after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imgcls.data.storage import filesystem
from imgcls.training.config import TrackConfig
from imgcls.training.loggers import base
from imgcls.training.loggers.base import MetricLoggers, open_loggers
from imgcls.training.loggers.tensorboard import build_tag
from tests.training.loggers.runs import SETTINGS, values


def test_charts_of_one_kind_stand_together() -> None:
    assert build_tag("train_loss") == "loss/train"
    assert build_tag("val_loss") == "loss/val"
    assert build_tag("val_balanced_accuracy") == "balanced_accuracy/val"
    assert build_tag("lr") == "lr"
    for name in ("seconds", "wait_seconds", "images_per_second"):
        assert build_tag(name) == f"speed/{name}"


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
    with open_loggers(TrackConfig(), str(tmp_path)) as loggers:
        loggers.start(SETTINGS)
        for number in (0, 1, 2):
            loggers.log_epoch(number, values(number))
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
        loggers.finish({"best_epoch": 2})


def test_tensorboard_shows_the_settings(tmp_path: Path) -> None:
    with open_loggers(TrackConfig(), str(tmp_path)) as loggers:
        loggers.start(SETTINGS)
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
    for first in (3, 5):  # epoch 3 was logged, but the checkpoint is older
        with open_loggers(TrackConfig(), str(tmp_path), state) as loggers:
            loggers.start(SETTINGS, first=first)
            for number in (first, first + 1):
                loggers.log_epoch(number, values(number) | {"val_loss": 9.0})
                loggers.log_epoch(number, values(number) | {"val_loss": 9.0})  # workers restarted
            state = loggers.state
    shown = points(tmp_path / "tensorboard")["loss/val"]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in shown][2:] == [9.0] * 4
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


def test_a_new_training_replaces_the_events_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "notes.txt").write_text("mine")
    for epochs in (3, 1):
        with open_loggers(TrackConfig(), str(tmp_path)) as loggers:
            loggers.start(SETTINGS)
            for number in range(1, epochs + 1):
                loggers.log_epoch(number, values(number))
    assert [step for step, _ in points(tmp_path / "tensorboard")["loss/val"]] == [1]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_event_files_reach_a_remote_folder_after_every_epoch(tmp_path: Path) -> None:
    output = f"memory://logged/{tmp_path.name}"
    with open_loggers(TrackConfig(), output) as loggers:
        loggers.start(SETTINGS)
        for number in (1, 2):
            loggers.log_epoch(number, values(number))
            (name,) = filesystem.list_names(f"{output}/tensorboard")
            data = filesystem.read(f"{output}/tensorboard/{name}")
            filesystem.write(str(tmp_path / name), data)
            assert [step for step, _ in points(tmp_path)["lr"]] == list(range(1, number + 1))
        state = loggers.state
    with open_loggers(TrackConfig(), output, state) as loggers:
        loggers.start(SETTINGS, first=3)
        loggers.log_epoch(3, values(3))
    for name in filesystem.list_names(f"{output}/tensorboard"):
        filesystem.write(str(tmp_path / name), filesystem.read(f"{output}/tensorboard/{name}"))
    assert [step for step, _ in points(tmp_path)["lr"]] == [1, 2, 3]


def test_a_failed_upload_is_repeated_without_duplicate_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base, "RETRY_PAUSE_S", 0.0)
    output = f"memory://logged/{tmp_path.name}"
    write, fails = filesystem.write, [False]

    def flaky(url: str, data: bytes) -> None:
        if fails[0]:
            raise ConnectionError("the store is away")
        write(url, data)

    monkeypatch.setattr(filesystem, "write", flaky)
    with open_loggers(TrackConfig(), output) as loggers:
        loggers.start(SETTINGS)
        for number in (1, 2, 3, 4):
            fails[0] = number in (2, 3)
            loggers.log_epoch(number, values(number))
        loggers.finish({})
    assert capsys.readouterr().out.count("the store is away") == 1
    (name,) = filesystem.list_names(f"{output}/tensorboard")
    write(str(tmp_path / name), filesystem.read(f"{output}/tensorboard/{name}"))
    assert [step for step, _ in points(tmp_path)["lr"]] == [1, 2, 3, 4]
