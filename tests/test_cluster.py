"""What a job asks of the Ray session beneath it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

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
cluster.leave()
assert not ray.is_initialized()
_, left = psutil.wait_procs(started, timeout=10)
assert not left
cluster.leave()
"""


JOINED = """
import ray
from imgcls import cluster
ray.init("local")
cluster.connect()
cluster.leave()
assert ray.is_initialized()
"""


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
