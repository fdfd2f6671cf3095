"""Where the stages of labelling go: decided by arithmetic from what the cluster has, with reasons.

A pure function of the resources, so that every layout is planned and tested without its hardware.
Promises that the layout fits before anything starts: Ray would wait for ever for a CPU that its own
actors hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from imgcls.cluster.session import Node
from imgcls.config import Section, UnitFloat
from imgcls.errors import ResourcesError

PlacementName = Literal["cpu", "gpu", "gpu_decode"]

ROLLUP_TASK_CPUS = 0.05
"""CPU share of a roll-up task: it must start however busy the workers are."""
WORKER_CPUS = 0.9
"""CPU share of a one-core worker, so that ten of them leave a core for Ray's tasks."""
MIN_ROWS_PER_WORKER = 128
"""To start a worker costs a core 4 s: fewer rows are done sooner by those that are there."""
GPU_WORKER_CPUS = 0.5
"""CPU share of a worker that feeds a GPU; it must be free on the GPU's own machine."""
PREFETCH_STORE_FRACTION = 0.5
"""Share of the object store that decoded images may take: Ray starts to spill at 0.8."""
STORED_CHUNKS_PER_TASK = 5
"""Chunks that a decoding task may have in the object store: four finished, and one to come."""
GPU_TIME_SAVED = 0.5
"""Share of the time that GPUs save at least where there were none: most of it is forward passes."""
MAX_STORAGE_WAITS = 3
"""So often a worker may wait for a store before it has an image done: to see whether the chunk is
there, for its rows, and for the image."""
JPEG_ENGINE_GPUS = ("A100", "A30", "H100", "H200", "B200", "GB200")
"""Accelerators, as Ray names them, with a JPEG decode engine."""


class ScaleConfig(Section):
    """How many workers, and where."""

    layout: Literal["auto", "cpu", "gpu", "gpu_decode"] = "auto"
    """cpu: every stage in one worker per core. gpu: CPUs decode for GPUs. gpu_decode: GPUs do."""
    workers: PositiveInt | None = None
    """Model workers; one per core, or one per GPU, when not given."""
    io_concurrency: PositiveInt = 16
    """Reads under way per worker."""
    batch_size: PositiveInt | None = None
    """Images per forward pass; 32 on CPUs, measured on GPUs, or 128 for a short run."""
    cpu_decode_fraction: UnitFloat | None = None
    """Share of the images that CPUs decode where GPUs do too; measured, or 0 for a short run."""
    crash_retries: NonNegativeInt = 1
    """Workers that a chunk may kill, beside the first, before its images are tried one by one."""
    worker_timeout_s: PositiveFloat = 600.0
    """A worker that has done no image for so long is ended, and another takes its place.

    With a store, more than three times storage.retry_timeout_s: waiting for it is no hanging.
    """
    resource_timeout_s: PositiveFloat = 1800.0
    """To wait for machines or workers at most."""


@dataclass(frozen=True)
class Placement:
    """A layout that fits.

    workers:        model workers (Ray actors), each with worker_cpus and worker_gpus
    decoders:       tasks that may decode (gpu) or fetch (gpu_decode) at a time, one CPU share each
    threads:        compute threads of a model worker
    host_share:     share of the chunks whose images are decoded on CPUs
    """

    name: PlacementName
    workers: int
    worker_cpus: float
    worker_gpus: float
    prepare_tasks: int
    threads: int
    batch_size: int
    cpu_decode_fraction: float
    reasons: tuple[str, ...]

    def limit_to_rows(self, rows: int) -> Placement:
        """The layout with no more workers than have something to do while another one starts."""
        return replace(
            self, workers=min(self.workers, max(1, math.ceil(rows / MIN_ROWS_PER_WORKER)))
        )

    def limit_readers(self, most: int) -> Placement:
        """The layout with no more processes that read images than `most`."""
        if self.worker_gpus:
            return replace(self, prepare_tasks=min(self.prepare_tasks, most))
        return replace(self, workers=min(self.workers, most))

    @property
    def num_readers(self) -> int:
        """Processes that read images at a time."""
        return self.prepare_tasks if self.worker_gpus else self.workers

    @property
    def summary(self) -> str:
        """How large it is, as people read it."""
        if not self.worker_gpus:
            return f"{self.workers} workers"
        return f"{self.workers} GPU workers and {self.prepare_tasks} tasks for them"

    def compute_time_saved(self, other: Placement) -> float:
        """Share of the other layout's time that this one is taken to save; 0 when it is no larger.

        One with GPUs is larger than one without; of those with, what has more model workers, and
        of as many, what has more tasks that decode for them.
        """
        if bool(self.worker_gpus) != bool(other.worker_gpus):
            return GPU_TIME_SAVED if self.worker_gpus else 0.0
        if self.workers != other.workers:
            return max(0.0, 1 - other.workers / self.workers)
        return max(0.0, 1 - other.prepare_tasks / self.prepare_tasks) if self.prepare_tasks else 0.0


def plan_placement(nodes: Sequence[Node], config: ScaleConfig, chunk_bytes: int = 0) -> Placement:
    """Choose and size a layout for a cluster.

    chunk_bytes: of a chunk's pixels, on their way from CPUs to GPUs
    Raises ResourcesError, with the arithmetic, when what was asked for does not fit.
    """
    cpus = sum(node.cpus for node in nodes)
    gpus = sum(math.floor(node.gpus) for node in nodes)
    if not any(node.cpus >= 1 for node in nodes):
        raise ResourcesError(
            f"the cluster has {cpus:g} CPUs; labelling needs at least 1, on one machine: start Ray "
            "with --num-cpus, or add a worker node"
        )
    name, why = _choose_placement(nodes, config, cpus, gpus)
    if name == "cpu":
        return _plan_cpu(nodes, config, why)
    return _plan_gpu(name, nodes, config, gpus, why, chunk_bytes)


def compute_first_bundles(
    most: Sequence[Node] | None, config: ScaleConfig, chunk_bytes: int
) -> list[dict[str, float]]:
    """What to ask an autoscaler for when nothing fits: the least that a layout can begin with.

    most: the machines that may come; None where that is not known
    """
    gpus = config.layout in ("gpu", "gpu_decode")
    if most is not None:
        gpus = plan_placement(most, config, chunk_bytes).worker_gpus > 0
    if not gpus:
        return [{"CPU": 1.0}] * (config.workers or 1)
    return [{"CPU": GPU_WORKER_CPUS, "GPU": 1.0}] * (config.workers or 1) + [{"CPU": 1.0}]


def select_nodes(
    most: Sequence[Node], config: ScaleConfig, chunk_bytes: int, rows: int
) -> list[Node]:
    """Of the machines that may come those that a layout over all of them takes for so many rows.

    Raises ResourcesError when not even all of them hold what was asked for.
    """
    layout = plan_placement(most, config, chunk_bytes)
    workers = config.workers or layout.limit_to_rows(rows).workers
    cores = workers
    if layout.worker_gpus:
        cores = min(layout.prepare_tasks, max(1, math.ceil(rows / MIN_ROWS_PER_WORKER)))
    taken = []
    by_need = sorted(most, key=lambda node: -node.gpus if layout.worker_gpus else node.gpus)
    for node in by_need:
        slots = math.floor(node.gpus) if layout.worker_gpus else 0
        if workers > 0 if slots else cores > 0:
            taken.append(node)
            workers -= slots
            cores -= math.floor(node.cpus - slots * GPU_WORKER_CPUS)
    return taken


def _choose_placement(
    nodes: Sequence[Node], config: ScaleConfig, cpus: float, gpus: int
) -> tuple[PlacementName, str]:
    if config.layout != "auto":
        if config.layout != "cpu" and gpus < 1:
            raise ResourcesError(
                f"scale.layout {config.layout} needs a GPU, the cluster has {gpus}; say "
                "--scale.layout cpu, or add a GPU node"
            )
        return config.layout, f"{config.layout} layout, as asked"
    if gpus < 1:
        return "cpu", f"no GPU among {cpus:g} CPUs: every stage in one worker per core"
    engines = all(node.accelerator in JPEG_ENGINE_GPUS for node in nodes if node.gpus)
    if engines and cpus / gpus < 24:
        return "gpu_decode", (
            f"{gpus} GPUs with JPEG engines and only {cpus / gpus:.0f} CPUs each: GPUs decode"
        )
    return "gpu", f"{gpus} GPUs, {cpus / gpus:.0f} CPUs each: CPUs decode for GPUs"


def _plan_cpu(nodes: Sequence[Node], config: ScaleConfig, why: str) -> Placement:
    cores = sum(math.floor(node.cpus) for node in nodes)
    workers = config.workers or cores
    if workers > cores:
        raise ResourcesError(
            f"scale.workers {workers}: each takes a core, and the cluster has {cores} whole ones; "
            f"give at most {cores}"
        )
    return Placement(
        name="cpu",
        workers=workers,
        worker_cpus=WORKER_CPUS,
        worker_gpus=0,
        prepare_tasks=0,
        threads=1,
        batch_size=config.batch_size or 32,
        cpu_decode_fraction=1.0,
        reasons=(
            why,
            f"{workers} workers x {WORKER_CPUS:g} CPU leave "
            f"{sum(n.cpus for n in nodes) - workers * WORKER_CPUS:.1f} for Ray's own tasks",
        ),
    )


def _plan_gpu(
    name: PlacementName,
    nodes: Sequence[Node],
    config: ScaleConfig,
    gpus: int,
    why: str,
    chunk_bytes: int,
) -> Placement:
    slots = [min(math.floor(n.gpus), math.floor(n.cpus / GPU_WORKER_CPUS)) for n in nodes]
    workers = config.workers or sum(slots)
    if workers > gpus:
        raise ResourcesError(
            f"scale.workers {workers}: each takes a GPU, and the cluster has {gpus}; give at "
            f"most {gpus}"
        )
    if workers > sum(slots) or workers < 1:
        raise ResourcesError(
            f"{max(workers, 1)} GPU workers x {GPU_WORKER_CPUS:g} CPU: the machines with GPUs have "
            f"CPUs for {sum(slots)}; add CPUs there, give fewer scale.workers, or say "
            "--scale.layout cpu"
        )
    # Ray may put the workers on any machine that has room: count on what each has left at worst.
    left = [
        node.cpus - min(slot, workers) * GPU_WORKER_CPUS
        for node, slot in zip(nodes, slots, strict=True)
    ]
    places = [max(0, math.floor((room - ROLLUP_TASK_CPUS) / WORKER_CPUS)) for room in left]
    if sum(places) < 1:
        raise ResourcesError(
            f"{workers} GPU workers x {GPU_WORKER_CPUS:g} CPU leave at most {max(left):g} of "
            f"{sum(n.cpus for n in nodes):g} CPUs on one machine, and fetching needs "
            f"{WORKER_CPUS + ROLLUP_TASK_CPUS:g}: add CPUs, give fewer scale.workers, or say "
            "--scale.layout cpu"
        )
    decoders, storing = _limit_by_object_store(nodes, places, chunk_bytes)
    doing = (
        "fetch" if name == "gpu_decode" and not config.cpu_decode_fraction else "fetch and decode"
    )
    idle = gpus - workers if config.workers is None else 0
    return Placement(
        name=name,
        workers=workers,
        worker_cpus=GPU_WORKER_CPUS,
        worker_gpus=1,
        prepare_tasks=decoders,
        threads=1,
        batch_size=config.batch_size or 128,
        cpu_decode_fraction=(config.cpu_decode_fraction or 0.0) if name == "gpu_decode" else 1.0,
        reasons=(
            why,
            f"{workers} model workers on GPUs, up to {decoders} tasks that {doing} on CPUs",
            *([storing] if storing else []),
            *([f"{idle} GPUs stay idle for want of CPUs beside them"] if idle else []),
        ),
    )


def _limit_by_object_store(
    nodes: Sequence[Node], places: Sequence[int], chunk_bytes: int
) -> tuple[int, str]:
    """Decoding tasks whose pixels the object stores hold, and how that was reckoned.

    Ray shares tasks out by CPUs, and a task's pixels lie where it runs: so the machine with the
    least store for its CPUs says which share of all places may be taken.

    places: of tasks on each machine
    """
    each = STORED_CHUNKS_PER_TASK * chunk_bytes
    rooms = [
        (PREFETCH_STORE_FRACTION * node.object_store_bytes, count)
        for node, count in zip(nodes, places, strict=True)
        if count
    ]
    if not each or any(math.isinf(room) for room, _ in rooms):
        return sum(places), ""
    largest = max(room for room, _ in rooms)
    if largest < each:
        raise ResourcesError(
            f"a task that decodes has up to {STORED_CHUNKS_PER_TASK} chunks of "
            f"{chunk_bytes / 1e6:,.0f} MB "
            f"in the object store, of which {largest / 1e6:,.0f} MB may be used: give a smaller "
            "--chunk-rows, or start Ray with a larger --object-store-memory"
        )
    room, count = min(rooms, key=lambda machine: machine[0] / machine[1])
    share = min(1.0, room / each / count)
    fit = max(1, math.floor(share * sum(places) + 1e-6))
    reckoned = (
        f"{fit} x {STORED_CHUNKS_PER_TASK} chunks of {chunk_bytes / 1e6:,.0f} MB take "
        f"{fit * each / 1e9:.1f} of the {sum(room for room, _ in rooms) / 1e9:.1f} GB of object "
        "store that they may"
    )
    if share < 1 and len(rooms) > 1:
        reckoned += f"; a machine with {room / 1e9:.1f} GB for {count} such tasks sets the limit"
    return fit, reckoned
