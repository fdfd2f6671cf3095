"""Weights & Biases runs: settings, metrics, files and resume, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imgcls.data.storage import filesystem
from imgcls.errors import Interrupted, RequestError
from imgcls.training.config import TrackConfig
from imgcls.training.loggers.base import check_loggers, open_loggers
from tests.training.loggers.runs import SETTINGS, log_interrupted_run, values


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
    with open_loggers(config, str(output)) as loggers:
        loggers.start(SETTINGS, first=0)
        (folder,) = (tmp_path / "wandb").glob("offline-run-*")
        assert f"wandb: offline; upload it with `wandb sync {folder}`" in capsys.readouterr().out
        for number in (0, 1, 2):
            loggers.log_epoch(number, values(number))
        state = loggers.state
        loggers.finish({"best_epoch": 2}, ["plots/curves.png"])
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


def test_wandb_continues_the_same_run_and_shows_how_it_ended(wandb: Any, tmp_path: Path) -> None:
    config = TrackConfig(wandb="pets")
    state: dict[str, Any] = {}
    for numbers in ([1, 2], [3, 4]):
        error = Interrupted("SIGTERM")
        state = log_interrupted_run(config, tmp_path, numbers, error=error, state=state)
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
    with pytest.raises(RequestError, match=r"has no key\. Run `wandb login`, set WANDB_API_KEY"):
        check_loggers(TrackConfig(wandb="pets"), "/out")


@pytest.mark.slow  # how long wandb takes to give up is its own affair: seconds, or minutes
def test_a_wandb_server_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    """In a process of its own: within ours, wandb's end would be waited for, for minutes."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("needs pip install 'imgcls[wandb]'")
    script = (
        "from imgcls.training.loggers.base import TrackConfig, check_loggers\n"
        "check_loggers(TrackConfig(wandb='pets'), '/out')\n"
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
