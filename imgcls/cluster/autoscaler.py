"""Autoscaling: the nodes that may join, requests for them, and waiting for them.

Each job has requests of its own, so that jobs in one process do not cancel each other's. The nodes
that are there are listed by `session`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import ray
import yaml
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from imgcls import log
from imgcls.cluster import ray_internals
from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import Node, build_node, is_private_session, list_nodes
from imgcls.errors import ResourcesError, RunFailed
from imgcls.formatting import format_count

T = TypeVar("T")

LOG_WAIT_AFTER_S = 30.0
"""Waiting is logged after this time, because workers take a while to start."""
LAUNCHER_CONFIG = "~/ray_bootstrap_config.yaml"
"""Configuration of a cluster that `ray up` has started, on its head node."""
UNLIMITED_NODES = 1000
"""Number of nodes assumed for a group without a maximum."""
LOG_INTERVAL_S = 5.0
"""Interval of the log lines after that."""


def find_max_nodes() -> list[Node] | None:
    """The nodes that an autoscaling cluster may grow to; None where that is unknown."""
    config = ray_internals.get_cluster_config()
    if config is not None and config.node_group_configs:
        return [
            build_node(group.resources)
            for group in config.node_group_configs
            for _ in range(group.max_count if group.max_count >= 0 else UNLIMITED_NODES)
        ]
    try:
        with open(os.path.expanduser(LAUNCHER_CONFIG), encoding="utf-8") as file:
            return parse_launcher_nodes(yaml.safe_load(file))
    except FileNotFoundError:
        return None


def parse_launcher_nodes(config: Mapping[str, Any]) -> list[Node]:
    """All nodes of a cluster launcher's configuration except the head, those with GPUs first.

    Groups of the same node type and different priority replace each other, as spot and on-demand
    nodes do: only the largest of them counts.
    """
    groups: dict[Node, dict[int, int]] = {}
    for name, group in config["available_node_types"].items():
        machine = build_node(group.get("resources", {}))
        if name != config["head_node_type"] and machine.cpus + machine.gpus:
            counts = groups.setdefault(machine, {})
            priority = group.get("priority", 0)
            counts[priority] = counts.get(priority, 0) + group["max_workers"]
    found = [node for node, counts in groups.items() for _ in range(max(counts.values()))]
    return sorted(found, key=lambda node: -node.gpus)[: config["max_workers"]]


class NodeRequest:
    """A job's request for nodes to the autoscaler, where there is one.

    It consists of pending placement groups, because Ray Data overwrites
    `ray.autoscaler.sdk.request_resources` every 20 s; that request also outlives a killed driver,
    and brings no nodes at all when it cannot be met in full.
    """

    def __init__(self) -> None:
        self._groups: list[PlacementGroup] = []

    def replace(self, bundles: Iterable[Mapping[str, float]]) -> None:
        """Request nodes that can hold each of the bundles, instead of the previous ones."""
        self.cancel()
        self._groups = [placement_group([dict(bundle)]) for bundle in bundles]

    def update(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Reduce or extend the request to the bundles still missing; to be called repeatedly.

        Placement groups that were created have served their purpose, and are removed.
        """
        waiting = []
        for group in self._groups:
            if placement_group_table(group).get("state") == "CREATED":
                remove_placement_group(group)
            else:
                waiting.append(group)
        self._groups = waiting
        if len(waiting) != len(bundles):
            self.replace(bundles)

    def cancel(self) -> None:
        """Cancel what is requested, if anything."""
        if ray.is_initialized():
            for group in self._groups:
                remove_placement_group(group)
        self._groups = []


def iter_until_fit(
    fit: Callable[[Sequence[Node]], T],
    wanted: Callable[[Sequence[Node] | None], list[dict[str, float]]],
    seconds: float,
    interruption: Interruption,
    *,
    request: NodeRequest | None = None,
    under_way: bool = False,
) -> Generator[None, None, T]:
    """Call `fit` on the nodes of the cluster every 0.5 s until it succeeds; yields in between.

    Where nodes may join, they are requested and waited for.

    fit:       plans for a list of nodes; raises ResourcesError when they do not suffice
    wanted:    the bundles to request, given the nodes that may join (None where unknown)
    seconds:   maximum wait, `scale.resource_timeout_s`
    request:   of the job; replaced while nodes are missing, and canceled at the end
    under_way: it succeeded before, so that missing nodes were lost and may be replaced
    Returns the result of `fit`. Raises ResourcesError when the nodes that may join do not suffice
    either, or after the maximum wait.
    """
    started = logged = time.monotonic()
    request = request or NodeRequest()
    requested = False
    try:
        while True:
            there = list_nodes()
            try:
                return fit(there)
            except ResourcesError as error:
                most = None if is_private_session() else find_max_nodes()
                if is_private_session() or (most is None and there and not under_way):
                    raise
                if not requested:
                    if most is not None:
                        fit(most)
                    request.replace(wanted(most))
                    requested = True
                waited = time.monotonic() - started
                if waited > seconds:
                    raise ResourcesError(
                        f"{error} (waited {waited:.0f} s for nodes; to wait longer, raise "
                        "scale.resource_timeout_s)"
                    ) from None
                if waited < 1 or time.monotonic() - logged > LOG_INTERVAL_S:
                    logged = time.monotonic()
                    log.emit(
                        "waiting",
                        f"for nodes: {error} ({waited:.0f} of at most {seconds:.0f} s)",
                    )
            interruption.check()
            time.sleep(0.5)
            yield
    finally:
        if requested:
            request.cancel()


def wait_until_fit(
    fit: Callable[[Sequence[Node]], T],
    wanted: Callable[[Sequence[Node] | None], list[dict[str, float]]],
    seconds: float,
    interruption: Interruption,
) -> T:
    """As `iter_until_fit`, blocking."""
    # closed, because the traceback of an interruption would keep it, and with it the request
    with contextlib.closing(iter_until_fit(fit, wanted, seconds, interruption)) as steps:
        while True:
            try:
                next(steps)
            except StopIteration as ended:
                result: T = ended.value
                return result


class WaitTimeout:
    """Maximum wait for resources that the cluster may not have; logs while it waits."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._logged = 0.0

    def check(self, waited: float, what: str) -> None:
        """To be called repeatedly while waiting; raises RunFailed after the maximum wait."""
        if waited > self._seconds:
            raise RunFailed(
                f"waited {waited:.0f} s (scale.resource_timeout_s) for {what}; "
                f"{_describe_capacity()}"
            )
        if waited > LOG_WAIT_AFTER_S and time.monotonic() - self._logged > LOG_INTERVAL_S:
            self._logged = time.monotonic()
            log.emit(
                "waiting",
                f"for {what}, {waited:.0f} of at most {self._seconds:.0f} s; "
                f"{_describe_capacity()}",
            )


def _describe_capacity() -> str:
    there, free = list_nodes(), ray.available_resources()
    return (
        f"the cluster has {format_count(len(there), 'node')} with "
        f"{sum(node.cpus for node in there):g} CPUs and "
        f"{sum(node.gpus for node in there):g} GPUs, of which {free.get('CPU', 0):g} and "
        f"{free.get('GPU', 0):g} are free"
    )
