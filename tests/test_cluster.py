"""What a job asks of the Ray session beneath it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray
import ray.data

from imgcls.cluster import keep_memory, unwrapped
from imgcls.errors import StorageCredentials


def faults_of_a_batch() -> int:
    """Page faults while a thread uses 256 MB again and again, as a network does.

    The fewest of four times: the kernel may take pages back in between.
    """
    import resource

    import numpy as np

    counted: list[int] = []

    def use() -> None:
        np.ones(1 << 28, np.uint8)
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            np.ones(1 << 28, np.uint8)
            counted.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return min(counted)


def refuse(batch: Any) -> Any:
    raise StorageCredentials("s3://b/x: access is refused") from KeyError("x")


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_an_error_of_ours_comes_through_what_ray_wraps_around_it(session: None) -> None:
    task: Any = ray.remote(max_retries=0)(refuse)
    with pytest.raises(StorageCredentials, match=r"^s3://b/x: access is refused$"), unwrapped():
        ray.get(task.remote(None))
    with pytest.raises(StorageCredentials, match=r"^s3://b/x: access is refused$"), unwrapped():
        ray.data.range(1).map_batches(refuse).materialize()


def test_a_worker_keeps_what_a_batch_frees_for_the_next(
    session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: Any = ray.remote(faults_of_a_batch)
    kept = ray.get(task.options(runtime_env=keep_memory()).remote())
    assert kept < 100 < ray.get(task.remote())
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert keep_memory()["env_vars"]["MALLOC_ARENA_MAX"] == "8"


PRIVATE = """
import os, psutil, ray
from imgcls import cluster
from tests.test_cluster import faults_of_a_batch
before = dict(os.environ)
cluster.connect()
assert dict(os.environ).items() >= before.items() and "MALLOC_ARENA_MAX" not in os.environ
assert cluster.keep_memory() == {}
assert ray.get(ray.remote(faults_of_a_batch).remote()) < 100
started = psutil.Process().children(recursive=True)
assert len(started) > 3
cluster.leave(0)
assert not ray.is_initialized()
_, left = psutil.wait_procs(started, timeout=10)
assert not left
cluster.leave(0)
"""


JOINED = """
import ray
from imgcls import cluster
ray.init("local")
cluster.connect()
cluster.leave(0)
assert ray.is_initialized()
"""


BROKEN_OFF = """
import time, psutil, ray
from imgcls import cluster
cluster.connect()
started = [p.pid for p in psutil.Process().children() if p.name() in ("raylet", "gcs_server")]
def results():
    yield "first"
    ray.get(ray.remote(lambda: time.sleep(600)).remote())
interruption = cluster.Interruption()
for _ in cluster.in_background(results(), interruption):
    break
print(*started, flush=True)
cluster.leave(7)
print("not reached")
"""


def test_a_run_that_is_broken_off_ends_with_a_thread_of_its_own_still_in_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_OFF],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RAY_ADDRESS": "local"},
    )
    assert done.returncode == 7, done.stderr
    (servers,) = done.stdout.splitlines()
    left = [psutil.Process(int(pid)) for pid in servers.split() if psutil.pid_exists(int(pid))]
    assert psutil.wait_procs(left, timeout=30)[1] == []


@pytest.mark.parametrize("script", [PRIVATE, JOINED])
def test_a_private_session_is_our_own_to_set_up_and_to_end(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
