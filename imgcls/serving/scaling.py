"""Planning of replicas: their number and resources, computed before anything starts."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from imgcls.cluster.session import DeviceType, Node
from imgcls.errors import ResourcesError
from imgcls.serving.config import ReplicaConfig

MAX_DEFAULT_REPLICAS = 8
"""Default limit of the replicas on CPUs; with more CPUs each replica gets more of them."""


@dataclass(frozen=True)
class ReplicaPlan:
    """Number of replicas and the resources of each.

    cpus, gpus: per replica, reserved with Ray
    threads:    per replica, for decoding; on a CPU as many again for the forward pass
    reason:     one line for the log
    """

    min_replicas: int
    max_replicas: int
    cpus: float
    gpus: float
    threads: int
    reason: str

    @property
    def device(self) -> DeviceType:
        """The type of device of a replica: one without a GPU of its own must not use any."""
        return "cuda" if self.gpus else "cpu"


def plan_replicas(
    nodes: Sequence[Node], config: ReplicaConfig, *, max_nodes: Sequence[Node] | None
) -> ReplicaPlan:
    """Compute the number of replicas and their resources from the nodes of the cluster.

    max_nodes: the nodes that an autoscaler may grow the cluster to; None without one
    Raises ResourcesError when `config.min_replicas` do not fit, or when no node, also of those that
    may join, is large enough for one of them.
    """
    cpus, gpus = sum(node.cpus for node in nodes), sum(math.floor(node.gpus) for node in nodes)
    default = gpus or max(1, min(MAX_DEFAULT_REPLICAS, math.floor(cpus)))
    min_replicas = config.min_replicas or min(default, config.max_replicas or default)
    if gpus:
        with_gpus = [node for node in nodes if node.gpus >= 1]
        # a replica's CPUs must be on the node of its GPU, whichever that is
        smallest_share = min(node.cpus // math.floor(node.gpus) for node in with_gpus)
        cpus_each = config.cpus or max(0.5, smallest_share)
        gpus_each, reason = 1.0, f"{gpus:g} GPUs, one replica per GPU"
    else:
        most = config.max_replicas or min_replicas
        cpus_each = (
            config.cpus
            # without an autoscaler, the maximum has room only on the nodes at hand
            or (_share_cpus(nodes, most) if max_nodes is None else None)
            or _share_cpus(nodes, min_replicas)
            or _share_cpus(max_nodes or [], min_replicas)
            or 1.0
        )
        gpus_each, reason = 0.0, f"{cpus:g} CPUs, no GPU"
    problem = _find_misfit(nodes, config, max_nodes, min_replicas, cpus_each, gpus_each)
    if problem is not None:
        raise ResourcesError(problem)
    max_replicas = max(min_replicas, config.max_replicas or min_replicas)
    count = f"{min_replicas}" if max_replicas == min_replicas else f"{min_replicas}-{max_replicas}"
    fitting = _count_fitting(nodes, cpus_each, gpus_each)
    limit = f" (only {fitting} fit)" if max_nodes is None and fitting < max_replicas else ""
    return ReplicaPlan(
        min_replicas,
        max_replicas,
        cpus_each,
        gpus_each,
        max(1, math.floor(cpus_each)),
        f"{reason}: {count} replicas{limit}, CPUs per replica: {cpus_each:g}",
    )


def _share_cpus(nodes: Sequence[Node], replicas: int) -> float | None:
    """The largest whole number of CPUs with which the replicas fit; None when they do not fit.

    A replica's CPUs are on one node, so the CPUs of all nodes together do not count.
    """
    largest = math.floor(max((node.cpus for node in nodes), default=0))
    for cpus in range(largest, 0, -1):
        if _count_fitting(nodes, cpus, 0) >= replicas:
            return float(cpus)
    return None


def _count_fitting(nodes: Sequence[Node], cpus: float, gpus: float) -> int:
    """How many replicas fit on the nodes."""
    return sum(
        min(
            math.floor(node.cpus / cpus + 1e-6),
            math.floor(node.gpus / gpus) if gpus else sys.maxsize,
        )
        for node in nodes
    )


def _find_misfit(
    nodes: Sequence[Node],
    config: ReplicaConfig,
    max_nodes: Sequence[Node] | None,
    min_replicas: int,
    cpus: float,
    gpus: float,
) -> str | None:
    """Why the replicas do not fit, with the remedy; None when they fit or nodes may join."""
    fitting = _count_fitting(nodes, cpus, gpus)
    possible = [*nodes, *(max_nodes or [])]
    is_too_large = not _count_fitting(possible, cpus, gpus)
    # the types of nodes that may join can be unknown
    if min_replicas <= fitting or (max_nodes is not None and not (max_nodes and is_too_large)):
        return None
    needs = f"{cpus:g} CPUs" + (" and 1 GPU" if gpus else "")
    available = f"{sum(node.cpus for node in nodes):g} CPUs"
    if gpus:
        available += f" and {sum(math.floor(node.gpus) for node in nodes)} GPUs"
    largest = max((node.cpus for node in possible if node.gpus >= gpus), default=0)
    if is_too_large and largest:
        kind = "node with a GPU" if gpus else "node"
        available += f"; the largest {kind} has {largest:g} CPUs"
        remedy = f"Set replicas.cpus to {largest:g} or less"
    elif not largest:
        remedy = "Add nodes with CPUs to the cluster"
    elif config.cpus is not None:
        remedy = "Lower replicas.min_replicas or replicas.cpus"
    else:
        remedy = "Lower replicas.min_replicas, or add nodes to the cluster"
    return (
        f"replicas.min_replicas {min_replicas}: each replica needs {needs}; only {fitting} fit in "
        f"the cluster's {available}. {remedy}"
    )
