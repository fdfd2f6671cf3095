"""What a job asks of the Ray session beneath it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import ray

from imgcls.cluster import keep_memory


def faults_of_a_batch() -> int:
    """Page faults while a thread uses 256 MB again and again, as a network does."""
    import resource

    import numpy as np

    counted: list[int] = []

    def use() -> None:
        np.ones(1 << 28, np.uint8)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(4):
            np.ones(1 << 28, np.uint8)
        counted.append((resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before) // 4)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return counted[0]


def test_a_worker_keeps_what_a_batch_frees_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        task: Any = ray.remote(faults_of_a_batch)
        kept = ray.get(task.options(runtime_env=keep_memory()).remote())
        assert kept < 100 < ray.get(task.remote())
    finally:
        ray.shutdown()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert keep_memory()["env_vars"]["MALLOC_ARENA_MAX"] == "8"
