"""A placement is arithmetic over the nodes that Ray reports: no hardware is needed for it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.cluster.session import Node
from imgcls.errors import ResourcesError
from imgcls.execution.config import ScaleConfig
from imgcls.execution.placement import (
    GPU_WORKER_CPUS,
    JPEG_ENGINE_GPUS,
    ROLLUP_TASK_CPUS,
    WORKER_CPUS,
    Placement,
    compute_first_bundles,
    plan_placement,
    select_nodes,
)


def planned(*nodes: Node, **scale: object) -> Placement:
    return plan_placement(nodes, ScaleConfig.model_validate(scale))


def refusal(*nodes: Node, **scale: object) -> str:
    with pytest.raises(ResourcesError) as caught:
        planned(*nodes, **scale)
    return str(caught.value)


# ------------------------------------------------------------------ which placement


def test_without_a_gpu_every_core_has_a_worker_that_runs_all_stages() -> None:
    placement = planned(Node(cpus=4, gpus=0), Node(cpus=2, gpus=0))
    assert (placement.name, placement.workers, placement.worker_gpus) == ("cpu", 6, 0)
    assert (placement.threads, placement.prepare_tasks, placement.batch_size) == (1, 0, 32)
    assert placement.reasons == (
        "no GPU among 6 CPUs: every stage in one worker per core",
        "6 workers x 0.9 CPU leave 0.6 for Ray's own tasks",
    )


def test_no_more_processes_read_from_a_web_server_than_it_may_be_asked_at_a_time() -> None:
    many = planned(Node(cpus=40, gpus=0))
    assert (
        many.num_readers,
        many.limit_readers(8).num_readers,
        many.limit_readers(64).num_readers,
    ) == (
        40,
        8,
        40,
    )
    gpu = planned(Node(cpus=16, gpus=1, accelerator="T4"))
    assert (gpu.num_readers, gpu.limit_readers(8).num_readers) == (17, 8)
    assert gpu.limit_readers(8).workers == 1


def test_with_gpus_and_cpus_in_plenty_the_cpus_decode() -> None:
    placement = planned(Node(cpus=16, gpus=1, accelerator="T4"))
    assert (placement.name, placement.workers, placement.worker_gpus) == ("gpu", 1, 1)
    assert (placement.prepare_tasks, placement.batch_size) == (17, 128)
    assert placement.reasons[0] == "1 GPU, 16 CPUs each: CPUs decode for GPUs"
    rich = planned(Node(cpus=96, gpus=4, accelerator="H100"))
    assert rich.name == "gpu"


@pytest.mark.parametrize("accelerator", JPEG_ENGINE_GPUS)
def test_jpeg_engines_that_are_not_measured_are_not_used(accelerator: str) -> None:
    placement = planned(Node(cpus=16, gpus=1, accelerator=accelerator))
    assert (placement.name, placement.cpu_decode_fraction) == ("gpu", 1.0)
    assert placement.reasons[0].endswith(
        "CPUs decode for GPUs; their JPEG engines are not measured"
    )
    asked = planned(Node(cpus=16, gpus=1, accelerator=accelerator), layout="gpu_decode")
    assert (asked.name, asked.cpu_decode_fraction) == ("gpu_decode", 0.0)
    assert asked.reasons[1].endswith("tasks on CPUs to fetch and decode")


def test_jpeg_engines_are_mentioned_where_all_gpus_have_one() -> None:
    mixed = planned(Node(8, 1, "A100"), Node(8, 1, "T4"))
    assert "engines" not in mixed.reasons[0]
    assert "engines" in planned(Node(8, 1, "A100"), Node(8, 0)).reasons[0]
    assert "engines" not in planned(Node(8, 1, None)).reasons[0]


@pytest.mark.parametrize("name", ["cpu", "gpu", "gpu_decode"])
def test_a_layout_that_is_set_is_used(name: str) -> None:
    placement = planned(Node(8, 2, "A100"), layout=name, workers=2, batch_size=7)
    assert (placement.name, placement.workers, placement.batch_size) == (name, 2, 7)
    assert placement.reasons[0] == f"{name} layout, as set by scale.layout"


@pytest.mark.parametrize("layout", ["auto", "gpu"])
def test_a_job_without_stages_for_gpus_uses_cpus_and_the_log_gives_that_reason(layout: str) -> None:
    nodes, scale = [Node(8, 2, "A100")], ScaleConfig.model_validate({"layout": layout})
    placement = plan_placement(nodes, scale, use_gpus=False)
    assert (placement.name, placement.workers, placement.worker_gpus) == ("cpu", 8, 0)
    reason = "this job has no stage for GPUs: every stage in one worker per core"
    assert placement.reasons[0] == reason
    for known in (nodes, None):
        assert compute_first_bundles(known, scale, 0, use_gpus=False) == [{"CPU": 1.0}]
    plain = Node(8, 0)
    assert select_nodes([plain, *nodes], scale, 0, 100, use_gpus=False) == [plain]


def test_gpus_without_cpus_on_their_node_stay_idle_which_is_logged() -> None:
    """A GPU's worker needs its CPUs on the GPU's own node, whatever other nodes have."""
    placement = planned(Node(cpus=1, gpus=4), Node(cpus=64, gpus=0))
    assert placement.workers == 2
    assert placement.reasons[-1] == "2 GPUs idle: too few CPUs on their nodes"
    assert "idle" not in " ".join(planned(Node(64, 4)).reasons)


@pytest.mark.parametrize(
    ("layout", "device"), [("cpu", "cpu"), ("gpu", "cuda"), ("gpu_decode", "cuda")]
)
def test_workers_are_started_with_the_device_that_is_planned(layout: str, device: str) -> None:
    """Ray shows the GPUs of a node to workers without one as well."""
    placement = planned(Node(16, 1), layout=layout)
    assert placement.device == device
    spec: Any = object()
    options = placement._actor_options(spec, 1)
    assert options["fn_constructor_args"] == (spec, 1, device)
    assert options["num_gpus"] == (1 if device == "cuda" else None)


# ------------------------------------------------------------------ what does not fit


def test_a_cluster_without_a_whole_core_is_refused_with_the_remedy() -> None:
    for nodes in ((), (Node(0, 1),), (Node(0.5, 0), Node(0.5, 0))):
        assert "a worker needs at least 1 on one node" in refusal(*nodes)
    assert "the cluster has 0.5 CPUs" in refusal(Node(0.5, 0))


def test_more_workers_than_cores_are_refused_with_the_arithmetic() -> None:
    message = refusal(Node(2, 0), Node(3.5, 0), workers=6)
    assert "scale.workers 6" in message
    assert "Set at most 5" in message
    assert planned(Node(2, 0), Node(3.5, 0), workers=5).workers == 5


def test_a_gpu_layout_without_a_gpu_is_refused() -> None:
    for name in ("gpu", "gpu_decode"):
        message = refusal(Node(8, 0), layout=name)
        assert f"scale.layout {name} needs a GPU, the cluster has 0" in message
        assert "--scale.layout cpu" in message


def test_more_workers_than_gpus_are_refused_with_the_arithmetic() -> None:
    message = refusal(Node(16, 1), Node(16, 1), workers=3)
    assert (
        "scale.workers 3: each worker takes a GPU, and the cluster has 2. Set at most 2" in message
    )


def test_gpu_workers_that_leave_no_cpu_for_fetching_are_refused_with_the_arithmetic() -> None:
    message = refusal(Node(4, 8))
    assert "8 GPU workers x 0.5 CPU leave at most 0 of 4 CPUs on one node" in message
    assert "fetching needs 0.95" in message
    assert planned(Node(4, 8), workers=6).prepare_tasks == 1
    # 4 CPUs are left in all, but no node has room for a single fetching task
    scattered = [Node(1, 1)] * 8
    assert "leave at most 0.5 of 8 CPUs on one node" in refusal(*scattered)
    assert "CPUs for 2" in refusal(Node(1, 4), Node(64, 0), workers=3)


# ------------------------------------------------------------------ whatever the cluster


NODES = st.lists(
    st.builds(
        Node,
        cpus=st.integers(0, 70) | st.sampled_from([0.4, 0.9, 1.4, 2.5, 9.95]),
        gpus=st.integers(0, 8) | st.sampled_from([0.5, 1.5]),
        accelerator=st.none() | st.sampled_from(["T4", "H100"]),
    ),
    max_size=6,
)
SCALES = st.builds(
    ScaleConfig,
    layout=st.sampled_from(["auto", "cpu", "gpu", "gpu_decode"]),
    workers=st.none() | st.integers(1, 80),
)


@dataclass
class Room:
    """What is free on a node, in ten-thousandths, as Ray counts."""

    cpus: int
    gpus: int

    def fits(self, cpus: float, gpus: float) -> bool:
        return self.cpus >= round(cpus * 10_000) and self.gpus >= round(gpus * 10_000)

    def take(self, cpus: float, gpus: float) -> None:
        self.cpus -= round(cpus * 10_000)
        self.gpus -= round(gpus * 10_000)


def placed(nodes: Sequence[Node], placement: Placement, seed: int) -> list[Room]:
    """Place every worker on any node with room, as Ray might; returns the room that is left."""
    rng = random.Random(seed)
    rooms = [Room(round(n.cpus * 10_000), round(n.gpus * 10_000)) for n in nodes]
    for number in range(placement.workers):
        with_room = [r for r in rooms if r.fits(placement.worker_cpus, placement.worker_gpus)]
        assert with_room, f"worker {number} of {placement.workers} would wait forever"
        # fill one node before the next, or spread the workers
        (with_room[0] if seed % 2 else rng.choice(with_room)).take(
            placement.worker_cpus, placement.worker_gpus
        )
    return rooms


@given(nodes=NODES, scale=SCALES, seed=st.integers(0, 1000))
def test_whatever_the_cluster_all_workers_start_and_a_task_always_has_room(
    nodes: list[Node], scale: ScaleConfig, seed: int
) -> None:
    try:
        placement = plan_placement(nodes, scale)
    except ResourcesError:
        return
    assert placement.workers >= 1
    rooms = placed(nodes, placement, seed)
    assert any(room.fits(ROLLUP_TASK_CPUS, 0) for room in rooms)
    reserved = placement.workers * placement.worker_cpus + placement.prepare_tasks * WORKER_CPUS
    assert sum(node.cpus for node in nodes) - reserved >= ROLLUP_TASK_CPUS - 1e-9
    if placement.name != "cpu":
        assert placement.prepare_tasks >= 1
        assert any(room.fits(WORKER_CPUS + ROLLUP_TASK_CPUS, 0) for room in rooms)


@given(nodes=NODES)
def test_by_default_every_core_and_gpu_that_can_work_is_used(nodes: list[Node]) -> None:
    try:
        placement = plan_placement(nodes, ScaleConfig())
    except ResourcesError:
        return
    if placement.name == "cpu":
        assert placement.workers == sum(math.floor(node.cpus) for node in nodes)
    else:
        slots = (min(math.floor(n.gpus), math.floor(n.cpus / GPU_WORKER_CPUS)) for n in nodes)
        assert placement.workers == sum(slots)


def test_few_rows_start_few_workers() -> None:
    placement = plan_placement([Node(8, 0)], ScaleConfig())
    workers = [placement.limit_to_rows(rows).workers for rows in (0, 1, 128, 129, 1000, 10**6)]
    assert workers == [1, 1, 1, 2, 8, placement.workers]


# ------------------------------------------------------------------ the object store


def test_no_more_tasks_decode_than_the_object_store_holds_the_pixels_of() -> None:
    node = Node(cpus=64, gpus=1, accelerator="T4", object_store_bytes=4e9)
    wide = plan_placement([node], ScaleConfig(), chunk_bytes=1_000_000)
    narrow = plan_placement([node], ScaleConfig(), chunk_bytes=38_535_168)
    assert narrow.prepare_tasks == 10 < wide.prepare_tasks
    assert narrow.reasons[-1] == (
        "10 x 5 chunks of 39 MB take 1.9 of the 2.0 GB that they may use of the object store"
    )


def test_a_node_with_many_cpus_and_a_small_object_store_is_the_limit() -> None:
    gpu = Node(cpus=16, gpus=1, accelerator="T4", object_store_bytes=40e9)
    alike = plan_placement([gpu, gpu], ScaleConfig(), chunk_bytes=38_535_168)
    assert alike.prepare_tasks == 34  # all of them
    small = Node(cpus=64, gpus=0, object_store_bytes=4e9)
    placement = plan_placement([gpu, small], ScaleConfig(), chunk_bytes=38_535_168)
    # of the small one's 71 tasks its store holds 10, so of all 88 twelve may decode
    assert placement.prepare_tasks == 12
    assert placement.reasons[-1] == (
        "12 x 5 chunks of 39 MB take 2.3 of the 22.0 GB that they may use of the object store; a "
        "node with 2.0 GB for 71 such tasks is the limit"
    )


def test_a_chunk_too_large_for_the_object_store_is_refused_with_the_arithmetic() -> None:
    node = Node(cpus=64, gpus=1, accelerator="T4", object_store_bytes=1e8)
    with pytest.raises(ResourcesError) as caught:
        plan_placement([node], ScaleConfig(), chunk_bytes=38_535_168)
    assert str(caught.value) == (
        "a task that decodes holds up to 5 chunks of 39 MB in the object store, where it may use "
        "50 MB. Set a smaller --chunk-rows, start Ray with a larger --object-store-memory, or set "
        "--scale.layout cpu"
    )


def test_on_cpus_alone_no_pixels_pass_through_the_object_store() -> None:
    placement = plan_placement(
        [Node(4, 0, object_store_bytes=1.0)], ScaleConfig(), chunk_bytes=38_535_168
    )
    assert placement.name == "cpu"


# ------------------------------------------------------------------ nodes that may join


def test_the_first_request_is_for_a_gpu_where_the_cluster_may_grow_to_one() -> None:
    max_nodes = [Node(16, 1, "L4")] * 4 + [Node(16, 0)] * 8
    gpu, core = {"CPU": GPU_WORKER_CPUS, "GPU": 1.0}, {"CPU": 1.0}
    assert compute_first_bundles(max_nodes, ScaleConfig(), 0) == [gpu, core]
    assert compute_first_bundles(max_nodes, ScaleConfig(workers=2), 0) == [gpu, gpu, core]
    assert compute_first_bundles(max_nodes, ScaleConfig(layout="cpu"), 0) == [core]
    with pytest.raises(ResourcesError, match=r"the cluster has 4\. Set at most 4"):
        compute_first_bundles(max_nodes, ScaleConfig(workers=5), 0)
    # where it is unknown what may join, the settings decide
    assert compute_first_bundles(None, ScaleConfig(), 0) == [core]
    assert compute_first_bundles(None, ScaleConfig(layout="gpu", workers=2), 0) == [gpu, gpu, core]


def test_no_more_nodes_are_requested_than_there_are_rows_for() -> None:
    gpu, cpu = Node(16, 1, "L4"), Node(16, 0)
    max_nodes = [cpu] * 8 + [gpu] * 4

    def wanted(rows: int, **scale: object) -> list[Node]:
        return select_nodes(max_nodes, ScaleConfig.model_validate(scale), 0, rows)

    assert wanted(10**6) == [gpu] * 4 + [cpu] * 8
    assert wanted(1) == [gpu]
    assert wanted(300) == [gpu] * 3
    assert wanted(128 * 70) == [gpu] * 4 + [cpu]
    assert wanted(10**6, workers=1) == [gpu] + [cpu] * 8  # no GPU for its cores alone
    assert wanted(128 * 20, layout="cpu") == [cpu, cpu]
    assert wanted(128 * 150, layout="cpu") == [cpu] * 8 + [gpu] * 2
