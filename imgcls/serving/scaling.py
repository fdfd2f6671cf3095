"""Planning of replicas: their number and resources, computed before anything starts."""

from __future__ import annotations

import math
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


def plan_replicas(nodes: Sequence[Node], config: ReplicaConfig, *, may_grow: bool) -> ReplicaPlan:
    """Compute the number of replicas and their resources from the nodes of the cluster.

    may_grow: whether an autoscaler may add nodes
    Raises ResourcesError when `config.min_replicas` do not fit.
    """
    cpus, gpus = sum(node.cpus for node in nodes), sum(math.floor(node.gpus) for node in nodes)
    if gpus:
        min_replicas = config.min_replicas or gpus
        with_gpus = [(node.cpus, math.floor(node.gpus)) for node in nodes if node.gpus >= 1]
        # a replica's CPUs must be on the node of its GPU, whichever that is
        smallest_share = min(node_cpus // node_gpus for node_cpus, node_gpus in with_gpus)
        cpus_each = config.cpus or max(0.5, smallest_share)
        gpus_each, reason = 1.0, f"{gpus:g} GPUs, one replica per GPU"
        fit = sum(
            min(node_gpus, math.floor(node_cpus / cpus_each + 1e-6))
            for node_cpus, node_gpus in with_gpus
        )
    else:
        min_replicas = config.min_replicas or max(1, min(MAX_DEFAULT_REPLICAS, math.floor(cpus)))
        cpus_each = config.cpus or max(1.0, float(math.floor(cpus / min_replicas)))
        gpus_each, reason = 0.0, f"{cpus:g} CPUs, no GPU"
        fit = sum(math.floor(node.cpus / cpus_each + 1e-6) for node in nodes)
    if min_replicas > fit and not may_grow:
        needs = f"{cpus_each:g} CPUs" + (" and 1 GPU" if gpus else "")
        available = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ResourcesError(
            f"replicas.min_replicas {min_replicas}: each replica needs {needs}; only {fit} fit in "
            f"the cluster's {available}. Lower replicas.min_replicas or replicas.cpus"
        )
    max_replicas = max(min_replicas, config.max_replicas or min_replicas)
    count = f"{min_replicas}" if max_replicas == min_replicas else f"{min_replicas}-{max_replicas}"
    return ReplicaPlan(
        min_replicas,
        max_replicas,
        cpus_each,
        gpus_each,
        max(1, math.floor(cpus_each)),
        f"{reason}: {count} replicas, CPUs per replica: {cpus_each:g}",
    )
