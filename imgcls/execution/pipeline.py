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
from ray.data._internal.execution.execution_callback import ExecutionCallback

from imgcls.cluster.session import hush_data, keep_memory
from imgcls.data import object_store
from imgcls.errors import BundleError, CrashingImage, RunFailed
from imgcls.execution.heartbeat import STARTS, Attempt, enlist
from imgcls.execution.messages import Done, ExamineSpec, RunSpec, Spent, Work, WorkSpec
from imgcls.execution.placement import WORKER_CPUS, Layout, LayoutName
from imgcls.models.bundle import Bundle, load_bundle, read_description

MAX_BLOCK_CHUNKS = 256
"""Chunks that a worker is handed at a time at most. A block costs the driver 40 KB and 4 ms."""

GPU_CHUNKS = 2
"""Chunks that a GPU worker has in hand: one is decoded or committed while the other is classified.
"""

FILE_BYTES = 512_000_000
"""Files of a chunk, in bytes, that are sent to a GPU at most; CPUs decode a chunk with more."""

AHEAD: dict[LayoutName, int] = {"cpu": MAX_BLOCK_CHUNKS, "gpu": 4, "gpu_decode": 4}
"""Results that a stage may be ahead of the driver, which looks at them ten times a second.

With Ray Data's 2 a worker is held to 2,400 images/s. Where there is no GPU they are receipts of
some hundred bytes; where there is, pixels of a chunk.
"""


class _Begun(ExecutionCallback):
    """Tells a pipeline what executes it, before the first result; Ray Data itself tells it after.

    Ray Data makes it, by its class, so the two find each other by a name in the pipeline's context.
    """

    KEY: ClassVar[str] = "imgcls.pipeline"
    executors: ClassVar[dict[str, Any]] = {}

    def before_execution_starts(self, executor: Any) -> None:
        self.executors[executor._data_context.get_config(self.KEY)] = executor


class Pipeline:
    """Work laid out on the cluster; one that was stopped may be followed by another."""

    def __init__(self, spec: RunSpec, layout: Layout, work: Sequence[Work]) -> None:
        hush_data()
        spec, layout = politely(spec, layout, len(work))
        self._name = secrets.token_hex(8)
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True
        # each chunk's result leaves its worker at once, not when the block that it came in is done
        context.target_max_block_size = 1
        context._max_num_blocks_in_streaming_gen_buffer = AHEAD[layout.name]
        context.execution_no_progress_timeout_s = -1  # how long to wait is said by `scale`
        context.set_config(_Begun.KEY, self._name)
        context.custom_execution_callback_classes.append(_Begun)
        with ray.data.DataContext.current(context):
            dataset = ray.data.from_blocks(blocks_of(work, layout.workers))
            for stage in _stages(spec, layout):
                dataset = stage(dataset)
        self._dataset = dataset

    def receipts(self) -> Iterator[Done]:
        """Do the work; yields each chunk once it is durable, in any order, until it is stopped."""
        try:
            for batch in self._dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                assert isinstance(batch, pa.Table)
                for payload in batch.column("done").to_pylist():
                    yield pickle.loads(payload)
        finally:
            _Begun.executors.pop(self._name, None)

    def stop(self) -> None:
        """Take the workers away, whatever they are at, and have `receipts` come to its end.

        To be called again until it has: without effect in the moment before Ray Data begins.
        """
        executor = _Begun.executors.get(self._name)
        if executor is not None:
            executor.shutdown(force=True)


def politely(spec: RunSpec, layout: Layout, chunks: int) -> tuple[RunSpec, Layout]:
    """What every worker gets, and the layout, so that the limit per host holds for all together.

    Reads from web servers run ahead by twice a worker's share of the limit at most. Time in the
    queue of a host does not count as retry time: with a longer queue, a worker could wait for its
    next image for many retry times where a server does not answer, and would count as hanging.
    """
    if spec.on_web:
        layout = layout.with_readers(spec.storage.host_requests)
    layout = replace(layout, workers=min(layout.workers, chunks))
    spec = replace(spec, storage=spec.storage.shared_by(layout.readers))
    if spec.on_web:
        spec = replace(spec, fetches=min(spec.fetches, 2 * spec.storage.host_requests))
    return spec, layout


def blocks_of(work: Sequence[Work], workers: int) -> list[pa.Table]:
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


def _stages(spec: RunSpec, layout: Layout) -> list[Any]:
    at_a_time = GPU_CHUNKS if layout.worker_gpus else 1
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
        model["runtime_env"] = keep_memory() or None
    if layout.name == "cpu":
        worker = ExamineWorker if isinstance(spec, ExamineSpec) else LabelWorker
        return [lambda dataset: dataset.map_batches(worker, **model)]
    return [
        lambda dataset: dataset.map_batches(
            ready_task,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=WORKER_CPUS,
            fn_args=(spec, layout.host_share),
            compute=ray.data.TaskPoolStrategy(size=layout.decoders),
        ),
        lambda dataset: dataset.map_batches(GpuWorker, **model),
    ]


class _Worker:
    """A process that does chunks; what it is handed differs between the layouts."""

    _precision: str

    def __init__(self, spec: RunSpec, threads: int) -> None:
        import torch

        from imgcls.inference import stages

        enlist(spec.session)
        start = Attempt(spec.session, f"start-{_actor_id()}", "starting a worker")
        if start.deaths >= STARTS:
            raise RunFailed(
                f"{start.deaths} processes in turn died before they had the model, the last on "
                f"{socket.gethostname()}; find out why in Ray's logs there (a signal, no memory "
                "left)"
            )
        object_store.use(spec.storage)
        torch.set_num_threads(threads)
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._stages = stages
        self._spec: Any = spec
        self._load(spec)
        start.end()

    def _load(self, spec: Any) -> None:
        """Have what its chunks need, and `_precision`, what a model of it runs in."""
        raise NotImplementedError

    def _whole(
        self, batch: pa.Table, stage: str, make: Callable[..., pa.Table]
    ) -> dict[str, list[bytes]]:
        """Do a chunk from its rows to its table, unless it is durable already.

        make: of rows, their work and where to count the time, a table; also of one row alone
        """
        work: Work = _only(batch, "work")
        spec, stages, spent = self._spec, self._stages, Spent()
        attempt = Attempt.at(spec, work, stage)
        table = stages.committed(spec, work)
        if table is None:
            rows = stages.rows_of(spec, work)
            for row in attempt.suspects(rows.num_rows):
                make(rows.slice(row, 1), Work(work.chunk), Spent())
            table = make(rows, work, spent, attempt.crashed, attempt.beat)
            stages.commit(spec, work, table, spent)
        return self._done(work, table, spent, attempt)

    def _done(
        self, work: Work, table: pa.Table, spent: Spent, attempt: Attempt, deaths: int = 0
    ) -> dict[str, list[bytes]]:
        """Receipt for a chunk that is durable.

        deaths: workers that it has cost in the stage before
        """
        attempt.end()
        status = collections.Counter(table.column("status").to_pylist())
        done = Done(
            work=work,
            rows=table.num_rows,
            status=dict(status),
            spent=spent,
            precision=self._precision,
            worker=self._name,
            deaths=deaths + attempt.deaths,
        )
        return {"done": [pickle.dumps(done)]}


class _ModelWorker(_Worker):
    """One that labels."""

    def _load(self, spec: WorkSpec) -> None:
        from imgcls.models.classifier import Classifier

        self._classifier = Classifier(
            _bundle(spec.bundle_url, spec.bundle_sha256),
            precision=spec.precision,  # type: ignore[arg-type]
            decode=spec.decode,
            compile=spec.compile,
            batch_size=spec.batch_size,
        )
        self._precision = self._classifier.precision


def _bundle(url: str, sha256: str | None) -> Bundle:
    bundle = load_bundle(url)
    if bundle.sha256 != sha256:
        raise BundleError(
            f"bundle {url}: changed while the run was under way; restore it, or start over with "
            "--overwrite"
        )
    return bundle


class LabelWorker(_ModelWorker):
    """The CPU layout: all stages in one process per core."""

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        label = functools.partial(self._stages.label, self._spec, self._classifier)
        return self._whole(batch, "label", label)


class ExamineWorker(_Worker):
    """Tells what images are like, in one process per core."""

    def _load(self, spec: ExamineSpec) -> None:
        from imgcls.curation import scan_stage
        from imgcls.models.classifier import Classifier

        self._looks = scan_stage
        self._classifier = None
        if spec.bundle_url is not None:
            bundle = _bundle(spec.bundle_url, spec.bundle_sha256)
            self._classifier = Classifier(bundle, decode=spec.decode)
        self._precision = "" if self._classifier is None else self._classifier.precision

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        look = functools.partial(self._looks.look, self._spec, self._classifier)
        return self._whole(batch, "examine", look)


class GpuWorker(_ModelWorker):
    """The layouts with GPUs: pixels come ready from tasks on CPUs, or bytes to decode here."""

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        work, ready, spent, deaths = _only(batch, "ready")
        spec, stages = self._spec, self._stages
        attempt = Attempt.at(spec, work, "classify")
        rows = stages.rows_of(spec, work)
        if isinstance(ready, list):
            for row in attempt.suspects(rows.num_rows):
                stages.prepare_on_device(spec, ready[row : row + 1], self._classifier, Spent())
            blobs = [
                CrashingImage(attempt.crashed[row]) if row in attempt.crashed else blob
                for row, blob in enumerate(ready)
            ]
            ready = stages.prepare_on_device(spec, blobs, self._classifier, spent)
        else:
            attempt.check()
        table = stages.classify_prepared(spec, self._classifier, rows, work, ready, spent)
        stages.commit(spec, work, table, spent)
        return self._done(work, table, spent, attempt, deaths)


def ready_task(batch: pa.Table, spec: WorkSpec, host_share: float) -> dict[str, list[bytes]]:
    """The first half where there are GPUs: fetch a chunk, and decode it unless a GPU is to."""
    from imgcls.inference import stages

    object_store.use(spec.storage)
    work: Work = _only(batch, "work")
    rows, spent = stages.rows_of(spec, work), Spent()
    attempt = Attempt.at(spec, work, "prepare")
    ready: Any = None
    if not is_for_host(work.chunk, host_share):
        ready = _fetched(stages.fetch(spec, rows), attempt)
    if ready is None:
        import torch

        torch.set_num_threads(1)
        preprocess = read_description(spec.bundle_url).with_decode(spec.decode).spec.preprocess
        for row in attempt.suspects(rows.num_rows):
            stages.prepare_all(spec, rows.slice(row, 1), preprocess, Spent())
        ready = stages.prepare_all(spec, rows, preprocess, spent, attempt.crashed, attempt.beat)
    attempt.end()
    return {"ready": [pickle.dumps((work, ready, spent, attempt.deaths), protocol=5)]}


def _fetched(blobs: Iterator[Any], attempt: Attempt) -> list[Any] | None:
    """A chunk's files for a GPU to decode; None where they have more than FILE_BYTES."""
    fetched, size = [], 0
    for blob in blobs:
        size += len(blob) if isinstance(blob, bytes) else 0
        if size > FILE_BYTES:
            return None
        fetched.append(blob)
        attempt.beat()
    return fetched


def is_for_host(chunk: int, share: float) -> bool:
    """Whether this chunk is of the share that CPUs decode: the same every time, evenly spread."""
    return math.floor((chunk + 1) * share) > math.floor(chunk * share)


def _actor_id() -> str:
    return str(ray.get_runtime_context().get_actor_id())


def _only(batch: pa.Table, column: str) -> Any:
    return pickle.loads(batch.column(column)[0].as_py())
