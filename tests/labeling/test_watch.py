"""The driver's eye on workers, over real processes of a real Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from imgcls.labeling import attempts
from imgcls.labeling.attempts import Attempt
from imgcls.labeling.watch import Watch
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
            attempt.beat()


def test_a_worker_that_hangs_is_ended_and_one_that_goes_on_is_not(session: str) -> None:
    task: Any = ray.remote(num_cpus=0.5, max_retries=0)(at_work)
    hanging, working = (task.remote(session, hangs=hangs) for hangs in (True, False))
    wait_for(lambda: len(attempts.notes(session)) == 2)
    watch = Watch(session, 3.0)
    told: list[str] = []
    wait_for(lambda: bool(told.extend(watch.look()) or told), 60)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(hanging, timeout=60)
    assert len(told) == 1
    assert told[0].startswith("chunk 1: no image done for ")
    assert watch.idle_seconds < 3
    assert not ray.wait([working], timeout=3)[0]
    ray.cancel(working, force=True)
    watch.close()
    assert attempts.notes(session) == {}
