"""A hyperparameter search over real trainings on handwritten digits, uninterrupted and killed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from imgcls.cli import main
from imgcls.demo import write_digits
from imgcls.models.classifier import Classifier
from tests.processes import RayCluster, imgcls, started, wait_for

pytestmark = pytest.mark.timeout(1200)

TRIALS = 6
SPACE = {"optim.lr": {"loguniform": [1e-6, 1e-2]}, "batch_size": {"choice": [64, 128]}}


def job(tmp_path: Path, **tune: object) -> list[object]:
    train, test = write_digits(tmp_path)
    file = tmp_path / "tune.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "data": {"train": str(train), "val": str(test)},
                "model": {"name": "small_cnn", "options": {"width": 8}},
                "augment": {"preset": "none"},
                "epochs": 3,
                "output": str(tmp_path / "out"),
                "tune": {"space": SPACE, **tune},
            }
        )
    )
    return ["tune", "--config", file]


def results(tmp_path: Path) -> pd.DataFrame:
    return pd.read_parquet(tmp_path / "out" / "results.parquet")


def made(tmp_path: Path, trial: str) -> int:
    """When a trial's bundle was written."""
    return (tmp_path / "out" / "trials" / trial / "bundle.json").stat().st_mtime_ns


def assert_searched(tmp_path: Path, trials: int) -> pd.DataFrame:
    """Every trial has its row, the best is far ahead of the worst, and its bundle is kept."""
    table = results(tmp_path)
    assert len(table) == trials
    assert set(table["state"]) <= {"finished", "stopped"}
    assert table["val_loss"].is_monotonic_increasing
    finished = table[table["state"] == "finished"]
    assert finished["val_accuracy"].iloc[0] > table["val_accuracy"].min() + 0.2
    best = tmp_path / "out" / "best"
    spec = json.loads((best / "bundle.json").read_text())
    config = spec["provenance"]["config"]
    assert config["optim"]["lr"] == pytest.approx(finished["optim.lr"].iloc[0])
    assert config["batch_size"] == finished["batch_size"].iloc[0]
    assert Classifier.load(str(best)).classes == [str(digit) for digit in range(10)]
    assert (tmp_path / "out" / "plots" / "trials.png").stat().st_size > 10_000
    return table


@pytest.mark.slow
def test_a_search_finds_settings_far_better_than_the_worst(tmp_path: Path) -> None:
    workers, at_a_time = [], []
    with (
        RayCluster.start(cpus=2, fork=True) as cluster,
        started(*job(tmp_path, trials=TRIALS), env=cluster.environment()) as command,
    ):
        while command.poll() is None:
            workers.append(len(cluster.workers("ray::RayTrainWorker")))
            at_a_time.append(len(cluster.workers("ray::ResourceTrainable")))
            time.sleep(0.3)
        out, err = command.communicate()
        assert command.returncode == 0, err
    print(out)
    table = assert_searched(tmp_path, TRIALS)
    assert max(workers) == 2
    assert max(at_a_time) == 2
    # not all of their epochs: the worse trials were stopped
    assert table["epochs"].sum() < TRIALS * 3
    assert f"{TRIALS} trials of batch_size, optim.lr; 2 at a time" in out


@pytest.mark.slow
def test_a_killed_search_resumes_and_repeats_no_finished_trial(tmp_path: Path) -> None:
    settings = {"trials": 3, "max_concurrent": 1, "scheduler": "fifo", "search": "optuna"}
    words = [*job(tmp_path, **settings), "--epochs", 2]
    with RayCluster.start(cpus=2, fork=True) as cluster:
        with started(*words, env=cluster.environment()) as command:
            wait_for(lambda: len(list((tmp_path / "out").glob("trials/*/bundle.json"))) > 0, 240)
            command.send_signal(signal.SIGKILL)
            command.wait()
        first = {path.parent.name for path in (tmp_path / "out").glob("trials/*/bundle.json")}
        written = {name: made(tmp_path, name) for name in first}
        done = imgcls(*words, env=cluster.environment(), timeout=400)
        assert done.returncode == 0, done.stderr
        assert "search: resuming" in done.stdout
        assert "trial 3/3" in done.stdout
    table = results(tmp_path)
    assert len(table) == 3
    assert first <= set(table["trial"])
    assert (table["epochs"] == 2).all()
    for name, when in written.items():
        assert made(tmp_path, name) == when


def test_an_invalid_search_space_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {
        "optim.lr": {"loguniform": [0.0, 1.0]},
        "optim.learning_rate": {"uniform": [0.1, 0.2]},
        "epochs": {"choice": [1, 2], "grid": [1]},
    }
    words = [*map(str, job(tmp_path)), "--tune.space", json.dumps(space)]
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "greater than 0" in printed
    assert "set exactly one of" in printed
    good = {"optim.learning_rate": {"uniform": [0.1, 0.2]}, "output": {"choice": ["a"]}}
    assert main([*map(str, job(tmp_path, space=good))]) == 2
    printed = capsys.readouterr().err
    assert "optim.learning_rate: unknown key" in printed
    assert "tune.space.output" in printed
    assert not (tmp_path / "out").exists()
