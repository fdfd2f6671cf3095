"""Base class of the workers of a job: Ray actors that process chunks, one at a time or two.

A job brings a subclass that loads what it needs and makes a table of a chunk's rows. The base class
does the rest: it records attempts, isolates rows that crash workers, checks the table's schema,
writes it and reports the result.
"""

from __future__ import annotations

import abc
import collections
import itertools
import math
import os
import pickle
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import ray

from imgcls.cluster.session import DeviceType
from imgcls.data.containers import archive_index
from imgcls.data.storage import storage_settings
from imgcls.errors import RunFailed
from imgcls.execution import completed, heartbeat
from imgcls.execution.heartbeat import MAX_WORKER_STARTS, Attempt
from imgcls.execution.messages import (
    ChunkResult,
    ChunkTask,
    PreparedChunk,
    RunSpec,
    StageTimings,
)
from imgcls.runs import layout

SpecT = TypeVar("SpecT", bound=RunSpec)

HeartbeatFn = Callable[[], None]
"""Called after each row, to show that the worker is making progress."""


@dataclass(frozen=True)
class Job:
    """A kind of chunked work: its name in the log, and what runs in its workers.

    worker:     processes whole chunks, in one process per core
    prepare:    first stage on CPUs where a second one runs on GPUs; see `run_first_stage`
    gpu_worker: the second stage, in one process per GPU
    """

    name: str
    worker: type[ChunkWorker[Any]]
    prepare: Callable[[Any, pa.Table, bool, StageTimings, Attempt], Any] | None = None
    gpu_worker: type[PreparedChunkWorker[Any]] | None = None

    @property
    def has_gpu_stage(self) -> bool:
        return self.gpu_worker is not None


class BaseWorker(abc.ABC, Generic[SpecT]):
    """An actor that writes the tables of chunks.

    device:  "cpu" or "cuda", as planned; Ray shows GPUs to workers without one, too
    details: facts for `ChunkResult.details`, set by `load`
    """

    def __init__(self, spec: SpecT, threads: int, device: DeviceType) -> None:
        heartbeat.register_worker(spec.session)
        actor = ray.get_runtime_context().get_actor_id()
        start = Attempt(spec.session, f"start-{actor}", "starting a worker")
        if start.crashes >= MAX_WORKER_STARTS:
            raise RunFailed(
                f"{start.crashes} processes in a row crashed before they had loaded the model, the "
                f"last on {socket.gethostname()}. Find the cause in Ray's logs there (a signal, "
                "out of memory)"
            )
        storage_settings.set_process_settings(spec.storage)
        archive_index.set_process_index_folder(layout.index_folder(spec.output))
        self.spec = spec
        self.device = device
        self.details: dict[str, str] = {}
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._schema = self.load(threads)
        start.complete()

    @abc.abstractmethod
    def load(self, threads: int) -> pa.Schema:
        """Load what the chunks need; returns the schema of their tables.

        threads: compute threads of this process
        """

    def write(self, task: ChunkTask, table: pa.Table, timings: StageTimings) -> None:
        """Write a chunk's table, whole or not at all."""
        if not table.schema.equals(self._schema):
            raise RunFailed(
                f"chunk {task.chunk}: its table has the columns {table.schema.names}, the job has "
                f"{self._schema.names}, or their types differ:\n{table.schema}\n{self._schema}"
            )
        completed.write_chunk(self.spec, task, table, timings)

    def build_result(
        self,
        task: ChunkTask,
        table: pa.Table,
        timings: StageTimings,
        attempt: Attempt,
        earlier_crashes: int = 0,
    ) -> dict[str, list[bytes]]:
        """The pickled result of a chunk that is written.

        earlier_crashes: in the stage before
        """
        attempt.complete()
        result = ChunkResult(
            task=task,
            rows=table.num_rows,
            status=dict(collections.Counter(table.column("status").to_pylist())),
            timings=timings,
            worker=self._name,
            crashes=earlier_crashes + attempt.crashes,
            details=self.details,
        )
        return {"result": [pickle.dumps(result)]}


class ChunkWorker(BaseWorker[SpecT]):
    """An actor that processes whole chunks."""

    @abc.abstractmethod
    def process(
        self,
        rows: pa.Table,
        task: ChunkTask,
        timings: StageTimings,
        crashed_rows: Mapping[int, str],
        heartbeat: HeartbeatFn,
    ) -> pa.Table:
        """Process manifest rows: one table row each.

        crashed_rows: message by row, counted from the first of `rows`, of rows not to be touched
        """

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        """Process a chunk, unless its table is written already."""
        task: ChunkTask = unpickle_cell(batch, "task")
        timings = StageTimings()
        attempt = Attempt.for_chunk(self.spec, task, "process")
        table = completed.read_committed(self.spec, task)
        if table is None:
            rows = completed.read_chunk_rows(self.spec, task)
            for row in attempt.iter_suspect_rows(rows.num_rows):
                alone = rows.slice(row, 1)
                self.process(alone, ChunkTask(task.chunk), StageTimings(), {}, attempt.heartbeat)
            table = self.process(rows, task, timings, attempt.crashed_rows, attempt.heartbeat)
            self.write(task, table, timings)
        return self.build_result(task, table, timings, attempt)


class PreparedChunkWorker(BaseWorker[SpecT]):
    """An actor that runs the second stage of chunks that `run_first_stage` has prepared."""

    @abc.abstractmethod
    def process_prepared(
        self, rows: pa.Table, prepared: PreparedChunk, attempt: Attempt
    ) -> pa.Table:
        """Make the table of a prepared chunk: one row per manifest row."""

    def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
        """Run the second stage of a chunk."""
        prepared = unpack_prepared(batch)
        task, timings = prepared.task, prepared.timings
        attempt = Attempt.for_chunk(self.spec, task, "finish")
        rows = completed.read_chunk_rows(self.spec, task)
        table = self.process_prepared(rows, prepared, attempt)
        self.write(task, table, timings)
        return self.build_result(task, table, timings, attempt, prepared.crashes)


def run_first_stage(
    batch: pa.Table,
    prepare: Callable[[Any, pa.Table, bool, StageTimings, Attempt], Any],
    spec: RunSpec,
    cpu_fraction: float,
) -> pa.Table:
    """Ray task: prepare a chunk on a CPU for a worker that has a GPU.

    prepare:      called with the spec, the manifest rows, whether all that CPUs can do is to be
                  done here, the timings to add to, and the attempt; returns `PreparedChunk.data`
    cpu_fraction: fraction of the chunks of which CPUs do all that they can
    """
    storage_settings.set_process_settings(spec.storage)
    archive_index.set_process_index_folder(layout.index_folder(spec.output))
    task: ChunkTask = unpickle_cell(batch, "task")
    rows, timings = completed.read_chunk_rows(spec, task), StageTimings()
    attempt = Attempt.for_chunk(spec, task, "prepare")
    data = prepare(spec, rows, is_cpu_chunk(task.chunk, cpu_fraction), timings, attempt)
    attempt.complete()
    return pack_prepared(PreparedChunk(task, data, timings, attempt.crashes))


def pack_prepared(prepared: PreparedChunk) -> pa.Table:
    """A prepared chunk as a table of one row, with its arrays in binary cells of their own.

    Pickled within one cell, a chunk of 256 images of 224 pixels takes 146 ms to read in the GPU's
    worker, and holds the lock of its Python interpreter. Arrays in cells are read in place.
    """
    arrays: list[pickle.PickleBuffer] = []
    header = pickle.dumps(prepared, protocol=5, buffer_callback=arrays.append)
    views = [array.raw() for array in arrays]
    # one array, which is the usual case, is not copied
    content = pa.py_buffer(views[0] if len(views) == 1 else b"".join(views))
    offsets = pa.array(itertools.accumulate((view.nbytes for view in views), initial=0), pa.int64())
    cells = pa.Array.from_buffers(
        pa.large_binary(), len(views), [None, offsets.buffers()[1], content]
    )
    row = pa.ListArray.from_arrays([0, len(views)], cells)
    return pa.table({"prepared": pa.array([header], pa.large_binary()), "arrays": row})


def unpack_prepared(batch: pa.Table) -> PreparedChunk:
    """The prepared chunk of a table of one row; its arrays are read-only views of the table."""
    cells = batch.column("arrays")[0].values  # a scalar of a cell would be a copy of it
    offsets = np.frombuffer(cells.buffers()[1], np.int64)[cells.offset :][: len(cells) + 1]
    content = cells.buffers()[2]
    arrays = [
        content.slice(start, end - start) for start, end in itertools.pairwise(offsets.tolist())
    ]
    prepared: PreparedChunk = pickle.loads(batch.column("prepared")[0].as_buffer(), buffers=arrays)
    return prepared


def is_cpu_chunk(chunk: int, fraction: float) -> bool:
    """Whether a chunk belongs to the CPUs' fraction: deterministic and evenly spread."""
    return math.floor((chunk + 1) * fraction) > math.floor(chunk * fraction)


def unpickle_cell(batch: pa.Table, column: str) -> Any:
    """The object in the only row of a batch."""
    return pickle.loads(batch.column(column)[0].as_py())
