"""The driver's eye on workers, over real processes of a real Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray

from imgcls.execution import heartbeat
from imgcls.execution.heartbeat import Attempt
from imgcls.execution.watchdog import Watchdog
from tests.processes import wait_for


@pytest.fixture(scope="module")
def session() -> Iterator[str]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield "a-watched-session"
    ray.shutdown()


def at_work(session: str, *, hangs: bool) -> None:
    attempt = Attempt(session, f"label-{hangs:d}", f"chunk {hangs:d}")
    while True:
        time.sleep(0.1)
        if not hangs:
            attempt.heartbeat()


def test_a_worker_that_hangs_is_ended_and_one_that_goes_on_is_not(session: str) -> None:
    task: Any = ray.remote(num_cpus=0.5, max_retries=0)(at_work)
    hanging, working = (task.remote(session, hangs=hangs) for hangs in (True, False))
    wait_for(lambda: len(heartbeat.read_attempts(session)) == 2)
    watch = Watchdog(session, 3.0)
    told: list[str] = []
    wait_for(lambda: bool(told.extend(watch.check()) or told), 60)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(hanging, timeout=60)
    assert len(told) == 1
    assert told[0].startswith("chunk 1: no image done for ")
    assert watch.idle_seconds < 3
    assert not ray.wait([working], timeout=3)[0]
    ray.cancel(working, force=True)
    watch.close()
    assert heartbeat.read_attempts(session) == {}


class Idle:
    """A worker that is at no chunk."""

    def __init__(self, session: str) -> None:
        heartbeat.register_worker(session)

    def pid(self) -> int:
        return os.getpid()


def test_a_worker_that_hangs_at_no_chunk_is_ended_with_the_pass(session: str) -> None:
    kind: Any = ray.remote(num_cpus=0.5)(Idle)
    actor = kind.remote(session)
    worker = psutil.Process(ray.get(actor.pid.remote(), timeout=60))
    worker.send_signal(signal.SIGSTOP)
    watch = Watchdog(session, 3.0)
    watch.kill_workers()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running()
    watch.close()
    assert heartbeat.list_workers(session) == []
