"""What a pipeline of Ray Data's does when no worker of it ever starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data

from imgcls import cluster
from imgcls.cluster import Interruption, Node
from imgcls.labeling.layout import ScaleConfig, plan_layout
from imgcls.labeling.pipeline import Pipeline
from imgcls.labeling.work import Work
from tests.labeling.runs import manifest_of, plan_at, spec_of


@pytest.fixture
def without_room() -> Iterator[None]:
    ray.init(address="local", num_cpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_without_a_worker_it_waits_without_end_and_ends_when_it_is_stopped(
    without_room: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = "execution_no_progress_timeout_s"  # Ray Data's own, of half an hour
    monkeypatch.setattr(ray.data.DataContext.get_current(), guard, 1)
    manifest = manifest_of(tmp_path, pa.table({"path": ["a.jpg"]}))
    output = tmp_path / "out"
    spec = spec_of(output, plan_at(output, manifest), manifest, "")
    pipeline = Pipeline(spec, plan_layout([Node(1, 0)], ScaleConfig()), [Work(0)])
    receipts = cluster.in_background(pipeline.receipts(), Interruption())
    began = time.monotonic()
    while time.monotonic() - began < 5:
        assert next(receipts) is None
    for _ in receipts:  # the test's own time limit ends it otherwise
        pipeline.stop()
