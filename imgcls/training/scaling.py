"""Scaling of a training: the worker group that fits the cluster, computed before Ray starts it.

Ray waits without limit and without a message for CPUs that no node has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from imgcls.cluster import autoscaler
from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import Node
from imgcls.config import Section
from imgcls.errors import ResourcesError

MAX_STORE_FRACTION = 0.8
"""Fraction of the object store that decoded images may fill; beyond it Ray spills to disk."""


class TrainScaleConfig(Section):
    """Training workers and their resources."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of training workers, which share each batch; [min, max] adapts to the cluster."""
    use_gpu: bool | None = None
    """Use one GPU per worker. Default: if the cluster has enough GPUs for all workers."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that each worker reserves; may be a fraction."""
    accumulate: PositiveInt = 1
    """Gradient accumulation: parts into which a worker splits its share of a batch."""
    sync_batchnorm: bool = False
    """Synchronize batch statistics over all workers; only on GPUs."""
    compile: bool = False
    """Compile the network with torch.compile; worth its time only on long runs."""
    deterministic: bool = True
    """Repeat results exactly on GPUs; false: use the fastest convolutions, whose results vary."""
    max_failures: NonNegativeInt = 8
    """Maximum number of times that lost workers are replaced before the run fails."""
    resource_timeout_s: PositiveFloat = 1800.0
    """Maximum wait for nodes or workers, in seconds."""

    @model_validator(mode="after")
    def _check(self) -> TrainScaleConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers {list(self.bounds)}: put the smaller number first")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        count = self.num_workers
        return (count, count) if isinstance(count, int) else count

    @property
    def min_workers(self) -> int:
        return self.bounds[0]

    @property
    def max_workers(self) -> int:
        return self.bounds[1]


@dataclass(frozen=True)
class WorkerPlan:
    """A group of workers that fits the cluster.

    count:                number of workers at the start
    cpus, gpus:           resources of each worker
    min_count, max_count: bounds of an elastic group; equal to count otherwise
    """

    count: int
    cpus: float
    gpus: int
    min_count: int
    max_count: int

    def __str__(self) -> str:
        per = f"{self.cpus:g} CPU" + (f" + {self.gpus} GPU" if self.gpus else "")
        elastic = (
            "" if self.min_count == self.max_count else f", {self.min_count} to {self.max_count}"
        )
        return f"{self.count} x ({per}){elastic}"


def plan_workers(nodes: Sequence[Node], config: TrainScaleConfig) -> WorkerPlan:
    """The worker group for these nodes.

    Raises ResourcesError, with the arithmetic, when it does not fit.
    """
    use_gpu = config.use_gpu
    minimum, maximum = config.bounds
    if use_gpu is None:
        use_gpu = _count_slots(nodes, config.cpus_per_worker, 1) >= minimum
    gpus = 1 if use_gpu else 0
    slots = _count_slots(nodes, config.cpus_per_worker, gpus)
    count = max(minimum, min(maximum, slots))
    workers = WorkerPlan(count, config.cpus_per_worker, gpus, minimum, maximum)
    if config.sync_batchnorm and not gpus:
        raise ResourcesError(
            "scale.sync_batchnorm: PyTorch supports it only on GPUs, and these workers have none. "
            "Set it to false."
        )
    if slots < minimum:
        listed = ", ".join(f"{node.cpus:g} CPU + {node.gpus:g} GPU" for node in nodes) or "none"
        raise ResourcesError(
            f"scale.num_workers {minimum}: {workers} do not fit the nodes of the cluster "
            f"({listed}), which have room for {slots}. Use fewer workers, a smaller "
            "scale.cpus_per_worker, or add nodes."
        )
    return workers


def wait_for_worker_plan(config: TrainScaleConfig, interruption: Interruption) -> WorkerPlan:
    """The worker group for the current nodes; on an autoscaling cluster, waits for nodes.

    Raises ResourcesError when the group cannot fit, or did not within `scale.resource_timeout_s`.
    """
    return autoscaler.wait_until_fit(
        lambda nodes: plan_workers(nodes, config),
        lambda possible: plan_worker_bundles(possible, config),
        config.resource_timeout_s,
        interruption,
    )


def plan_worker_bundles(
    possible: Sequence[Node] | None, config: TrainScaleConfig
) -> list[dict[str, float]]:
    """Resource bundles to request from an autoscaler.

    possible: the nodes that it can provide; None if that is unknown
    """
    count, gpus = config.min_workers, int(config.use_gpu or False)
    if possible is not None:
        workers = plan_workers(possible, config)
        count, gpus = workers.count, workers.gpus
    each = {"CPU": config.cpus_per_worker} | ({"GPU": float(gpus)} if gpus else {})
    return [each] * count


def fits_object_store(needed: int, capacity: int) -> bool:
    """Whether all decoded images fit in the object store.

    needed:   bytes of all decoded images
    capacity: bytes of the smallest object store of a node
    """
    return needed <= MAX_STORE_FRACTION * capacity


def compute_decode_cpus(nodes: Sequence[Node], workers: WorkerPlan) -> float:
    """CPUs that the workers leave for decoding images in every epoch.

    Raises ResourcesError, with the arithmetic, when it is less than one.
    """
    total = sum(node.cpus for node in nodes)
    left = total - workers.count * workers.cpus
    if left < 1:
        raise ResourcesError(
            f"the decoded images do not fit in the object store, so they are decoded in every "
            f"epoch, which needs CPUs: of {total:g} the workers reserve "
            f"{workers.count * workers.cpus:g}. Set scale.cpus_per_worker to at most "
            f"{(total - 1) / workers.count:g}, add nodes, or start Ray with a larger "
            "--object-store-memory."
        )
    return left


def count_fitting_trials(nodes: Sequence[Node], workers: WorkerPlan, *, cached: bool) -> int:
    """Number of trainings that can run at once without waiting for each other's CPUs.

    cached: images are decoded before; otherwise each training needs one more CPU for decoding
    """
    fitting = _count_slots(nodes, workers.cpus, workers.gpus) // workers.max_count
    for trials in range(fitting, 1, -1):
        if cached or _count_spare_cpus(nodes, workers, trials * workers.max_count) >= trials:
            return trials
    return 1


def _count_spare_cpus(nodes: Sequence[Node], workers: WorkerPlan, count: int) -> int:
    """Whole CPUs left by `count` workers, when each node is filled before the next."""
    spare = 0
    for node in nodes:
        here = min(count, _count_slots([node], workers.cpus, workers.gpus))
        count -= here
        spare += math.floor(node.cpus - here * workers.cpus + 1e-6)
    return spare


def _count_slots(nodes: Sequence[Node], cpus: float, gpus: int) -> int:
    """Number of workers that fit, each on one node."""
    return sum(
        # the tolerance lets ten workers of 0.1 CPU fit on one CPU
        min(math.floor(node.cpus / cpus + 1e-6), math.floor(node.gpus / gpus) if gpus else 2**31)
        for node in nodes
    )
