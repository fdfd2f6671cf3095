"""Whether the cluster can hold the training that was asked for: arithmetic, before anything waits.

Ray would wait without end, and without a word, for a CPU that no machine has.
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
"""Share of an object store that decoded images may fill; beyond it Ray would spill them to disk."""


class TrainScaleConfig(Section):
    """How many workers, and on what."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training workers, who share each batch; [min, max] takes what machines there are."""
    use_gpu: bool | None = None
    """One GPU per worker; if none, whenever there are enough for all."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that each worker reserves; may be a fraction."""
    accumulate: PositiveInt = 1
    """Parts in which a worker takes its share of a batch, where not all fits in memory."""
    sync_batchnorm: bool = False
    """Batch statistics over all workers' images; on GPUs only."""
    compile: bool = False
    """torch.compile the network; pays on long runs."""
    max_failures: NonNegativeInt = 8
    """Times that lost workers are replaced before the run is given up."""
    resource_timeout_s: PositiveFloat = 1800.0
    """To wait for machines or workers at most."""

    @model_validator(mode="after")
    def _check(self) -> TrainScaleConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers {list(self.bounds)}: give the smaller number first")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most workers."""
        wanted = self.num_workers
        return (wanted, wanted) if isinstance(wanted, int) else wanted

    @property
    def min_workers(self) -> int:
        return self.bounds[0]

    @property
    def max_workers(self) -> int:
        return self.bounds[1]


@dataclass(frozen=True)
class WorkerPlan:
    """A group of workers that fits the cluster.

    count: how many there are now; an elastic group may grow up to `most` and shrink to `fewest`
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
    """The workers that were asked for.

    Raises ResourcesError, with the arithmetic, when they do not fit the machines.
    """
    use_gpu = config.use_gpu
    fewest, most = config.bounds
    if use_gpu is None:
        use_gpu = _count_slots(nodes, config.cpus_per_worker, 1) >= fewest
    gpus = 1 if use_gpu else 0
    places = _count_slots(nodes, config.cpus_per_worker, gpus)
    count = max(fewest, min(most, places))
    workers = WorkerPlan(count, config.cpus_per_worker, gpus, fewest, most)
    if config.sync_batchnorm and not gpus:
        raise ResourcesError(
            "scale.sync_batchnorm: PyTorch has it for GPUs only, and these workers have none; "
            "leave it out"
        )
    if places < fewest:
        machines = ", ".join(f"{node.cpus:g} CPU + {node.gpus:g} GPU" for node in nodes) or "none"
        raise ResourcesError(
            f"scale.num_workers {fewest}: {workers} do not fit the machines of the "
            f"cluster ({machines}), which hold {places}; give fewer workers, a smaller "
            "scale.cpus_per_worker, or add machines"
        )
    return workers


def wait_for_worker_plan(config: TrainScaleConfig, interruption: Interruption) -> WorkerPlan:
    """The workers on the machines that are there; waits for machines where more may come.

    Raises ResourcesError as `plan_workers` does, when it will not fit, or did not in
    `scale.resource_timeout_s`.
    """
    return autoscaler.wait_until_fit(
        lambda nodes: plan_workers(nodes, config),
        lambda most: plan_worker_bundles(most, config),
        config.resource_timeout_s,
        interruption,
    )


def plan_worker_bundles(
    most: Sequence[Node] | None, config: TrainScaleConfig
) -> list[dict[str, float]]:
    """What to ask an autoscaler for, by the machines that may come; None: that is not known."""
    count, gpus = config.min_workers, int(config.use_gpu or False)
    if most is not None:
        workers = plan_workers(most, config)
        count, gpus = workers.count, workers.gpus
    each = {"CPU": config.cpus_per_worker} | ({"GPU": float(gpus)} if gpus else {})
    return [each] * count


def fits_object_store(needed: int, capacity: int) -> bool:
    """Whether decoded images may all be kept.

    needed:   bytes of all decoded images
    capacity: bytes of the smallest object store among the machines
    """
    return needed <= MAX_STORE_FRACTION * capacity


def compute_decode_cpus(nodes: Sequence[Node], workers: WorkerPlan) -> float:
    """CPUs that are left to decode in every epoch.

    Raises ResourcesError, with the arithmetic, when less than one is.
    """
    total = sum(node.cpus for node in nodes)
    left = total - workers.count * workers.cpus
    if left < 1:
        raise ResourcesError(
            f"the decoded images do not fit in the object store, so they are decoded in every "
            f"epoch, which takes CPUs: of {total:g} the workers reserve "
            f"{workers.count * workers.cpus:g}; give a scale.cpus_per_worker of at most "
            f"{(total - 1) / workers.count:g}, add machines, or start Ray with a larger "
            "--object-store-memory"
        )
    return left


def count_fitting_trials(nodes: Sequence[Node], workers: WorkerPlan, *, cached: bool) -> int:
    """Trainings that the machines hold beside each other, none waiting for another's CPUs.

    cached: images are decoded before; else each training needs a whole CPU more, to decode
    """
    most = _count_slots(nodes, workers.cpus, workers.gpus) // workers.max_count
    for trials in range(most, 1, -1):
        if cached or _count_spare_cpus(nodes, workers, trials * workers.max_count) >= trials:
            return trials
    return 1


def _count_spare_cpus(nodes: Sequence[Node], workers: WorkerPlan, count: int) -> int:
    """Whole CPUs that are left beside so many workers, one machine filled before the next."""
    spare = 0
    for node in nodes:
        here = min(count, _count_slots([node], workers.cpus, workers.gpus))
        count -= here
        spare += math.floor(node.cpus - here * workers.cpus + 1e-6)
    return spare


def _count_slots(nodes: Sequence[Node], cpus: float, gpus: int) -> int:
    """Workers that the machines hold, each worker whole on one of them."""
    return sum(
        # the tolerance keeps ten times 0.1 CPU on one CPU
        min(math.floor(node.cpus / cpus + 1e-6), math.floor(node.gpus / gpus) if gpus else 2**31)
        for node in nodes
    )
