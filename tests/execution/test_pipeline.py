"""Limits that all workers of a pipeline keep together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from imgcls.cluster.session import Node
from imgcls.data.manifest import ManifestConfig, open_manifest
from imgcls.data.storage_settings import StorageConfig
from imgcls.execution.pipeline import apply_host_limits
from imgcls.execution.placement import ScaleConfig, plan_placement
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
