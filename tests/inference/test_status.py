"""How far a run is, told from its output alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from imgcls.errors import OutputError
from imgcls.execution import completed
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.inference import stages
from imgcls.inference.status import StatusConfig, read_status, status
from imgcls.runs import layout
from imgcls.runs.lease import Lease
from tests.execution.runs import CLASSES, manifest_of, plan_at, predictions, spec_of


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """100 rows in 10 chunks and 2 parts: the first part is done, of the other one chunk."""
    manifest = manifest_of(tmp_path, pa.table({"path": [f"{i}.jpg" for i in range(100)]}))
    output = tmp_path / "out"
    plan = plan_at(output, manifest, chunk_rows=10, part_rows=50)
    spec = spec_of(output, plan, manifest, "")
    for number in range(6):
        table = predictions(plan.rows_of(number), number)
        stages.write_chunk(
            spec,
            ChunkTask(number),
            table.drop_columns(["label_score", "label_rank"]),
            StageTimings(),
        )
    completed.roll_up(str(output), plan, 0, None, CLASSES)
    book = completed.CompletedChunks.load(str(output), plan)
    book.mark_rolled_up(0)
    return output


def test_rows_and_statuses_are_those_of_the_durable_files(begun: Path) -> None:
    told = read_status(str(begun))
    assert (told["rows_done"], told["rows"]) == (60, 100)
    assert (told["files_done"], told["files"]) == (1, 2)
    assert sum(told["status"].values()) == 60
    assert told["status"]["ok"] < 60
    assert told["state"] == "waiting"
    assert told["driver"] is None


def test_a_driver_is_seen_by_its_lease_and_the_rate_is_what_it_said(begun: Path) -> None:
    layout.write_progress(str(begun), {"images_per_second": 8.0})
    lease = Lease.acquire(str(begun), 5)
    try:
        told = read_status(str(begun))
    finally:
        lease.release()
    assert told["state"] == "running"
    assert (told["images_per_second"], told["seconds_left"]) == (8.0, 5.0)
    assert read_status(str(begun))["state"] == "waiting"


def test_it_is_told_in_words_and_in_json(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status(StatusConfig(output=str(begun)))
    words = capsys.readouterr().out
    assert "60 done (60.0%), 1 of 2 final files" in words
    assert "nobody is at work; the same command goes on from here" in words
    status(StatusConfig(output=str(begun), json_lines=True))
    assert json.loads(capsys.readouterr().out)["rows_done"] == 60


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no _run\.json, so no labelling run began here"):
        read_status(str(tmp_path))


def test_a_run_that_waits_for_machines_is_seen_before_there_is_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lease = Lease.acquire(str(tmp_path), 5)
    try:
        status(StatusConfig(output=str(tmp_path)))
        told = read_status(str(tmp_path))
    finally:
        lease.release()
    assert told["state"] == "starting"
    assert f"process {os.getpid()}: it waits for machines" in capsys.readouterr().out
    with pytest.raises(OutputError, match="no labelling run began here"):
        read_status(str(tmp_path))
