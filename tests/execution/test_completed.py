"""Completed chunks and parts are those whose files exist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imgcls.execution.completed import CompletedChunks, read_committed, write_chunk
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.runs.schema import build_prediction_schema
from tests.execution.runs import DrawnRun
from tests.faults import Proxy
from tests.s3 import forget_connections, url


@pytest.fixture
def run(tmp_path: Path) -> DrawnRun:
    """100 rows: chunks of 8, parts of 24."""
    return DrawnRun.planned(tmp_path, 100, chunk_rows=8, part_rows=24)


def test_written_chunks_are_followed_into_parts(run: DrawnRun) -> None:
    completed = CompletedChunks.load(run.output, run.plan)
    assert [task.chunk for task in completed.list_remaining()] == list(range(13))
    assert (completed.rows_done, completed.list_complete_parts()) == (0, [])
    run.label([0, 2, 12])
    completed = CompletedChunks.load(run.output, run.plan)
    assert [task.chunk for task in completed.list_remaining()] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert (completed.rows_done, completed.list_complete_parts()) == (8 + 8 + 4, [4])
    assert completed.add(3) is None
    run.label([1])
    assert completed.add(1) == 0
    run.roll_up(0)
    completed.mark_rolled_up(0)
    assert not run.staged(0).exists()
    assert completed.rows_done == 24 + 4 + 8
    again = CompletedChunks.load(run.output, run.plan)
    assert (again.parts, again.chunks) == ({0}, {4: {12}})
    assert again.rows_done == 24 + 4


def test_chunks_of_a_part_that_is_rolled_up_are_not_counted_twice(run: DrawnRun) -> None:
    run.label([0, 1, 2])
    run.roll_up(0)  # killed before the chunks were removed
    completed = CompletedChunks.load(run.output, run.plan)
    assert (completed.parts, completed.chunks, completed.rows_done) == ({0}, {}, 24)


def test_files_of_other_runs_are_ignored(run: DrawnRun) -> None:
    run.label([0])
    folder = run.staged(0)
    mine = next(folder.iterdir())
    other = mine.name.replace(run.plan.run_id, "0123456789ab")
    for name in (
        other.replace("00000000", "00000001"),  # another run's chunk
        mine.name.replace("chunk-00000000", "retry-00000001"),
        f".{mine.name}.0a1b2c3d4e5f.tmp".replace("00000000", "00000001"),
        "notes.txt",
    ):
        (folder / name).write_bytes(mine.read_bytes())
    predictions_ = Path(run.output) / "predictions"
    predictions_.mkdir()
    for name in ("part-00001.parquet.bak", ".part-00001.parquet.0a1b2c3d4e5f.tmp", "part-99999"):
        (predictions_ / name).write_bytes(b"x")
    completed = CompletedChunks.load(run.output, run.plan)
    assert (completed.parts, completed.chunks) == (set(), {0: {0}})


def test_a_chunk_is_looked_for_by_one_read_and_written_by_one_request(
    run: DrawnRun, s3: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing, which a HEAD of a missing object leads to, costs as much as a PUT."""
    seen: list[str] = []
    spec, task = replace(run.spec, output=url("out")), ChunkTask(3)
    with Proxy(endpoint, respond=seen.append).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        forget_connections()
        assert read_committed(spec, task) is None
        write_chunk(spec, task, build_prediction_schema(labeled=True).empty_table(), StageTimings())
        found = read_committed(spec, task)
        assert found is not None
        assert (found.num_rows, found.column_names) == (0, ["status"])
    requests = [head.partition("?")[0].split(" HTTP")[0] for head in seen]
    key = f"/out/_staging/part-00001/chunk-00000003.{spec.plan.run_id}.parquet"
    methods = [line.partition(" ")[0] for line in requests]
    assert methods == ["GET", "PUT", "GET"]
    assert all(line.endswith(key) for line in requests)
