"""What a run does while the machines that it needs are not there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data

from imgcls import cluster
from imgcls.cluster import Interruption, Node
from imgcls.errors import ResourcesError
from imgcls.labeling.layout import ScaleConfig, plan_layout
from imgcls.labeling.passes import _fitting, fitted
from imgcls.labeling.pipeline import Pipeline
from imgcls.labeling.work import Work
from tests.labeling.runs import manifest_of, plan_at, spec_of


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_without_a_worker_it_waits_without_end_and_ends_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = "execution_no_progress_timeout_s"  # Ray Data's own, of half an hour
    monkeypatch.setattr(ray.data.DataContext.get_current(), guard, 1)
    manifest = manifest_of(tmp_path, pa.table({"path": ["a.jpg"]}))
    output = tmp_path / "out"
    spec = spec_of(output, plan_at(output, manifest), manifest, "")
    layout = dataclasses.replace(plan_layout([Node(2, 0)], ScaleConfig()), worker_cpus=2)
    pipeline = Pipeline(spec, layout, [Work(0)])
    receipts = cluster.in_background(pipeline.receipts(), Interruption())
    began = time.monotonic()
    while time.monotonic() - began < 5:
        assert next(receipts) is None
    for _ in receipts:  # the test's own time limit ends it otherwise
        pipeline.stop()


def test_what_a_run_has_lost_is_waited_for_and_what_was_never_there_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scale = ScaleConfig(workers=2, wait_seconds=1)
    with pytest.raises(ResourcesError) as caught:
        fitted(scale, Interruption(), 0)
    assert str(caught.value).endswith("give at most 1")
    assert capsys.readouterr().out == ""
    with pytest.raises(ResourcesError, match=r"waited 1 s for machines, as scale\.wait_seconds"):
        list(_fitting(scale, Interruption(), 0, under_way=True))
    assert capsys.readouterr().out.startswith("waiting  for machines: scale.workers 2")
