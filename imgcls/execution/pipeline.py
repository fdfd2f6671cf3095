"""The Ray Data pipeline: one dataset row is one chunk of work, and the results are its counts.

Owns the placing of the stages of `chunk` on tasks and actors for each layout. Chunks are durable
before their counts are returned, so a lost worker, task or driver costs at most the chunks that
were under way. The stages, and torch with them, are imported in the workers alone.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import pickle
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pyarrow as pa
import ray
import ray.data

from imgcls.cluster import ray_internals
from imgcls.cluster.session import build_malloc_env, configure_ray_data
from imgcls.data import storage_settings
from imgcls.errors import BundleError, CrashingImage, RunFailed
from imgcls.execution.heartbeat import MAX_WORKER_STARTS, Attempt, register_worker
from imgcls.execution.messages import (
    ChunkResult,
    ChunkTask,
    PredictSpec,
    RunSpec,
    ScanSpec,
    StageTimings,
)
from imgcls.execution.placement import WORKER_CPUS, Placement, PlacementName
from imgcls.models.bundle import Bundle, load_bundle, read_description

MAX_BLOCK_CHUNKS = 256
"""Chunks that a worker is handed at a time at most. A block costs the driver 40 KB and 4 ms."""

CHUNKS_PER_GPU_WORKER = 2
"""Chunks that a GPU worker has in hand: one is decoded or committed while the other is classified.
"""

MAX_TRANSFER_BYTES = 512_000_000
"""Files of a chunk, in bytes, that are sent to a GPU at most; CPUs decode a chunk with more."""

MAX_BUFFERED_RESULTS: dict[PlacementName, int] = {
    "cpu": MAX_BLOCK_CHUNKS,
    "gpu": 4,
    "gpu_decode": 4,
}
"""Results that a stage may be ahead of the driver, which looks at them ten times a second.

With Ray Data's 2 a worker is held to 2,400 images/s. Where there is no GPU they are receipts of
some hundred bytes; where there is, pixels of a chunk.
"""


class _ExecutorRegistry(ray_internals.ExecutionCallback):
    """Tells a pipeline what executes it, before the first result; Ray Data itself tells it after.

    Ray Data makes it, by its class, so the two find each other by a name in the pipeline's context.
    """

    KEY: ClassVar[str] = "imgcls.pipeline"
    executors: ClassVar[dict[str, Any]] = {}

    def before_execution_starts(self, executor: Any) -> None:
        self.executors[ray_internals.get_execution_config(executor, self.KEY)] = executor


class Pipeline:
    """Work laid out on the cluster; one that was stopped may be followed by another."""

    def __init__(self, spec: RunSpec, layout: Placement, work: Sequence[ChunkTask]) -> None:
        configure_ray_data()
        spec, layout = apply_host_limits(spec, layout, len(work))
        self._name = secrets.token_hex(8)
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        # each chunk's result leaves its worker at once, not when the block that it came in is done
        context.target_max_block_size = 1
        ray_internals.limit_result_buffer(context, MAX_BUFFERED_RESULTS[layout.name])
        context.execution_no_progress_timeout_s = -1  # how long to wait is said by `scale`
        context.set_config(_ExecutorRegistry.KEY, self._name)
        context.custom_execution_callback_classes.append(_ExecutorRegistry)
        with ray.data.DataContext.current(context):
            dataset = ray.data.from_blocks(build_blocks(work, layout.workers))
            for stage in _build_stages(spec, layout):
                dataset = stage(dataset)
        self._dataset = dataset

    def run(self) -> Iterator[ChunkResult]:
        """Do the work; yields each chunk once it is durable, in any order, until it is stopped."""
        try:
            for batch in self._dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                assert isinstance(batch, pa.Table)
                for payload in batch.column("done").to_pylist():
                    yield pickle.loads(payload)
        finally:
            _ExecutorRegistry.executors.pop(self._name, None)

    def stop(self) -> None:
        """Take the workers away, whatever they are at, and have `receipts` come to its end.

        To be called again until it has: without effect in the moment before Ray Data begins.
        """
        executor = _ExecutorRegistry.executors.get(self._name)
        if executor is not None:
            executor.shutdown(force=True)


def apply_host_limits(spec: RunSpec, layout: Placement, chunks: int) -> tuple[RunSpec, Placement]:
    """What every worker gets, and the layout, so that the limit per host holds for all together.

    Reads from web servers run ahead by twice a worker's share of the limit at most. Time in the
    queue of a host does not count as retry time: with a longer queue, a worker could wait for its
    next image for many retry times where a server does not answer, and would count as hanging.
    """
    if spec.is_on_web:
        layout = layout.limit_readers(spec.storage.max_requests_per_host)
    layout = replace(layout, workers=min(layout.workers, chunks))
    spec = replace(spec, storage=spec.storage.split_across(layout.num_readers))
    if spec.is_on_web:
        spec = replace(
            spec, io_concurrency=min(spec.io_concurrency, 2 * spec.storage.max_requests_per_host)
        )
    return spec, layout


def build_blocks(work: Sequence[ChunkTask], workers: int) -> list[pa.Table]:
    """Work in blocks that shrink towards the end: few of them, and no worker idle at the last.

    Source: guided self-scheduling, Polychronopoulos and Kuck, IEEE ToC 1987.
    """
    blocks = []
    start = 0
    while start < len(work):
        size = min(MAX_BLOCK_CHUNKS, max(1, (len(work) - start) // (8 * workers)))
        blocks.append(pa.table({"work": [pickle.dumps(w) for w in work[start : start + size]]}))
        start += size
    return blocks


def _build_stages(spec: RunSpec, layout: Placement) -> list[Any]:
    at_a_time = CHUNKS_PER_GPU_WORKER if layout.worker_gpus else 1
    pool = ray.data.ActorPoolStrategy(
        size=layout.workers,
        max_tasks_in_flight_per_actor=2,
        max_concurrent_calls_per_actor=at_a_time,
        enable_true_multi_threading=at_a_time > 1,
    )
    model: dict[str, Any] = {
        "compute": pool,
        "batch_size": 1,
        "batch_format": "pyarrow",
        "num_cpus": layout.worker_cpus,
        "num_gpus": layout.worker_gpus or None,
        "fn_constructor_args": (spec, layout.threads),
    }
    if not layout.worker_gpus:
        model["runtime_env"] = build_malloc_env() or None
    if layout.name == "cpu":
        worker = ScanWorker if isinstance(spec, ScanSpec) else CpuWorker
        return [lambda dataset: dataset.map_batches(worker, **model)]
    return [
        lambda dataset: dataset.map_batches(
            prepare_chunk,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=WORKER_CPUS,
            fn_args=(spec, layout.cpu_decode_fraction),
            compute=ray.data.TaskPoolStrategy(size=layout.prepare_tasks),
        ),
        lambda dataset: dataset.map_batches(GpuWorker, **model),
    ]


class ChunkWorker:
    """A process that does chunks; what it is handed differs between the layouts."""

    _precision: str

    def __init__(self, spec: RunSpec, threads: int) -> None:
        import torch

        from imgcls.inference import stages

        register_worker(spec.session)
        start = Attempt(spec.session, f"start-{_get_actor_id()}", "starting a worker")
        if start.crashes >= MAX_WORKER_STARTS:
            raise RunFailed(
                f"{start.crashes} processes in turn died before they had the model, the last on "
                f"{socket.gethostname()}; find out why in Ray's logs there (a signal, no memory "
                "left)"
            )
        storage_settings.set_process_settings(spec.storage)
        torch.set_num_threads(threads)
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._stages = stages
        self._spec: Any = spec
        self._load(spec)
        start.complete()

    def _load(self, spec: Any) -> None:
        """Have what its chunks need, and `_precision`, what a model of it runs in."""
        raise NotImplementedError

    def _run_chunk(
        self, batch: pa.Table, stage: str, make: Callable[..., pa.Table]
    ) -> dict[str, list[bytes]]:
        """Do a chunk from its rows to its table, unless it is durable already.

        make: of rows, their work and where to count the time, a table; also of one row alone
        """
        work: ChunkTask = _unpickle(batch, "work")
        spec, stages, spent = self._spec, self._stages, StageTimings()
        attempt = Attempt.for_chunk(spec, work, stage)
        table = stages.committed(spec, work)
        if table is None:
            rows = stages.rows_of(spec, work)
            for row in attempt.iter_suspect_rows(rows.num_rows):
                make(rows.slice(row, 1), ChunkTask(work.chunk), StageTimings())
            table = make(rows, work, spent, attempt.crashed_rows, attempt.heartbeat)
            stages.commit(spec, work, table, spent)
        return self._build_result(work, table, spent, attempt)

    def _build_result(
        self,
        work: ChunkTask,
        table: pa.Table,
        spent: StageTimings,
        attempt: Attempt,
        deaths: int = 0,
    ) -> dict[str, list[bytes]]:
        """Receipt for a chunk that is durable.

        deaths: workers that it has cost in the stage before
        """
        attempt.complete()
        status = collections.Counter(table.column("status").to_pylist())
        done = ChunkResult(
            task=work,
            rows=table.num_rows,
            status=dict(status),
            timings=spent,
            precision=self._precision,
            worker=self._name,
            crashes=deaths + attempt.crashes,
        )
        return {"done": [pickle.dumps(done)]}


class ModelWorker(ChunkWorker):
    """One that labels."""

    def _load(self, spec: PredictSpec) -> None:
        from imgcls.models.classifier import Classifier

        self._classifier = Classifier(
            _load_unchanged_bundle(spec.bundle_url, spec.bundle_sha256),
            precision=spec.precision,  # type: ignore[arg-type]
            decode=spec.decode,
            compile=spec.compile,
            batch_size=spec.batch_size,
        )
        self._precision = self._classifier.precision


def _load_unchanged_bundle(url: str, sha256: str | None) -> Bundle:
    bundle = load_bundle(url)
    if bundle.sha256 != sha256:
        raise BundleError(
            f"bundle {url}: changed while the run was under way; restore it, or start over with "
            "--overwrite"
        )
    return bundle


class CpuWorker(ModelWorker):
    """The CPU layout: all stages in one process per core."""

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        label = functools.partial(self._stages.label, self._spec, self._classifier)
        return self._run_chunk(batch, "label", label)


class ScanWorker(ChunkWorker):
    """Tells what images are like, in one process per core."""

    def _load(self, spec: ScanSpec) -> None:
        from imgcls.curation import scan_stage
        from imgcls.models.classifier import Classifier

        self._looks = scan_stage
        self._classifier = None
        if spec.bundle_url is not None:
            bundle = _load_unchanged_bundle(spec.bundle_url, spec.bundle_sha256)
            self._classifier = Classifier(bundle, decode=spec.decode)
        self._precision = "" if self._classifier is None else self._classifier.precision

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        look = functools.partial(self._looks.scan_chunk, self._spec, self._classifier)
        return self._run_chunk(batch, "examine", look)


class GpuWorker(ModelWorker):
    """The layouts with GPUs: pixels come ready from tasks on CPUs, or bytes to decode here."""

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        work, ready, spent, deaths = _unpickle(batch, "ready")
        spec, stages = self._spec, self._stages
        attempt = Attempt.for_chunk(spec, work, "classify")
        rows = stages.rows_of(spec, work)
        if isinstance(ready, list):
            for row in attempt.iter_suspect_rows(rows.num_rows):
                stages.prepare_on_device(
                    spec, ready[row : row + 1], self._classifier, StageTimings()
                )
            blobs = [
                CrashingImage(attempt.crashed_rows[row]) if row in attempt.crashed_rows else blob
                for row, blob in enumerate(ready)
            ]
            ready = stages.prepare_on_device(spec, blobs, self._classifier, spent)
        else:
            attempt.check_crashes()
        table = stages.classify_prepared(spec, self._classifier, rows, work, ready, spent)
        stages.commit(spec, work, table, spent)
        return self._build_result(work, table, spent, attempt, deaths)


def prepare_chunk(batch: pa.Table, spec: PredictSpec, host_share: float) -> dict[str, list[bytes]]:
    """The first half where there are GPUs: fetch a chunk, and decode it unless a GPU is to."""
    from imgcls.inference import stages

    storage_settings.set_process_settings(spec.storage)
    work: ChunkTask = _unpickle(batch, "work")
    rows, spent = stages.read_chunk_rows(spec, work), StageTimings()
    attempt = Attempt.for_chunk(spec, work, "prepare")
    ready: Any = None
    if not is_decoded_on_cpu(work.chunk, host_share):
        ready = _fetch_files(stages.fetch_images(spec, rows), attempt)
    if ready is None:
        import torch

        torch.set_num_threads(1)
        preprocess = read_description(spec.bundle_url).with_decode(spec.decode).spec.preprocess
        for row in attempt.iter_suspect_rows(rows.num_rows):
            stages.prepare_on_cpu(spec, rows.slice(row, 1), preprocess, StageTimings())
        ready = stages.prepare_on_cpu(
            spec, rows, preprocess, spent, attempt.crashed_rows, attempt.heartbeat
        )
    attempt.complete()
    return {"ready": [pickle.dumps((work, ready, spent, attempt.crashes), protocol=5)]}


def _fetch_files(blobs: Iterator[Any], attempt: Attempt) -> list[Any] | None:
    """A chunk's files for a GPU to decode; None where they have more than FILE_BYTES."""
    fetched, size = [], 0
    for blob in blobs:
        size += len(blob) if isinstance(blob, bytes) else 0
        if size > MAX_TRANSFER_BYTES:
            return None
        fetched.append(blob)
        attempt.heartbeat()
    return fetched


def is_decoded_on_cpu(chunk: int, share: float) -> bool:
    """Whether this chunk is of the share that CPUs decode: the same every time, evenly spread."""
    return math.floor((chunk + 1) * share) > math.floor(chunk * share)


def _get_actor_id() -> str:
    return str(ray.get_runtime_context().get_actor_id())


def _unpickle(batch: pa.Table, column: str) -> Any:
    return pickle.loads(batch.column(column)[0].as_py())
