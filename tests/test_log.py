"""What a job tells, for people and for a log system."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from imgcls import log


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    log.use("text")


def test_people_get_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log.use("text", run_id="r")
    log.tell("plan", "3 rows", rows=3)
    log.tell("labelling", "0/3 rows")
    log.tell("note", "look out")
    assert capsys.readouterr().out.splitlines() == [
        "plan    3 rows",
        "labelling  0/3 rows",
        "note: look out",
    ]


def test_a_log_system_gets_an_object_a_line_with_what_belongs_to_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.use("json", run_id="r")
    log.tell("plan", "3 rows\nand more", rows=3)
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told.pop("time").endswith("+00:00")
    assert told == {"event": "plan", "message": "3 rows\nand more", "run_id": "r", "rows": 3}
