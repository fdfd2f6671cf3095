"""Placement of a job's stages on the cluster: computed from its nodes, with the reasons.

A pure function of the resources, so that every placement is planned and tested without its
hardware. A placement that is returned fits: Ray would wait forever for a CPU that its own actors
hold.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from imgcls.cluster.session import JPEG_ENGINE_GPUS, DeviceType, Node, build_malloc_env
from imgcls.errors import ResourcesError
from imgcls.execution.config import ScaleConfig
from imgcls.execution.worker import Job, run_first_stage
from imgcls.formatting import format_count

if TYPE_CHECKING:
    from ray.data import Dataset

    from imgcls.execution.messages import RunSpec

PlacementName = Literal["cpu", "gpu", "gpu_decode"]

ROLLUP_TASK_CPUS = 0.05
"""CPUs of a roll-up task: it must be able to start while all workers are busy."""
WORKER_CPUS = 0.9
"""CPUs of a one-core worker, so that ten of them leave a core for Ray's own tasks."""
MIN_ROWS_PER_WORKER = 128
"""Starting a worker costs a core 4 s: running workers finish fewer rows sooner."""
GPU_WORKER_CPUS = 0.5
"""CPUs of a worker that feeds a GPU; they must be free on the GPU's own node."""
CHUNKS_PER_GPU_WORKER = 2
"""Concurrent chunks of a GPU worker: one is decoded or written while the other is classified."""
PREFETCH_STORE_FRACTION = 0.5
"""Fraction of the object store for prepared chunks. Ray starts to spill at 0.8."""
STORED_CHUNKS_PER_TASK = 5
"""Chunks of one preparing task in the object store: four finished, and the one in progress."""
GPU_TIME_SAVED = 0.5
"""Minimum fraction of the time that the first GPUs save: most of it is forward passes."""
MAX_STORAGE_WAITS = 3
"""Waits for storage before a worker's first row: whether the chunk exists, its manifest rows, the
first file."""


@dataclass(frozen=True)
class Placement(abc.ABC):
    """A placement that fits; each layout is a subclass that owns its stages.

    workers:             model workers (Ray actors), each with worker_cpus and worker_gpus
    prepare_tasks:       maximum number of concurrent first-stage tasks, WORKER_CPUS each
    threads:             compute threads of a model worker
    cpu_decode_fraction: fraction of the chunks whose images CPUs decode
    """

    workers: int
    worker_cpus: float
    worker_gpus: float
    prepare_tasks: int
    threads: int
    batch_size: int
    cpu_decode_fraction: float
    reasons: tuple[str, ...]

    name: ClassVar[PlacementName]
    max_buffered_results: ClassVar[int]
    """Results by which a stage may be ahead of the driver, which reads them ten times a second. At
    Ray Data's default of 2 a worker is limited to 2,400 images/s."""
    min_benchmark_rows: ClassVar[int]
    """Rows per worker from which a benchmark of half a minute pays."""

    @abc.abstractmethod
    def add_stages(self, dataset: Dataset, job: Job, spec: RunSpec) -> Dataset:
        """Append the stages of a job to a dataset of pickled chunk tasks."""

    @property
    def device(self) -> DeviceType:
        """The type of device of a worker: workers without a GPU of their own must not use any."""
        return "cuda" if self.worker_gpus else "cpu"

    @property
    @abc.abstractmethod
    def num_readers(self) -> int:
        """Number of processes that read images at a time."""

    @property
    @abc.abstractmethod
    def summary(self) -> str:
        """Its size for the log."""

    @abc.abstractmethod
    def limit_readers(self, max_readers: int) -> Placement:
        """The placement with at most `max_readers` processes that read images."""

    @abc.abstractmethod
    def compute_time_saved(self, other: Placement) -> float:
        """Fraction of the other placement's time that this one should save; 0 if not larger."""

    def with_cpu_decode_fraction(self, fraction: float) -> Placement:
        """The placement in which CPUs decode a fraction of the chunks; unchanged without GPUs."""
        return self

    def limit_to_rows(self, rows: int) -> Placement:
        """The placement without workers that would have nothing to do once they have started."""
        return replace(
            self, workers=min(self.workers, max(1, math.ceil(rows / MIN_ROWS_PER_WORKER)))
        )

    def _actor_options(self, spec: RunSpec, concurrent_chunks: int) -> dict[str, Any]:
        import ray.data  # half a second, only where there is work

        pool = ray.data.ActorPoolStrategy(
            size=self.workers,
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=concurrent_chunks,
            enable_true_multi_threading=concurrent_chunks > 1,
        )
        return {
            "compute": pool,
            "batch_size": 1,
            "batch_format": "pyarrow",
            "num_cpus": self.worker_cpus,
            "num_gpus": self.worker_gpus or None,
            "fn_constructor_args": (spec, self.threads, self.device),
        }


class CpuPlacement(Placement):
    """`cpu`: one worker per core runs every stage of a chunk."""

    name: ClassVar[PlacementName] = "cpu"
    max_buffered_results: ClassVar[int] = 256  # a result takes some hundred bytes
    min_benchmark_rows: ClassVar[int] = 20_000

    def add_stages(self, dataset: Dataset, job: Job, spec: RunSpec) -> Dataset:
        """Append the only stage."""
        options = self._actor_options(spec, concurrent_chunks=1)
        return dataset.map_batches(job.worker, **options, runtime_env=build_malloc_env() or None)

    @property
    def num_readers(self) -> int:
        """The workers."""
        return self.workers

    @property
    def summary(self) -> str:
        """The number of workers."""
        return format_count(self.workers, "worker")

    def limit_readers(self, max_readers: int) -> Placement:
        """Fewer workers."""
        return replace(self, workers=min(self.workers, max_readers))

    def compute_time_saved(self, other: Placement) -> float:
        """By the number of workers; 0 compared with GPUs."""
        if other.worker_gpus:
            return 0.0
        return max(0.0, 1 - other.workers / self.workers)


class GpuPlacement(Placement):
    """`gpu`: tasks on CPUs fetch and decode, one worker per GPU classifies."""

    name: ClassVar[PlacementName] = "gpu"
    max_buffered_results: ClassVar[int] = 4  # a result of the first stage holds a chunk's pixels
    min_benchmark_rows: ClassVar[int] = 200_000

    def add_stages(self, dataset: Dataset, job: Job, spec: RunSpec) -> Dataset:
        """Append the first stage, as tasks, and the second one, as actors."""
        import ray.data

        assert job.prepare is not None
        assert job.gpu_worker is not None
        first_stage: Any = run_first_stage
        prepared = dataset.map_batches(
            first_stage,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=WORKER_CPUS,
            fn_args=(job.prepare, spec, self.cpu_decode_fraction),
            compute=ray.data.TaskPoolStrategy(size=self.prepare_tasks),
        )
        options = self._actor_options(spec, CHUNKS_PER_GPU_WORKER)
        return prepared.map_batches(job.gpu_worker, **options)

    @property
    def num_readers(self) -> int:
        """The tasks of the first stage."""
        return self.prepare_tasks

    @property
    def summary(self) -> str:
        """The numbers of workers and tasks."""
        workers = format_count(self.workers, "GPU worker")
        return f"{workers} with {format_count(self.prepare_tasks, 'CPU task')}"

    def limit_readers(self, max_readers: int) -> Placement:
        """Fewer tasks in the first stage."""
        return replace(self, prepare_tasks=min(self.prepare_tasks, max_readers))

    def compute_time_saved(self, other: Placement) -> float:
        """By the number of workers, then by the number of tasks that decode for them."""
        if not other.worker_gpus:
            return GPU_TIME_SAVED
        if self.workers != other.workers:
            return max(0.0, 1 - other.workers / self.workers)
        return max(0.0, 1 - other.prepare_tasks / self.prepare_tasks)

    def with_cpu_decode_fraction(self, fraction: float) -> Placement:
        """`gpu` where CPUs decode every chunk, else `gpu_decode`."""
        kind = GpuPlacement if fraction == 1 else GpuDecodePlacement
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return kind(**{**values, "cpu_decode_fraction": fraction})


class GpuDecodePlacement(GpuPlacement):
    """`gpu_decode`: tasks on CPUs fetch, and decode a fraction of the chunks; GPUs decode the
    baseline JPEGs of the others.
    """

    name: ClassVar[PlacementName] = "gpu_decode"


_PLACEMENTS: dict[str, type[Placement]] = {
    kind.name: kind for kind in (CpuPlacement, GpuPlacement, GpuDecodePlacement)
}


def plan_placement(
    nodes: Sequence[Node], config: ScaleConfig, chunk_bytes: int = 0, *, use_gpus: bool = True
) -> Placement:
    """Choose and size a placement for a cluster.

    chunk_bytes: size of a prepared chunk on its way from CPUs to GPUs
    use_gpus:    whether the job has stages for GPUs; otherwise the layout is `cpu`
    Raises ResourcesError, with the arithmetic, when what the settings ask for does not fit.
    """
    cpus = sum(node.cpus for node in nodes)
    gpus = sum(math.floor(node.gpus) for node in nodes)
    if not any(node.cpus >= 1 for node in nodes):
        raise ResourcesError(
            f"the cluster has {cpus:g} CPUs; a worker needs at least 1 on one node. Start Ray with "
            "--num-cpus, or add a worker node"
        )
    if use_gpus:
        name, reason = _choose_placement(nodes, config, cpus, gpus)
    else:
        name, reason = "cpu", "this job has no stage for GPUs: every stage in one worker per core"
    if name == "cpu":
        return _plan_cpu(nodes, config, reason)
    return _plan_gpu(_PLACEMENTS[name], nodes, config, gpus, reason, chunk_bytes)


def compute_first_bundles(
    max_nodes: Sequence[Node] | None,
    config: ScaleConfig,
    chunk_bytes: int,
    *,
    use_gpus: bool = True,
) -> list[dict[str, float]]:
    """Resources to request from an autoscaler when nothing fits: the least that can start.

    max_nodes: the nodes that the cluster may grow to; None when that is unknown
    """
    gpus = use_gpus and config.layout in ("gpu", "gpu_decode")
    if max_nodes is not None:
        placement = plan_placement(max_nodes, config, chunk_bytes, use_gpus=use_gpus)
        gpus = placement.worker_gpus > 0
    if not gpus:
        return [{"CPU": 1.0}] * (config.workers or 1)
    return [{"CPU": GPU_WORKER_CPUS, "GPU": 1.0}] * (config.workers or 1) + [{"CPU": 1.0}]


def select_nodes(
    max_nodes: Sequence[Node],
    config: ScaleConfig,
    chunk_bytes: int,
    rows: int,
    *,
    use_gpus: bool = True,
) -> list[Node]:
    """The nodes, of those that the cluster may grow to, that are worth starting for some rows.

    Raises ResourcesError when not even all of them hold what the settings ask for.
    """
    placement = plan_placement(max_nodes, config, chunk_bytes, use_gpus=use_gpus)
    workers = config.workers or placement.limit_to_rows(rows).workers
    cores = workers
    if placement.worker_gpus:
        cores = min(placement.prepare_tasks, max(1, math.ceil(rows / MIN_ROWS_PER_WORKER)))
    selected = []
    by_need = sorted(max_nodes, key=lambda node: -node.gpus if placement.worker_gpus else node.gpus)
    for node in by_need:
        slots = math.floor(node.gpus) if placement.worker_gpus else 0
        if workers > 0 if slots else cores > 0:
            selected.append(node)
            workers -= slots
            cores -= math.floor(node.cpus - slots * GPU_WORKER_CPUS)
    return selected


def _choose_placement(
    nodes: Sequence[Node], config: ScaleConfig, cpus: float, gpus: int
) -> tuple[str, str]:
    if config.layout != "auto":
        if config.layout != "cpu" and gpus < 1:
            raise ResourcesError(
                f"scale.layout {config.layout} needs a GPU, the cluster has {gpus}. Set "
                "--scale.layout cpu, or add a GPU node"
            )
        return config.layout, f"{config.layout} layout, as set by scale.layout"
    if gpus < 1:
        return "cpu", f"no GPU among {cpus:g} CPUs: every stage in one worker per core"
    reason = f"{format_count(gpus, 'GPU')}, {cpus / gpus:.0f} CPUs each: CPUs decode for GPUs"
    if all(node.accelerator in JPEG_ENGINE_GPUS for node in nodes if node.gpus):
        # a driver may lack the engine that the name promises, and its speed depends on the images
        reason += "; their JPEG engines are not measured"
    return "gpu", reason


def _plan_cpu(nodes: Sequence[Node], config: ScaleConfig, reason: str) -> Placement:
    cores = sum(math.floor(node.cpus) for node in nodes)
    workers = config.workers or cores
    if workers > cores:
        raise ResourcesError(
            f"scale.workers {workers}: each worker takes a core, and the cluster has {cores} whole "
            f"ones. Set at most {cores}"
        )
    left = sum(node.cpus for node in nodes) - workers * WORKER_CPUS
    return CpuPlacement(
        workers=workers,
        worker_cpus=WORKER_CPUS,
        worker_gpus=0,
        prepare_tasks=0,
        threads=1,
        batch_size=config.batch_size or 32,
        cpu_decode_fraction=1.0,
        reasons=(
            reason,
            f"{format_count(workers, 'worker')} x {WORKER_CPUS:g} CPU leave {left:.1f} for Ray's "
            "own tasks",
        ),
    )


def _plan_gpu(
    kind: type[Placement],
    nodes: Sequence[Node],
    config: ScaleConfig,
    gpus: int,
    reason: str,
    chunk_bytes: int,
) -> Placement:
    slots = [min(math.floor(n.gpus), math.floor(n.cpus / GPU_WORKER_CPUS)) for n in nodes]
    workers = config.workers or sum(slots)
    _check_gpu_workers(workers, sum(slots), gpus)
    # Ray may place the workers on any node with room: count what each node has left at worst
    left = [
        node.cpus - min(slot, workers) * GPU_WORKER_CPUS
        for node, slot in zip(nodes, slots, strict=True)
    ]
    rooms = [max(0, math.floor((cpus - ROLLUP_TASK_CPUS) / WORKER_CPUS)) for cpus in left]
    if sum(rooms) < 1:
        raise ResourcesError(
            f"{format_count(workers, 'GPU worker')} x {GPU_WORKER_CPUS:g} CPU leave at most "
            f"{max(left):g} of {sum(n.cpus for n in nodes):g} CPUs on one node, and fetching needs "
            f"{WORKER_CPUS + ROLLUP_TASK_CPUS:g}. Add CPUs, set fewer scale.workers, or set "
            "--scale.layout cpu"
        )
    prepare_tasks, store_reason = _limit_by_object_store(nodes, rooms, chunk_bytes)
    idle = gpus - workers if config.workers is None else 0
    return kind(
        workers=workers,
        worker_cpus=GPU_WORKER_CPUS,
        worker_gpus=1,
        prepare_tasks=prepare_tasks,
        threads=1,
        batch_size=config.batch_size or 128,
        cpu_decode_fraction=1.0 if kind is GpuPlacement else config.cpu_decode_fraction or 0.0,
        reasons=(
            reason,
            f"{format_count(workers, 'model worker')} on GPUs, up to "
            f"{format_count(prepare_tasks, 'task')} on CPUs to fetch and decode",
            *([store_reason] if store_reason else []),
            *([f"{format_count(idle, 'GPU')} idle: too few CPUs on their nodes"] if idle else []),
        ),
    )


def _check_gpu_workers(workers: int, slots: int, gpus: int) -> None:
    """Raise ResourcesError where workers lack a GPU, or a GPU's node lacks CPUs."""
    if workers > gpus:
        raise ResourcesError(
            f"scale.workers {workers}: each worker takes a GPU, and the cluster has {gpus}. Set at "
            f"most {gpus}"
        )
    if workers > slots or workers < 1:
        raise ResourcesError(
            f"{max(workers, 1)} GPU workers x {GPU_WORKER_CPUS:g} CPU: the nodes with GPUs have "
            f"CPUs for {slots}. Add CPUs there, set fewer scale.workers, or set --scale.layout cpu"
        )


def _limit_by_object_store(
    nodes: Sequence[Node], rooms: Sequence[int], chunk_bytes: int
) -> tuple[int, str]:
    """Number of first-stage tasks whose output the object stores hold, and how it was computed.

    Ray distributes tasks by CPUs, and a task's output lies where the task runs: the node with the
    smallest store for its CPUs limits the fraction of all tasks.

    rooms: number of tasks that each node has CPUs for
    """
    each = STORED_CHUNKS_PER_TASK * chunk_bytes
    stores = [
        (PREFETCH_STORE_FRACTION * node.object_store_bytes, count)
        for node, count in zip(nodes, rooms, strict=True)
        if count
    ]
    if not each or any(math.isinf(size) for size, _ in stores):
        return sum(rooms), ""
    largest = max(size for size, _ in stores)
    if largest < each:
        raise ResourcesError(
            f"a task that decodes holds up to {STORED_CHUNKS_PER_TASK} chunks of "
            f"{chunk_bytes / 1e6:,.0f} MB in the object store, where it may use "
            f"{largest / 1e6:,.0f} MB. Set a smaller --chunk-rows, start Ray with a larger "
            "--object-store-memory, or set --scale.layout cpu"
        )
    size, count = min(stores, key=lambda store: store[0] / store[1])
    fraction = min(1.0, size / each / count)
    tasks = max(1, math.floor(fraction * sum(rooms) + 1e-6))
    reason = (
        f"{tasks} x {STORED_CHUNKS_PER_TASK} chunks of {chunk_bytes / 1e6:,.0f} MB take "
        f"{tasks * each / 1e9:.1f} of the {sum(size for size, _ in stores) / 1e9:.1f} GB that they "
        "may use of the object store"
    )
    if fraction < 1 and len(stores) > 1:
        reason += f"; a node with {size / 1e9:.1f} GB for {count} such tasks is the limit"
    return tasks, reason
