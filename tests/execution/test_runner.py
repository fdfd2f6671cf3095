"""When a pass is broken off and laid out anew, as arithmetic over what comes and goes."""

from __future__ import annotations

from typing import Any

import pytest

from imgcls.cluster.session import Node
from imgcls.execution.placement import Placement, ScaleConfig, plan_placement
from imgcls.execution.runner import SETTLE_SECONDS, RunState, find_missing_nodes, find_replan_reason

A, B, C = (Node(2, 0, id=name) for name in "abc")


def layout_of(*nodes: Node) -> Placement:
    return plan_placement(nodes, ScaleConfig())


def reason(**changes: Any) -> str | None:
    values: dict[str, Any] = {
        "before": (A, B), "now": (A, B), "steady": 60.0, "idle": 0.0, "rows_left": 100_000,
        "rate": 100.0, "worker_timeout_s": 600.0,
    }  # fmt: skip
    it = RunState(**{**values, **changes})
    fits = layout_of(*it.nodes_now) if it.nodes_now else None
    return find_replan_reason(it, layout_of(*it.nodes_before), lambda: fits)


def test_nothing_is_touched_while_nothing_changes() -> None:
    assert reason() is None
    assert reason(idle=1000.0, rate=None) is None  # waiting is limited elsewhere


def test_when_nobody_goes_on_for_too_long_it_is_laid_out_anew_though_no_machine_is_lost() -> None:
    assert reason(idle=600.0) is None
    assert reason(idle=600.0 + SETTLE_SECONDS + 1) == "no worker has gone on for 616 s"


def test_while_others_go_on_a_lost_machine_is_no_reason() -> None:
    assert reason(now=(A,), idle=1.0) is None


@pytest.mark.parametrize("now", [(A,), ()])
def test_when_nobody_goes_on_after_a_loss_it_is_laid_out_anew(now: tuple[Node, ...]) -> None:
    why = reason(now=now, idle=SETTLE_SECONDS + 1)
    assert why == f"{2 - len(now)} of 2 machines are gone, and no worker goes on"


def test_a_machine_that_comes_is_taken_in_where_that_saves_a_minute() -> None:
    assert reason(now=(A, B, C)) == "1 machines have come: 6 workers instead of 4"
    assert reason(now=(A, B, C), rows_left=10_000) is None


def test_gpus_that_come_to_cpus_alone_are_taken_in_and_cpus_that_come_to_gpus() -> None:
    cpus, gpu = tuple(Node(16, 0, id=f"c{i}") for i in range(8)), Node(16, 1, "T4", "g")
    why = reason(before=cpus, now=(*cpus, gpu))
    assert why == (
        "1 machines have come: 1 GPU workers and 153 tasks for them instead of 128 workers"
    )
    assert reason(before=cpus, now=(*cpus, gpu), rows_left=10_000) is None
    why = reason(before=(gpu,), now=(gpu, *cpus[:1]))
    assert why is not None
    assert why.endswith(
        "1 GPU workers and 34 tasks for them instead of 1 GPU workers and 17 tasks for them"
    )
    # a machine with a GPU in place of which only one without has come
    assert reason(before=(gpu,), now=cpus) is None


def test_a_machine_in_place_of_a_lost_one_is_no_reason() -> None:
    assert reason(now=(A, C)) is None


def test_machines_that_keep_coming_are_waited_for() -> None:
    assert reason(now=(A, B, C), steady=SETTLE_SECONDS - 1) is None


def test_before_the_first_rows_nobody_knows_what_would_be_saved() -> None:
    assert reason(now=(A, B, C), rate=None) is None


def test_what_is_missing_is_what_is_wanted_and_not_there() -> None:
    gpu, cpu = Node(4, 1, "L4"), Node(2, 0)
    assert find_missing_nodes([gpu, gpu, cpu], [Node(2, 0, id="x"), Node(4, 1, "L4", "y")]) == [
        {"CPU": 4, "GPU": 1}
    ]
    assert find_missing_nodes([cpu], [cpu, cpu, gpu]) == []
    assert find_missing_nodes([], []) == []
