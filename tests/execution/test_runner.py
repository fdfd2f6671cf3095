"""What a run does while the nodes that it needs are not there."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from ray.util import placement_group_table

from imgcls.cluster import autoscaler, interrupts, session
from imgcls.cluster.autoscaler import NodeRequest
from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import Node
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import Interrupted, ResourcesError, RunFailed
from imgcls.execution import runner
from imgcls.execution.completed import write_chunk
from imgcls.execution.config import ScaleConfig
from imgcls.execution.messages import ChunkResult, ChunkTask, RunSpec, StageTimings
from imgcls.execution.pipeline import Pipeline
from imgcls.execution.placement import (
    Placement,
    compute_first_bundles,
    plan_placement,
    select_nodes,
)
from imgcls.execution.replan import find_missing_nodes
from imgcls.execution.runner import (
    ChunkRunner,
    Driver,
    JobRun,
    load_completed,
    wait_for_placement,
)
from imgcls.execution.worker import ChunkWorker, Job
from imgcls.inference.workers import LABELING
from imgcls.runs.lease import Lease
from tests.execution.runs import manifest_of, plan_at, spec_of
from tests.processes import wait_for

pytestmark = pytest.mark.usefixtures("joined")


@pytest.fixture(autouse=True)
def growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is one that nodes may join, whatever earlier tests have started."""
    monkeypatch.setattr(session._Session, "private_address", None)


def test_a_pipeline_without_room_for_a_worker_waits_until_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeout = "execution_no_progress_timeout_s"  # Ray Data's own, of half an hour
    monkeypatch.setattr(ray.data.DataContext.get_current(), timeout, 1)
    manifest = manifest_of(tmp_path, pa.table({"path": ["a.jpg"]}))
    output = tmp_path / "out"
    spec = spec_of(output, plan_at(output, manifest), manifest, "")
    placement = dataclasses.replace(plan_placement([Node(3, 0)], ScaleConfig()), worker_cpus=3)
    pipeline = Pipeline(LABELING, spec, placement, [ChunkTask(0)])
    results = interrupts.iterate_in_thread(pipeline.run(), Interruption())
    start = time.monotonic()
    while time.monotonic() - start < 3:
        assert next(results) is None
    for _ in results:  # the test's own time limit ends it otherwise
        pipeline.stop()


def test_a_run_waits_for_nodes_it_has_lost_and_not_for_nodes_that_never_were(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scale = ScaleConfig(workers=3, resource_timeout_s=1)
    with pytest.raises(ResourcesError) as caught:
        wait_for_placement(LABELING, scale, Interruption())
    assert str(caught.value).endswith("Set at most 2")
    assert capsys.readouterr().out == ""
    steps = autoscaler.iter_until_fit(
        lambda nodes: plan_placement(nodes, scale),
        lambda max_nodes: compute_first_bundles(max_nodes, scale, 0),
        scale.resource_timeout_s,
        Interruption(),
        under_way=True,
    )
    with pytest.raises(
        ResourcesError, match=r"waited \d+ s for nodes; .* scale\.resource_timeout_s"
    ):
        list(steps)
    assert capsys.readouterr().out.startswith("waiting  for nodes: scale.workers 3")
    assert requested() == []


def requested() -> list[dict[str, float]]:
    """What an autoscaler would have to add: pending placement groups."""
    waiting = [group for group in placement_group_table().values() if group["state"] == "PENDING"]
    return [bundle for group in waiting for bundle in group["bundles"].values()]


@pytest.fixture
def growing_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a cluster that may grow to two nodes with a GPU, and two without."""
    groups = {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 4}, "max_workers": 2},
        "gpu": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 2},
    }
    config = {"available_node_types": groups, "head_node_type": "head", "max_workers": 4}
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(json.dumps(config))
    monkeypatch.setattr(autoscaler, "LAUNCHER_CONFIG", str(file))


def test_the_first_node_is_requested_until_it_joins_or_the_wait_ends(
    growing_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = ScaleConfig(layout="gpu", resource_timeout_s=1)
    steps = autoscaler.iter_until_fit(
        lambda nodes: plan_placement(nodes, scale),
        lambda max_nodes: compute_first_bundles(max_nodes, scale, 0),
        60,
        Interruption(),
    )
    next(steps)
    wait_for(lambda: requested() == [{"CPU": 0.5, "GPU": 1}])  # there are two cores
    assert "waiting  for nodes: scale.layout gpu needs a GPU" in capsys.readouterr().out
    steps.close()
    wait_for(lambda: requested() == [])
    with pytest.raises(ResourcesError, match=r"waited \d+ s for nodes"):
        wait_for_placement(LABELING, scale, Interruption())
    wait_for(lambda: requested() == [])


def test_nodes_are_requested_while_there_is_work_and_released_when_they_join(
    growing_cluster: None,
) -> None:
    max_nodes = autoscaler.find_max_nodes()
    assert max_nodes is not None
    whole = {"CPU": 4, "GPU": 1}
    assert (
        find_missing_nodes(select_nodes(max_nodes, ScaleConfig(), 0, 200), session.list_nodes())
        == [whole] * 2
    )
    request = NodeRequest()
    request.update([whole, whole])
    wait_for(lambda: requested() == [whole, whole])
    request.update([whole])
    wait_for(lambda: requested() == [whole])
    request.update([{"CPU": 2}, whole])  # the first one is there
    wait_for(lambda: requested() == [whole])
    request.update([whole])
    wait_for(lambda: ray.available_resources().get("CPU") == 2)
    other = NodeRequest()  # of another job in this process
    other.replace([{"GPU": 1}])
    wait_for(lambda: whole in requested() and {"GPU": 1} in requested())
    request.cancel()
    wait_for(lambda: requested() == [{"GPU": 1}])
    other.cancel()
    wait_for(lambda: requested() == [])


# ------------------------------------------------------------------ a job without images

SCHEMA = pa.schema([("row", pa.int64()), ("status", pa.string()), ("length", pa.int64())])


class LengthWorker(ChunkWorker[RunSpec]):
    """Computes the length of each path; a chunk with an empty path gets a table of its own kind."""

    def load(self, threads: int) -> pa.Schema:
        return SCHEMA

    def process(
        self,
        rows: pa.Table,
        task: ChunkTask,
        timings: StageTimings,
        crashed_rows: Mapping[int, str],
        heartbeat: Callable[[], None],
    ) -> pa.Table:
        lengths = [len(path) for path in rows["path"].to_pylist()]
        columns = [list(self.spec.plan.rows_of(task.chunk)), ["ok"] * len(lengths), lengths]
        schema = SCHEMA if all(lengths) else SCHEMA.remove(2).append(pa.field("size", pa.int64()))
        return pa.table(columns, schema=schema)


class StuckWorker(LengthWorker):
    """Never ends its first chunk."""

    def process(self, *_: object) -> pa.Table:
        Path(self.spec.output, "pid.new").write_text(str(os.getpid()))
        Path(self.spec.output, "pid.new").rename(Path(self.spec.output, "pid"))
        time.sleep(600)
        raise AssertionError("not reached")


def run_lengths(
    folder: Path,
    paths: list[str],
    skip: Collection[int] = (),
    *,
    worker: type[LengthWorker] = LengthWorker,
    interruption: Interruption | None = None,
) -> list[ChunkResult]:
    """Run the remaining chunks of a plan of three rows each; chunks in `skip` exist before."""
    manifest = manifest_of(folder, pa.table({"path": paths}))
    output, plan = str(folder / "out"), plan_at(folder / "out", manifest, chunk_rows=3)
    spec = RunSpec(
        output=output, plan=plan, io_concurrency=1, storage=StorageConfig(), session="",
        crash_retries=0,
    )  # fmt: skip
    for chunk in skip:
        write_chunk(spec, ChunkTask(chunk), SCHEMA.empty_table(), StageTimings())
    lease = Lease.acquire(output, 30)
    try:
        interruption = interruption or Interruption()
        driver = Driver(output, lease, interruption, ScaleConfig(), progress_seconds=60)
        job = Job("lengths", worker)
        placement = wait_for_placement(job, driver.scale, driver.interruption)
        completed = load_completed(output, plan, manifest)
        run = JobRun(job, spec, driver)
        tasks, done = completed.list_remaining(), completed.rows_done
        return list(run.run(placement, tasks, total=plan.rows, done=done))
    finally:
        lease.release()


def test_any_job_with_a_worker_is_run_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_lengths(tmp_path, ["a", "bb", "ccc"] * 3, skip=[1])
    assert sorted(result.task.chunk for result in results) == [0, 2]
    assert sum(result.rows for result in results) == 6
    assert "3 of 9 rows are done" in capsys.readouterr().out
    [file] = tmp_path.glob("out/_staging/part-00000/chunk-00000002.*.parquet")
    assert pq.read_table(file)["length"].to_pylist() == [1, 2, 3]
    assert pq.read_table(file)["row"].to_pylist() == [6, 7, 8]


def test_a_thousand_results_cost_one_listing_of_the_lease_until_it_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing for each would be the limit of the cluster's rate."""
    manifest = manifest_of(tmp_path, pa.table({"path": ["a.jpg"] * 1000}))
    output, plan = str(tmp_path / "out"), plan_at(tmp_path / "out", manifest, chunk_rows=1)
    spec = spec_of(tmp_path / "out", plan, manifest, "")
    listed: list[str] = []
    list_names = filesystem.list_names

    def count_listings(folder: str) -> list[str]:
        listed.append(folder)
        return list_names(folder)

    def finish(passes: ChunkRunner, placement: Placement, tasks: Collection[ChunkTask]) -> Any:
        return (ChunkResult(task, 1, {"ok": 1}, StageTimings(), "h/1") for task in tasks)

    monkeypatch.setattr(ChunkRunner, "run", finish)
    monkeypatch.setattr(runner, "LEASE_CHECK_S", 3600)
    lease = Lease.acquire(output, 3600)
    monkeypatch.setattr(filesystem, "list_names", count_listings)
    try:
        driver = Driver(output, lease, Interruption(), ScaleConfig(), progress_seconds=60)
        run = JobRun(LABELING, spec, driver)
        tasks = [ChunkTask(chunk) for chunk in range(plan.num_chunks)]
        results = run.run(plan_placement([Node(2, 0)], ScaleConfig()), tasks, total=plan.rows)
        assert [next(results).task.chunk for _ in range(999)] == list(range(999))
        assert listed == [str(tmp_path / "out" / "_lease")]
        (tmp_path / "out" / "_lease" / "000002.json").write_text("{}")
        monkeypatch.setattr(runner, "LEASE_CHECK_S", 0)
        with pytest.raises(RunFailed, match="another driver has taken over"):
            next(results)
    finally:
        lease.release()


def test_a_table_with_other_columns_than_the_job_has_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(
        ray.exceptions.RayError,
        match=r"chunk 0: its table has the columns \['row', 'status', 'size'\]",
    ):
        run_lengths(tmp_path, ["a", "", "ccc"])
    assert not list(tmp_path.glob("out/_staging/part-*/chunk-*"))


def test_an_interrupt_ends_the_workers_although_the_program_goes_on(tmp_path: Path) -> None:
    pid = tmp_path / "out" / "pid"

    def interrupt() -> None:
        wait_for(pid.exists)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with (
        Interruption().handle_signals() as interruption,
        # keeps the traceback and with it the frames, as a notebook does
        pytest.raises(Interrupted, match="stopped by SIGINT") as caught,
    ):
        run_lengths(tmp_path, ["a", "bb", "ccc"], worker=StuckWorker, interruption=interruption)
    thread.join()
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())))
    assert caught.traceback
