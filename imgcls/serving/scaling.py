"""How many replicas there are, and what each may use: arithmetic before anything starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from imgcls.cluster.session import Node
from imgcls.errors import ResourcesError
from imgcls.serving.config import ReplicaConfig

MAX_DEFAULT_REPLICAS = 8
"""Replicas on a machine with many cores; more of them per replica instead."""


@dataclass(frozen=True)
class ReplicaPlan:
    """What Ray Serve is asked for.

    cpus, gpus: of each, reserved with Ray
    threads:    for decoding, and as many for the network on a CPU
    """

    min_replicas: int
    max_replicas: int
    cpus: float
    gpus: float
    threads: int
    reason: str


def plan_replicas(nodes: Sequence[Node], config: ReplicaConfig, *, may_grow: bool) -> ReplicaPlan:
    """Lay out replicas over machines.

    may_grow: an autoscaler may bring more machines than there are
    Raises ResourcesError, with the arithmetic, when `config.least` cannot be held.
    """
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    if gpus:
        least = config.min_replicas or math.floor(gpus)
        each = config.cpus or max(0.5, math.floor(cpus / max(gpus, least)))
        gpus_each, reason = 1.0, f"{gpus:g} GPUs: a replica for each"
        fit = min(math.floor(gpus), math.floor(cpus / each + 1e-6))
    else:
        least = config.min_replicas or max(1, min(MAX_DEFAULT_REPLICAS, math.floor(cpus)))
        each = config.cpus or max(1.0, float(math.floor(cpus / least)))
        gpus_each, reason = 0.0, f"no GPU among {cpus:g} CPUs"
        fit = sum(math.floor(node.cpus / each + 1e-6) for node in nodes)
    if least > fit and not may_grow:
        takes = f"{each:g} CPUs" + (" and a GPU" if gpus else "")
        there = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ResourcesError(
            f"replicas.min_replicas {least}: each takes {takes}, and of {there} {fit} fit; "
            "give fewer, "
            "or fewer replicas.cpus"
        )
    most = max(least, config.max_replicas or least)
    threads = max(1, math.floor(each))
    count = f"{least}" if most == least else f"{least} to {most}"
    return ReplicaPlan(
        least, most, each, gpus_each, threads, f"{reason}; {count} replicas, each with {each:g}"
    )
