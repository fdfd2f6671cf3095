"""Logging: silent in a program, lines or JSON objects in the command."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading

import pytest

from imgcls import log


def test_the_text_format_shows_the_event_and_the_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with log.command_handler("text"), log.context(run_id="r"):
        log.emit("plan", "3 rows", rows=3)
        log.emit("labeling", "0/3 rows")
        log.emit("note", "2 labels differ in case only")
        log.emit("result", "accuracy  99.4 %")
    assert capsys.readouterr().out.splitlines() == [
        "plan    3 rows",
        "labeling  0/3 rows",
        "note: 2 labels differ in case only",
        "accuracy  99.4 %",
    ]


def test_the_json_format_has_an_object_per_line_with_fields_and_context(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with log.command_handler("json"), log.context(run_id="r"):
        log.emit("plan", "3 rows\nand more", rows=3)
        logging.getLogger("imgcls.data").warning("store %s is slow", "s3")
    out, err = capsys.readouterr()
    [plan] = map(json.loads, out.splitlines())
    assert plan.pop("time").endswith("+00:00")
    assert plan == {"event": "plan", "message": "3 rows\nand more", "run_id": "r", "rows": 3}
    [warning] = map(json.loads, err.splitlines())
    assert (warning["event"], warning["message"]) == ("warning", "store s3 is slow")


def test_a_job_inherits_nothing_from_the_one_before_or_beside_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with log.command_handler("json"), log.context(run_id="first"):
        pass
    with log.command_handler("text"):
        log.emit("plan", "second")
        assert not log.is_json()
    assert capsys.readouterr().out == "plan    second\n"
    assert log.find_handler() is None

    seen = {}

    def job(name: str, ready: threading.Barrier) -> None:
        with log.context(run_id=name):
            ready.wait(30)
            seen[name] = log._context.get()["run_id"]
            ready.wait(30)

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=job, args=(name, barrier)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"a": "a", "b": "b"}


def test_a_program_gets_log_records_of_the_calling_module_and_no_output(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="imgcls"):
        exec(
            "from imgcls import log; log.emit('plan', '3 rows')", {"__name__": "imgcls.execution.x"}
        )
    [record] = caplog.records
    assert (record.name, record.levelno, record.getMessage()) == (
        "imgcls.execution.x", logging.INFO, "3 rows",
    )  # fmt: skip
    assert capsys.readouterr() == ("", "")


def test_characters_that_the_terminal_lacks_are_escaped() -> None:
    code = (
        "from imgcls import log\nwith log.command_handler():\n    log.emit('result', 'caf\\u00e9')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout == b"caf\\xe9\n"
