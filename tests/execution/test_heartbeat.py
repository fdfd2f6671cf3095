"""Attempt records in a real Ray's key-value store, and the watchdog over real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray

from imgcls.errors import RunFailed
from imgcls.execution import heartbeat
from imgcls.execution.heartbeat import (
    CRASHES_TO_CONFIRM,
    MAX_UNEXPLAINED_CRASHES,
    SYSTEMIC_CRASH_ROWS,
    Attempt,
    Watchdog,
)
from tests.processes import wait_for


@pytest.fixture(scope="module")
def session(joined: None) -> str:
    return "a-session"


@pytest.fixture(autouse=True)
def clear_records(session: str) -> Iterator[None]:
    yield
    heartbeat.clear_session(session)


def start_attempt(session: str, retries: int = 1) -> Attempt:
    """A worker starts the chunk; without `complete` it has crashed when the next one starts."""
    return Attempt(session, "label-3", "chunk 3 (rows 768 to 1,023)", retries)


def test_a_completed_attempt_leaves_no_record(session: str) -> None:
    attempt = start_attempt(session)
    assert list(heartbeat.read_attempts(session)) == ["a-session/label-3"]
    attempt.complete()
    assert heartbeat.read_attempts(session) == {}
    assert start_attempt(session).crashes == 0


def test_a_chunk_is_processed_whole_until_too_many_workers_have_crashed(session: str) -> None:
    for crashes in (0, 1):
        attempt = start_attempt(session, retries=1)
        assert (attempt.crashes, list(attempt.iter_suspect_rows(4))) == (crashes, [])
    assert list(start_attempt(session, retries=1).iter_suspect_rows(4)) == [0, 1, 2, 3]


def test_a_row_that_crashes_two_workers_alone_is_crashed_and_the_others_are_not_retried(
    session: str,
) -> None:
    start_attempt(session, retries=0)
    rows = start_attempt(session, retries=0).iter_suspect_rows(6)
    assert [next(rows) for _ in range(3)] == [0, 1, 2]  # and crashes at row 2
    third = start_attempt(session, retries=0)
    assert list(third.crashed_rows) == []
    assert next(third.iter_suspect_rows(6)) == 2  # and crashes again
    fourth = start_attempt(session, retries=0)
    assert list(fourth.crashed_rows) == [2]
    assert list(fourth.iter_suspect_rows(6)) == [3, 4, 5]
    fourth.complete()


def test_a_row_that_succeeds_at_the_second_try_is_not_crashed(session: str) -> None:
    start_attempt(session, retries=0)
    for row in start_attempt(session, retries=0).iter_suspect_rows(4):
        if row == 2:
            break
    again = start_attempt(session, retries=0)
    assert list(again.iter_suspect_rows(4)) == [2, 3]
    assert again.crashed_rows == {}


def test_a_chunk_may_have_several_crashed_rows(session: str) -> None:
    start_attempt(session, retries=0)
    for bad in (1, 1, 4, 4):
        for row in start_attempt(session, retries=0).iter_suspect_rows(6):
            if row == bad:
                break
    last = start_attempt(session, retries=0)
    assert list(last.iter_suspect_rows(6)) == [5]
    assert list(last.crashed_rows) == [1, 4]


def test_when_the_first_rows_all_crash_the_images_are_not_the_cause(session: str) -> None:
    start_attempt(session, retries=0)
    for row in range(SYSTEMIC_CRASH_ROWS):
        for _ in range(CRASHES_TO_CONFIRM):
            assert next(start_attempt(session, retries=0).iter_suspect_rows(100)) == row
    with pytest.raises(
        RunFailed, match=r"chunk 3 .* whichever it was, so the images are not the cause"
    ):
        next(start_attempt(session, retries=0).iter_suspect_rows(100))


def test_when_only_the_whole_chunk_crashes_the_images_are_not_the_cause_either(
    session: str,
) -> None:
    for _ in range(MAX_UNEXPLAINED_CRASHES + 1):
        list(start_attempt(session, retries=0).iter_suspect_rows(3))
    with pytest.raises(RunFailed, match=r"although each of its images could be processed alone"):
        next(start_attempt(session, retries=0).iter_suspect_rows(3))


def test_a_heartbeat_is_written_at_most_once_per_interval(
    session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = start_attempt(session)
    (before,) = heartbeat.read_attempts(session).values()
    attempt.heartbeat()
    (soon,) = heartbeat.read_attempts(session).values()
    assert soon == before  # not with every row
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.0)
    attempt.heartbeat()
    (after,) = heartbeat.read_attempts(session).values()
    assert after.heartbeats > before.heartbeats


# ------------------------------------------------------------------ the watchdog


def keep_working(session: str, *, hangs: bool) -> None:
    attempt = Attempt(session, f"label-{hangs:d}", f"chunk {hangs:d}")
    while True:
        time.sleep(0.1)
        if not hangs:
            attempt.heartbeat()


def test_a_worker_that_hangs_is_killed_and_one_that_makes_progress_is_not(session: str) -> None:
    task: Any = ray.remote(num_cpus=0.5, max_retries=0)(keep_working)
    hanging, working = (task.remote(session, hangs=hangs) for hangs in (True, False))
    wait_for(lambda: len(heartbeat.read_attempts(session)) == 2)
    watchdog = Watchdog(session, 3.0)
    messages: list[str] = []
    wait_for(lambda: bool(messages.extend(watchdog.check()) or messages), 60)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(hanging, timeout=60)
    assert len(messages) == 1
    assert "made no progress for " in messages[0]
    assert messages[0].startswith("chunk 1: worker ")
    # checks see the progress of the other worker, however long the wait above took
    wait_for(lambda: watchdog.check() == [] and watchdog.idle_seconds < 3)
    assert not ray.wait([working], timeout=3)[0]
    ray.cancel(working, force=True)
    watchdog.close()
    assert heartbeat.read_attempts(session) == {}


class Idle:
    """A worker without a chunk."""

    def __init__(self, session: str) -> None:
        heartbeat.register_worker(session)

    def pid(self) -> int:
        return os.getpid()


def test_a_worker_that_hangs_without_a_chunk_is_killed_at_the_end_of_the_pass(session: str) -> None:
    kind: Any = ray.remote(num_cpus=0.5)(Idle)
    actor = kind.remote(session)
    worker = psutil.Process(ray.get(actor.pid.remote(), timeout=60))
    worker.send_signal(signal.SIGSTOP)
    watchdog = Watchdog(session, 3.0)
    watchdog.kill_workers()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running()
    watchdog.close()
    assert heartbeat.list_workers(session) == []
