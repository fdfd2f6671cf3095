"""When to stop a pass and replan it for the nodes that the cluster has now: arithmetic alone."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imgcls.cluster import session
from imgcls.cluster.session import Node
from imgcls.execution.placement import Placement
from imgcls.formatting import format_count

SETTLE_S = 15.0
"""Time without a change of nodes before a replan: nodes seldom join or leave alone."""
MIN_SAVED_S = 60.0
"""Minimum time that a replan must save. It costs a worker's start and the chunks in flight."""
_POLL_S = 2.0


@dataclass(frozen=True)
class RunState:
    """The state that decides whether a pass continues.

    nodes_before, nodes_now: when the pass started, and now
    stable_seconds:          since the nodes last changed
    idle_seconds:            since a worker was last seen to make progress
    rows_left:               rows still to be processed
    rows_per_second:         in this pass; None before its first result
    worker_timeout_s:        after which a worker counts as hung
    """

    nodes_before: Sequence[Node]
    nodes_now: Sequence[Node]
    stable_seconds: float
    idle_seconds: float
    rows_left: int
    rows_per_second: float | None
    worker_timeout_s: float


def find_replan_reason(
    state: RunState, placement: Placement, plan_now: Callable[[], Placement | None]
) -> str | None:
    """Why the pass should be stopped and replanned; None when it should go on.

    plan_now: returns the placement for the nodes that are there now, None when nothing fits
    """
    ids = {node.id for node in state.nodes_now}
    lost = sum(1 for node in state.nodes_before if node.id not in ids)
    if state.stable_seconds < SETTLE_S:
        return None
    if lost and state.idle_seconds > SETTLE_S:
        nodes = format_count(len(state.nodes_before), "node")
        return f"lost {lost} of {nodes}; no worker is making progress"
    if state.rows_per_second is not None and state.idle_seconds > state.worker_timeout_s + SETTLE_S:
        # not within a chunk: the watchdog would have killed the worker
        return f"no worker has made progress for {state.idle_seconds:.0f} s"
    joined = len(state.nodes_now) - (len(state.nodes_before) - lost)
    if not joined or state.rows_per_second is None:
        return None
    larger = plan_now()
    if larger is None:
        return None
    saved = larger.compute_time_saved(placement) * state.rows_left / state.rows_per_second
    if saved < MIN_SAVED_S:
        return None
    return f"{format_count(joined, 'node')} joined: {larger.summary} instead of {placement.summary}"


def find_missing_nodes(wanted: Sequence[Node], present: Sequence[Node]) -> list[dict[str, float]]:
    """The resources of each node that is wanted and not present."""
    missing = collections.Counter((node.cpus, node.gpus) for node in wanted)
    missing.subtract((node.cpus, node.gpus) for node in present)
    return [
        {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        for (cpus, gpus), count in missing.items()
        for _ in range(count)
    ]


class NodeMonitor:
    """The nodes of the cluster, polled every few seconds."""

    def __init__(self) -> None:
        self._before = self._now = session.list_nodes()
        self._changed_at = self._polled_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to poll again."""
        return time.monotonic() - self._polled_at > _POLL_S

    def read_state(
        self,
        *,
        idle_seconds: float,
        rows_left: int,
        rows_per_second: float | None,
        worker_timeout_s: float,
    ) -> RunState:
        """Poll the nodes; the state of the pass with them."""
        self._polled_at = time.monotonic()
        now = session.list_nodes()
        if {node.id for node in now} != {node.id for node in self._now}:
            self._changed_at = self._polled_at
        self._now = now
        stable = self._polled_at - self._changed_at
        return RunState(
            self._before, now, stable, idle_seconds, rows_left, rows_per_second, worker_timeout_s
        )
