"""Publishers that are killed at any moment, and started again: every row is in the table once."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.evaluation.runs import commit, drawn
from tests.publishing.tables import (
    commit_again,
    count_with_duckdb,
    count_with_polars,
    read,
    set_run_id,
)


class Publishers:
    """Processes that publish one run each."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def publish(self, run: Path, target: str, kill_after: float | None = None) -> int:
        """Publish a run, or kill the process; returns its exit code, and -9 if it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        seconds = "never" if kill_after is None else kill_after
        self.process.stdin.write(f"{run} {target} {seconds}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture
def publishers(catalog: str) -> Iterator[Publishers]:
    """Processes with the test's catalog in their environment."""
    command = [sys.executable, "-m", "tests.publishing.publish_process"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Publishers(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("moments", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_publisher_that_is_killed_leaves_each_row_once(
    moments: int, publishers: Publishers, tmp_path: Path
) -> None:
    targets = {"delta": f"delta:{tmp_path}/table", "iceberg": "iceberg:local.ml.labels"}
    for name, target in targets.items():
        killed = kill_and_repeat(publishers, target, tmp_path / name, moments)
        assert killed or moments < 10  # of two, both may have ended before


def kill_and_repeat(publishers: Publishers, target: str, folder: Path, moments: int) -> int:
    """Kill publishers at random moments of their work, and publish each run after that.

    Returns how many were killed, rather than ended before.
    """
    rng = random.Random(target.partition(":")[0])
    for name in ("first", "second"):  # the first one waits for the imports
        before = time.monotonic()
        run = set_run_id(commit(folder / name, drawn(20), parts=2), name)
        assert publishers.publish(run, target) == 0
        duration = time.monotonic() - before
    killed = 0
    for number in range(moments):
        run = commit(folder / f"{number}", drawn(20, seed=number), parts=2)
        set_run_id(run, f"run{number}")
        if number % 2:  # killed while it replaces the rows of an earlier commit
            assert publishers.publish(run, target) == 0
            commit_again(run, "empty")
        killed += publishers.publish(run, target, rng.uniform(0, duration)) == -signal.SIGKILL
        found = Counter(read(target)["run_id"].to_pylist())
        assert found[f"run{number}"] in ({20} if number % 2 else {0, 20})
        assert publishers.publish(run, target) == 0
    rows = 20 * (moments + 2)
    table = read(target)
    assert set(Counter(table["run_id"].to_pylist()).values()) == {20}
    assert table["status"].to_pylist().count("empty") == 20 * (moments // 2)
    assert count_with_duckdb(target) == count_with_polars(target) == (rows, 20)
    return killed
