"""When a pass is stopped and replanned, as arithmetic over the nodes that join and leave."""

from __future__ import annotations

from typing import Any

import pytest

from imgcls.cluster.session import Node
from imgcls.execution.config import ScaleConfig
from imgcls.execution.placement import Placement, plan_placement
from imgcls.execution.replan import SETTLE_S, RunState, find_missing_nodes, find_replan_reason

A, B, C = (Node(2, 0, id=name) for name in "abc")


def placement_of(*nodes: Node) -> Placement:
    return plan_placement(nodes, ScaleConfig())


def reason(**changes: Any) -> str | None:
    values: dict[str, Any] = {
        "nodes_before": (A, B), "nodes_now": (A, B), "stable_seconds": 60.0, "idle_seconds": 0.0,
        "rows_left": 100_000, "rows_per_second": 100.0, "worker_timeout_s": 600.0,
    }  # fmt: skip
    state = RunState(**{**values, **changes})
    larger = placement_of(*state.nodes_now) if state.nodes_now else None
    return find_replan_reason(state, placement_of(*state.nodes_before), lambda: larger)


def test_a_pass_goes_on_while_no_node_changes() -> None:
    assert reason() is None
    assert reason(idle_seconds=1000.0, rows_per_second=None) is None  # waiting is limited elsewhere


def test_without_progress_for_too_long_it_is_replanned_though_no_node_is_lost() -> None:
    assert reason(idle_seconds=600.0) is None
    assert reason(idle_seconds=600.0 + SETTLE_S + 1) == "no worker has made progress for 616 s"


def test_while_others_make_progress_a_lost_node_is_no_reason() -> None:
    assert reason(nodes_now=(A,), idle_seconds=1.0) is None


@pytest.mark.parametrize("now", [(A,), ()])
def test_without_progress_after_a_loss_it_is_replanned(now: tuple[Node, ...]) -> None:
    found = reason(nodes_now=now, idle_seconds=SETTLE_S + 1)
    assert found == f"lost {2 - len(now)} of 2 nodes; no worker is making progress"


def test_a_node_that_joins_is_used_where_that_saves_a_minute() -> None:
    assert reason(nodes_now=(A, B, C)) == "1 node joined: 6 workers instead of 4 workers"
    assert reason(nodes_now=(A, B, C), rows_left=10_000) is None


def test_gpus_that_join_cpus_are_used_and_cpus_that_join_gpus() -> None:
    cpus, gpu = tuple(Node(16, 0, id=f"c{i}") for i in range(8)), Node(16, 1, "T4", "g")
    found = reason(nodes_before=cpus, nodes_now=(*cpus, gpu))
    assert found == ("1 node joined: 1 GPU worker with 153 CPU tasks instead of 128 workers")
    assert reason(nodes_before=cpus, nodes_now=(*cpus, gpu), rows_left=10_000) is None
    found = reason(nodes_before=(gpu,), nodes_now=(gpu, *cpus[:1]))
    assert found is not None
    assert found.endswith(
        "1 GPU worker with 34 CPU tasks instead of 1 GPU worker with 17 CPU tasks"
    )
    # a node with a GPU that was replaced by one without
    assert reason(nodes_before=(gpu,), nodes_now=cpus) is None


def test_a_node_that_replaces_a_lost_one_is_no_reason() -> None:
    assert reason(nodes_now=(A, C)) is None


def test_while_nodes_keep_joining_it_waits() -> None:
    assert reason(nodes_now=(A, B, C), stable_seconds=SETTLE_S - 1) is None


def test_before_the_first_result_no_saving_is_known() -> None:
    assert reason(nodes_now=(A, B, C), rows_per_second=None) is None


def test_nodes_are_missing_that_are_wanted_and_not_present() -> None:
    gpu, cpu = Node(4, 1, "L4"), Node(2, 0)
    assert find_missing_nodes([gpu, gpu, cpu], [Node(2, 0, id="x"), Node(4, 1, "L4", "y")]) == [
        {"CPU": 4, "GPU": 1}
    ]
    assert find_missing_nodes([cpu], [cpu, cpu, gpu]) == []
    assert find_missing_nodes([], []) == []
