"""Logging: silent in a program, lines or JSON objects in the command."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading

import pytest

from imgcls import log


@pytest.fixture(autouse=True)
def command_output() -> None:
    """Overrides the handler that other tests run with."""


def run_program(code: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env=environment
    )


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


def test_a_job_inherits_nothing_from_an_earlier_or_concurrent_job(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with log.command_handler("json"), log.context(run_id="first"):
        pass
    with log.command_handler("text"):
        log.emit("plan", "second")
        assert not log.is_json()
    assert capsys.readouterr().out == "plan    second\n"

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


PROGRAM = """
import logging, sys
from imgcls import log
exec("log.emit('plan', '3 rows')", {"__name__": "imgcls.execution.plan", "log": log})
logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
logging.getLogger("imgcls").setLevel(logging.INFO)
exec("log.emit('plan', '4 rows')", {"__name__": "imgcls.execution.plan", "log": log})
"""


def test_a_program_sees_nothing_until_it_configures_logging() -> None:
    done = run_program(PROGRAM)
    assert done.stdout == b"imgcls.execution.plan INFO 4 rows\n"
    assert done.stderr == b""


def test_characters_that_the_terminal_lacks_are_escaped() -> None:
    code = (
        "from imgcls import log\nwith log.command_handler():\n    log.emit('result', 'caf\\u00e9')"
    )
    done = run_program(code)
    assert done.stdout == b"caf\\xe9\n"
