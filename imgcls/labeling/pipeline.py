"""The Ray Data pipeline: one dataset row is one chunk of work, and the results are its counts.

Owns the placing of the stages of `chunk` on tasks and actors for each layout. Chunks are durable
before their counts are returned, so a lost worker, task or driver costs at most the chunks that
were under way. The stages, and torch with them, are imported in the workers alone.
"""

from __future__ import annotations

import math
import os
import pickle
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray.data

from imgcls import output as names
from imgcls.cluster import hush_data, keep_memory
from imgcls.data import stores
from imgcls.errors import BundleError
from imgcls.labeling.layout import WORKER_CPUS, Layout, LayoutName
from imgcls.labeling.work import Done, Seconds, Work, WorkSpec
from imgcls.models.bundle import load_bundle, read_description

MAX_BLOCK_CHUNKS = 256
"""Chunks that a worker is handed at a time at most. A block costs the driver 40 KB and 4 ms."""

GPU_CHUNKS = 2
"""Chunks that a GPU worker has in hand: one is decoded or committed while the other is classified.
"""

AHEAD: dict[LayoutName, int] = {"cpu": MAX_BLOCK_CHUNKS, "gpu": 4, "gpu_decode": 4}
"""Results that a stage may be ahead of the driver, which looks at them ten times a second.

With Ray Data's 2 a worker is held to 2,400 images/s. Where there is no GPU they are receipts of
some hundred bytes; where there is, pixels of a chunk.
"""


def run(spec: WorkSpec, layout: Layout, work: Sequence[Work]) -> Iterator[Done]:
    """Do the work on the cluster; yields each chunk once it is durable, in any order."""
    hush_data()
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    # each chunk's result leaves its worker at once, not when the block that it came in is done
    context.target_max_block_size = 1
    context._max_num_blocks_in_streaming_gen_buffer = AHEAD[layout.name]
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_blocks(blocks_of(work, layout.workers))
        for stage in _stages(spec, layout, len(work)):
            dataset = stage(dataset)
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            for payload in batch.column("done").to_pylist():
                yield pickle.loads(payload)


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


def _stages(spec: WorkSpec, layout: Layout, chunks: int) -> list[Any]:
    workers = min(layout.workers, chunks)
    pool = ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2)
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
        return [lambda dataset: dataset.map_batches(LabelWorker, **model)]
    return [
        lambda dataset: dataset.map_batches(
            ready_task,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=WORKER_CPUS,
            fn_args=(spec, layout.host_share),
            compute=ray.data.TaskPoolStrategy(size=layout.decoders),
        ),
        lambda dataset: dataset.map_batches(GpuWorker, max_concurrency=GPU_CHUNKS, **model),
    ]


class _ModelWorker:
    """A process that holds the model; what it is handed differs between the layouts."""

    def __init__(self, spec: WorkSpec, threads: int) -> None:
        import torch

        from imgcls.labeling import chunk
        from imgcls.models.classifier import Classifier

        stores.use(spec.storage)
        torch.set_num_threads(threads)
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._stages = chunk
        self._spec = spec
        bundle = load_bundle(spec.bundle_url)
        if bundle.sha256 != spec.bundle_sha256:
            raise BundleError(
                f"bundle {spec.bundle_url}: changed while the run was under way; restore it, or "
                "start over with --overwrite"
            )
        self._classifier = Classifier(
            bundle,
            precision=spec.precision,  # type: ignore[arg-type]
            compile=spec.compile,
            batch_size=spec.batch_size,
        )

    def _finish(self, work: Work, table: pa.Table, seconds: Seconds) -> dict[str, list[bytes]]:
        self._stages.commit(self._spec, work, table, seconds)
        return self._receipt(work, table, seconds)

    def _receipt(self, work: Work, table: pa.Table, seconds: Seconds) -> dict[str, list[bytes]]:
        errors = sum(1 for status in table.column("status").to_pylist() if status != names.OK)
        done = Done(work, table.num_rows, errors, seconds, self._classifier.precision, self._name)
        return {"done": [pickle.dumps(done)]}


class LabelWorker(_ModelWorker):
    """The CPU layout: all stages in one process per core."""

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        work: Work = _only(batch, "work")
        seconds = Seconds()
        table = self._stages.committed(self._spec, work)
        if table is not None:
            return self._receipt(work, table, seconds)
        rows = self._stages.rows_of(self._spec, work)
        table = self._stages.label(self._spec, self._classifier, rows, work, seconds)
        return self._finish(work, table, seconds)


class GpuWorker(_ModelWorker):
    """The layouts with GPUs: pixels come ready from tasks on CPUs, or bytes to decode here."""

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        work, ready, seconds = _only(batch, "ready")
        rows = self._stages.rows_of(self._spec, work)
        if isinstance(ready, list):
            ready = self._stages.prepare_on_device(self._spec, ready, self._classifier, seconds)
        table = self._stages.classify_prepared(
            self._spec, self._classifier, rows, work, ready, seconds
        )
        return self._finish(work, table, seconds)


def ready_task(batch: pa.Table, spec: WorkSpec, host_share: float) -> dict[str, list[bytes]]:
    """The first half where there are GPUs: fetch a chunk, and decode it unless a GPU is to."""
    from imgcls.labeling import chunk as stages

    stores.use(spec.storage)
    work: Work = _only(batch, "work")
    rows, seconds = stages.rows_of(spec, work), Seconds()
    ready: Any
    if is_for_host(work.chunk, host_share):
        import torch

        torch.set_num_threads(1)
        preprocess = read_description(spec.bundle_url).spec.preprocess
        ready = stages.prepare_all(spec, rows, preprocess, seconds)
    else:
        ready = list(stages.fetch(spec, rows))
    return {"ready": [pickle.dumps((work, ready, seconds), protocol=5)]}


def is_for_host(chunk: int, share: float) -> bool:
    """Whether this chunk is of the share that CPUs decode: the same every time, evenly spread."""
    return math.floor((chunk + 1) * share) > math.floor(chunk * share)


def _only(batch: pa.Table, column: str) -> Any:
    return pickle.loads(batch.column(column)[0].as_py())
