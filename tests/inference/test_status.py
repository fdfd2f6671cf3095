"""The status of a run, read from its output alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from imgcls.errors import OutputError
from imgcls.execution.completed import CompletedChunks, write_chunk
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.inference import rollup
from imgcls.inference.history import CompactConfig, compact
from imgcls.inference.status import StatusConfig, read_status, status
from imgcls.runs import layout
from imgcls.runs.lease import Lease
from imgcls.runs.table_counts import TableCounter
from tests.evaluation.runs import commit, drawn
from tests.execution.runs import CLASSES, manifest_of, plan_at, predictions, spec_of


@pytest.fixture
def started_run(tmp_path: Path) -> Path:
    """100 rows in 10 chunks and 2 parts: the first part is done, of the other one chunk."""
    manifest = manifest_of(tmp_path, pa.table({"path": [f"{i}.jpg" for i in range(100)]}))
    output = tmp_path / "out"
    plan = plan_at(output, manifest, chunk_rows=10, part_rows=50)
    spec = spec_of(output, plan, manifest, "")
    for number in range(6):
        table = predictions(plan.rows_of(number), number)
        write_chunk(
            spec,
            ChunkTask(number),
            table.drop_columns(["label_score", "label_rank"]),
            StageTimings(),
        )
    rollup.roll_up(str(output), plan, 0, TableCounter(tuple(CLASSES)))
    CompletedChunks.load(str(output), plan).mark_rolled_up(0)
    return output


def test_rows_and_statuses_are_those_of_the_written_files(started_run: Path) -> None:
    found = read_status(str(started_run))
    assert (found["rows_done"], found["rows"]) == (60, 100)
    assert (found["files_done"], found["files"]) == (1, 2)
    assert sum(found["status"].values()) == 60
    assert found["status"]["ok"] < 60
    assert found["state"] == "waiting"
    assert found["driver"] is None


def test_a_driver_is_found_by_its_lease_and_the_rate_by_its_progress_file(
    started_run: Path,
) -> None:
    layout.write_progress(str(started_run), {"images_per_second": 8.0})
    lease = Lease.acquire(str(started_run), 5)
    try:
        found = read_status(str(started_run))
    finally:
        lease.release()
    assert found["state"] == "running"
    assert (found["images_per_second"], found["seconds_left"]) == (8.0, 5.0)
    assert read_status(str(started_run))["state"] == "waiting"


def test_it_is_printed_as_text_and_as_json(
    started_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status(StatusConfig(output=str(started_run)))
    words = capsys.readouterr().out
    assert "60 done (60.0%), 1 of 2 final files" in words
    assert "not running; rerun the same command to resume" in words
    status(StatusConfig(output=str(started_run), json_lines=True))
    assert json.loads(capsys.readouterr().out)["rows_done"] == 60


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no _run\.json, so no run was started here"):
        read_status(str(tmp_path))


def test_a_run_that_waits_for_nodes_is_found_before_it_has_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lease = Lease.acquire(str(tmp_path), 5)
    try:
        status(StatusConfig(output=str(tmp_path)))
        found = read_status(str(tmp_path))
    finally:
        lease.release()
    assert found["state"] == "starting"
    assert f"process {os.getpid()}: waiting for nodes" in capsys.readouterr().out
    with pytest.raises(OutputError, match="no run was started here"):
        read_status(str(tmp_path))


def test_a_compacted_history_has_the_rows_of_all_its_nights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, rows in enumerate((50, 10), 1):
        commit(tmp_path / "labels" / f"date=2026-11-0{number}", drawn(rows))
    source = str(tmp_path / "labels")
    output = compact(CompactConfig(source=source, output=str(tmp_path / "latest")))
    found = status(StatusConfig(output=output))
    assert (found["rows"], found["rows_done"]) == (60, 60)
    printed = capsys.readouterr().out
    assert "60 rows" in printed
    assert "60 done (100.0%)" in printed
