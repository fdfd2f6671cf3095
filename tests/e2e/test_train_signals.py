"""`imgcls train` saves its state when it is stopped by a signal, and resumes from that step."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls.training.checkpoints import Checkpoints, TrainProgress
from tests.conftest import save, write_manifest
from tests.processes import RayCluster, started

ROWS, BATCH = 200, 2


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for number in range(ROWS):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        save(Image.fromarray(pixels), folder / f"{number}.png")
    rows = [(f"{number}.png", "ab"[number % 2]) for number in range(ROWS)]
    return write_manifest(folder / "m.csv", rows, ("path", "label"))


def interrupt(
    manifest: Path, output: Path, cluster: RayCluster, number: signal.Signals, *, group: bool
) -> tuple[TrainProgress, str]:
    """Stop a training within an epoch; returns its newest saved progress and its output.

    group: signal all processes of the command, as Ctrl-C in a terminal does
    """
    words = [
        *("train", "--data.train", manifest, "--model.name", "small_cnn", "--epochs", 1000),
        *("--model.options", "{width: 4}", "--batch-size", BATCH, "--precision", "fp32"),
        *("--scale.num-workers", 1, "--data.cache", "false", "--output", output),
    ]
    env = cluster.environment() | {"PYTHONUNBUFFERED": "1"}
    with started(*words, env=env, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = []
        # the first epoch that begins in this process is under way once this line is there
        while not lines or not lines[-1].startswith("epoch "):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        (os.killpg if group else os.kill)(process.pid, number)
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert f"stopped by {number.name}; state saved, rerun the same command to resume" in errors
    assert not (output / "bundle.json").exists()
    assert not (output / "_lease").exists()
    newest, *_ = Checkpoints(str(output)).list_states()
    return newest.progress, "".join(lines) + out


def test_a_training_saves_at_a_signal_and_resumes_from_that_step(
    manifest: Path, cluster: RayCluster, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    first, output_text = interrupt(manifest, output, cluster, signal.SIGINT, group=True)
    assert "resuming" not in output_text
    assert first.epoch == len(first.history) + 1
    assert first.step > 0, "within an epoch, not at the end of one"
    second, output_text = interrupt(manifest, output, cluster, signal.SIGTERM, group=False)
    found = re.search(r"^resuming: epoch (\d+), step (\d+) of \d+$", output_text, re.MULTILINE)
    assert found is not None, output_text
    assert (int(found[1]), int(found[2])) == (first.epoch, first.step)
    assert second.history[: len(first.history)] == first.history
    assert second.epoch > first.epoch
    assert second.step > 0
