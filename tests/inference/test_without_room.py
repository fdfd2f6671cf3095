"""What a run does while the machines that it needs are not there."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data
from ray.util import placement_group_table

from imgcls.cluster import autoscaler, interrupts, session
from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import Node
from imgcls.errors import ResourcesError
from imgcls.execution.messages import ChunkTask
from imgcls.execution.pipeline import Pipeline
from imgcls.execution.placement import (
    ScaleConfig,
    compute_first_bundles,
    plan_placement,
    select_nodes,
)
from imgcls.execution.runner import find_missing_nodes, wait_for_placement
from tests.execution.runs import manifest_of, plan_at, spec_of
from tests.processes import wait_for


@pytest.fixture(autouse=True)
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is one that machines may join, whatever tests before this one have started."""
    monkeypatch.setattr(session._Session, "private", False)


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
    layout = dataclasses.replace(plan_placement([Node(2, 0)], ScaleConfig()), worker_cpus=2)
    pipeline = Pipeline(spec, layout, [ChunkTask(0)])
    receipts = interrupts.iterate_in_thread(pipeline.run(), Interruption())
    began = time.monotonic()
    while time.monotonic() - began < 5:
        assert next(receipts) is None
    for _ in receipts:  # the test's own time limit ends it otherwise
        pipeline.stop()


def test_what_a_run_has_lost_is_waited_for_and_what_was_never_there_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scale = ScaleConfig(workers=2, resource_timeout_s=1)
    with pytest.raises(ResourcesError) as caught:
        wait_for_placement(scale, Interruption(), 0)
    assert str(caught.value).endswith("give at most 1")
    assert capsys.readouterr().out == ""
    steps = autoscaler.iter_until_fit(
        lambda nodes: plan_placement(nodes, scale),
        lambda most: compute_first_bundles(most, scale, 0),
        scale.resource_timeout_s,
        Interruption(),
        under_way=True,
    )
    with pytest.raises(ResourcesError, match=r"waited 1 s for nodes; .* scale\.resource_timeout_s"):
        list(steps)
    assert capsys.readouterr().out.startswith("waiting  for nodes: scale.workers 2")
    assert asked_for() == []


def asked_for() -> list[dict[str, float]]:
    """What the autoscaler would bring, were there one: reservations that wait."""
    waiting = [group for group in placement_group_table().values() if group["state"] == "PENDING"]
    return [bundle for group in waiting for bundle in group["bundles"].values()]


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a cluster that may have two machines with a GPU, and two without."""
    groups = {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 4}, "max_workers": 2},
        "gpu": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 2},
    }
    config = {"available_node_types": groups, "head_node_type": "head", "max_workers": 4}
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(json.dumps(config))
    monkeypatch.setattr(autoscaler, "LAUNCHER_CONFIG", str(file))


def test_the_first_machine_is_asked_for_until_it_is_there_or_nobody_waits_any_more(
    launched: None, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = ScaleConfig(layout="gpu", resource_timeout_s=1)
    steps = autoscaler.iter_until_fit(
        lambda nodes: plan_placement(nodes, scale),
        lambda most: compute_first_bundles(most, scale, 0),
        60,
        Interruption(),
    )
    next(steps)
    wait_for(lambda: asked_for() == [{"CPU": 0.5, "GPU": 1}])  # there is a core
    assert "waiting  for nodes: scale.layout gpu needs a GPU" in capsys.readouterr().out
    steps.close()
    wait_for(lambda: asked_for() == [])
    with pytest.raises(ResourcesError, match="waited 1 s for nodes"):
        wait_for_placement(scale, Interruption(), 0)
    wait_for(lambda: asked_for() == [])


def test_while_there_is_work_what_may_come_is_asked_for_and_what_has_come_is_let_go(
    launched: None,
) -> None:
    may_come = autoscaler.find_max_nodes()
    assert may_come is not None
    whole = {"CPU": 4, "GPU": 1}
    assert (
        find_missing_nodes(select_nodes(may_come, ScaleConfig(), 0, 200), session.list_nodes())
        == [whole] * 2
    )
    autoscaler.update_request([whole, whole])
    wait_for(lambda: asked_for() == [whole, whole])
    autoscaler.update_request([whole])
    wait_for(lambda: asked_for() == [whole])
    autoscaler.update_request([{"CPU": 1}, whole])  # the first of which is there
    wait_for(lambda: asked_for() == [whole])
    autoscaler.update_request([whole])
    wait_for(lambda: ray.available_resources().get("CPU") == 1)
    autoscaler.cancel_request()
    wait_for(lambda: asked_for() == [])
