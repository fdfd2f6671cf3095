"""Limits that all workers of a pipeline keep together, and the blocks that they take."""

from __future__ import annotations

import heapq
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data

from imgcls.cluster.session import Node
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.execution.config import ScaleConfig
from imgcls.execution.messages import ChunkTask
from imgcls.execution.pipeline import Pipeline, apply_host_limits, build_blocks
from imgcls.execution.placement import GpuPlacement, plan_placement
from imgcls.inference.workers import LABELING
from tests.execution.runs import plan_at, spec_of


@pytest.mark.parametrize(
    ("on_web", "workers", "limit", "expected"),
    [
        (True, 4, 64, (4, 16, 16)),
        (True, 16, 64, (16, 4, 8)),
        (True, 100, 64, (64, 1, 2)),
        (False, 100, 64, (100, 1, 16)),
    ],
)
def test_workers_together_keep_the_limit_per_host_and_queue_for_it_briefly(
    on_web: bool, workers: int, limit: int, expected: tuple[int, int, int],
    colors: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    manifest = open_manifest(ManifestConfig(path=str(colors(4))))
    plan = plan_at(tmp_path / "out", manifest)
    spec = spec_of(
        tmp_path / "out", plan, manifest, "", is_on_web=on_web, io_concurrency=16,
        storage=StorageConfig(max_requests_per_host=limit),
    )  # fmt: skip
    placement = plan_placement([Node(cpus=workers, gpus=0)], ScaleConfig())
    shared, planned = apply_host_limits(spec, placement, 1000)
    limits = (planned.workers, shared.storage.max_requests_per_host, shared.io_concurrency)
    assert limits == expected


def test_blocks_are_sized_by_the_tasks_that_decode_not_by_the_gpu_workers(
    colors: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest block must not keep one of 17 tasks at work when the others are done."""
    blocks: list[pa.Table] = []
    monkeypatch.setattr(ray.data, "from_blocks", blocks.extend)
    monkeypatch.setattr(GpuPlacement, "add_stages", lambda *given: None)
    manifest = open_manifest(ManifestConfig(path=str(colors(4))))
    plan = plan_at(tmp_path / "out", manifest)
    spec: Any = spec_of(tmp_path / "out", plan, manifest, "")
    placement = plan_placement([Node(cpus=16, gpus=1)], ScaleConfig())
    assert (placement.workers, placement.prepare_tasks) == (1, 17)
    Pipeline(LABELING, spec, placement, [ChunkTask(chunk) for chunk in range(391)])
    sizes = [block.num_rows for block in blocks]
    assert sum(sizes) == 391
    busy = [0] * placement.prepare_tasks
    for size in sizes:
        heapq.heapreplace(busy, busy[0] + size)
    assert max(busy) == 23  # 391 chunks / 17 tasks


@pytest.mark.parametrize(
    ("chunk_rows", "largest"), [(32, 256), (256, 256), (1024, 256), (4096, 64), (1_000_000, 1)]
)
def test_a_block_has_at_most_256_chunks_and_about_a_quarter_of_a_part(
    chunk_rows: int, largest: int
) -> None:
    blocks = build_blocks([ChunkTask(chunk) for chunk in range(2000)], 1, chunk_rows)
    assert max(block.num_rows for block in blocks) == min(largest, 250)
    chunks = [pickle.loads(task).chunk for block in blocks for task in block["task"].to_pylist()]
    assert chunks == list(range(2000))
