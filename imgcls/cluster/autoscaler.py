"""Machines that are not there yet: what may come, asking an autoscaler for it, waiting aloud.

Owns what this driver has asked for, and promises to take it back. The machines that are there, and
the session itself, are the business of `cluster`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import ray
import yaml
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from imgcls.cluster import ray_internals
from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import Node, build_node, is_private_session, list_nodes
from imgcls.errors import ResourcesError, RunFailed
from imgcls.log import tell

T = TypeVar("T")

LOG_WAIT_AFTER_SECONDS = 30.0
"""After which waiting is said: workers take a while to start."""
LAUNCHER_CONFIG = "~/ray_bootstrap_config.yaml"
"""On the head of a cluster that `ray up` has started: what it may grow to."""
UNLIMITED_NODES = 1000
"""Machines of a kind of which there may be any number."""
LOG_INTERVAL_SECONDS = 5.0
"""And so often then."""


class _PendingRequest:
    placement_groups: ClassVar[list[PlacementGroup]] = []


def find_max_nodes() -> list[Node] | None:
    """The machines that an autoscaling cluster may grow to; None where it does not say."""
    told = ray_internals.get_cluster_config()
    if told is not None and told.node_group_configs:
        return [
            build_node(group.resources)
            for group in told.node_group_configs
            for _ in range(group.max_count if group.max_count >= 0 else UNLIMITED_NODES)
        ]
    try:
        with open(os.path.expanduser(LAUNCHER_CONFIG), encoding="utf-8") as file:
            return parse_launcher_nodes(yaml.safe_load(file))
    except FileNotFoundError:
        return None


def parse_launcher_nodes(config: Mapping[str, Any]) -> list[Node]:
    """All machines of a cluster launcher's configuration but the head, those with GPUs first.

    Groups of the same machine and different priority stand in for each other, as spot machines and
    those on demand do: the largest of them counts.
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


def request_nodes(bundles: Iterable[Mapping[str, float]]) -> None:
    """Ask the autoscaler, where there is one, for machines that hold each of these.

    In place of what was asked for before, and until `give_back`. As reservations that wait: what
    `ray.autoscaler.sdk.request_resources` is told, Ray Data overwrites every 20 s, and it is kept
    when the driver is killed; and of what cannot all be had, none is brought.
    """
    cancel_request()
    _PendingRequest.placement_groups = [placement_group([dict(bundle)]) for bundle in bundles]


def update_request(bundles: Sequence[Mapping[str, float]]) -> None:
    """To be called now and then with what is wanted and not there: what has come is let go."""
    waiting = []
    for group in _PendingRequest.placement_groups:
        if placement_group_table(group).get("state") == "CREATED":
            remove_placement_group(group)
        else:
            waiting.append(group)
    _PendingRequest.placement_groups = waiting
    if len(waiting) != len(bundles):
        request_nodes(bundles)


def cancel_request() -> None:
    """Take back what was asked for, if anything."""
    if ray.is_initialized():
        for group in _PendingRequest.placement_groups:
            remove_placement_group(group)
    _PendingRequest.placement_groups = []


def iter_until_fit(
    fit: Callable[[Sequence[Node]], T],
    wanted: Callable[[Sequence[Node] | None], list[dict[str, float]]],
    seconds: float,
    interruption: Interruption,
    *,
    under_way: bool = False,
) -> Generator[None, None, T]:
    """What `fit` makes of the machines that are there, in steps of half a second.

    Where more may come they are asked for and waited for.

    fit:       of machines; raises ResourcesError where they do not hold what it is about
    wanted:    what to ask for, by the machines that may come; None where that is not known
    seconds:   to wait at most: `scale.resource_timeout_s`
    under_way: it has fitted before, so that what it lacks was lost, and may be replaced
    Raises ResourcesError when it does not fit and will not, or did not in so long.
    """
    started = said = time.monotonic()
    asked = False
    try:
        while True:
            there = list_nodes()
            try:
                return fit(there)
            except ResourcesError as error:
                most = None if is_private_session() else find_max_nodes()
                if is_private_session() or (most is None and there and not under_way):
                    raise
                if not asked:
                    if most is not None:
                        fit(most)
                    request_nodes(wanted(most))
                    asked = True
                waited = time.monotonic() - started
                if waited > seconds:
                    raise ResourcesError(
                        f"{error} (waited {waited:.0f} s for machines, as "
                        "scale.resource_timeout_s says)"
                    ) from None
                if waited < 1 or time.monotonic() - said > LOG_INTERVAL_SECONDS:
                    said = time.monotonic()
                    tell(
                        "waiting",
                        f"for machines: {error} ({waited:.0f} of at most {seconds:.0f} s)",
                    )
            interruption.check()
            time.sleep(0.5)
            yield
    finally:
        if asked:
            cancel_request()


def wait_until_fit(
    fit: Callable[[Sequence[Node]], T],
    wanted: Callable[[Sequence[Node] | None], list[dict[str, float]]],
    seconds: float,
    interruption: Interruption,
) -> T:
    """As `fitting`, waited for."""
    steps = iter_until_fit(fit, wanted, seconds, interruption)
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            found: T = ended.value
            return found


class WaitTimeout:
    """How long to wait for what the cluster may have no room for; says that it waits."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._said = 0.0

    def check(self, waited: float, what: str) -> None:
        """Called often while nothing comes; raises RunFailed when it has taken too long."""
        if waited > self._seconds:
            raise RunFailed(
                f"nothing has come for {waited:.0f} s (scale.resource_timeout_s) of {what}; "
                f"{_describe_capacity()}"
            )
        if waited > LOG_WAIT_AFTER_SECONDS and time.monotonic() - self._said > LOG_INTERVAL_SECONDS:
            self._said = time.monotonic()
            tell(
                "waiting",
                f"for {what}, {waited:.0f} of at most {self._seconds:.0f} s; "
                f"{_describe_capacity()}",
            )


def _describe_capacity() -> str:
    there, free = list_nodes(), ray.available_resources()
    return (
        f"the cluster has {len(there)} machines with {sum(node.cpus for node in there):g} CPUs and "
        f"{sum(node.gpus for node in there):g} GPUs, of which {free.get('CPU', 0):g} and "
        f"{free.get('GPU', 0):g} are free"
    )
