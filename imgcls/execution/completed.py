"""Completed chunks and parts, found by listing files; reads and writes the files of chunks.

A chunk or part exists under its final name only when it is whole, so a listing is the truth and a
resume joins no rows.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.storage import filesystem
from imgcls.errors import StorageMissing
from imgcls.execution.messages import ChunkTask, RunSpec, StageTimings
from imgcls.execution.plan import Plan, read_shard_chunk
from imgcls.runs import layout


@dataclass
class CompletedChunks:
    """Which chunks and parts of a run are written.

    parts:  parts that are rolled up
    chunks: staged chunks by part, of parts that are not rolled up yet
    """

    output: str
    plan: Plan
    parts: set[int]
    chunks: dict[int, set[int]]

    @classmethod
    def load(cls, output: str, plan: Plan) -> CompletedChunks:
        """List the files of an output folder."""
        valid = {layout.part_name(part): part for part in range(plan.num_parts)}
        present = filesystem.list_names(filesystem.join(output, layout.PREDICTIONS_FOLDER))
        parts = {valid[name] for name in present if name in valid}
        chunks: dict[int, set[int]] = {}
        with contextlib.suppress(StorageMissing):
            for path in filesystem.walk(filesystem.join(output, layout.STAGING_FOLDER)):
                name = path.rpartition("/")[2]
                if name.startswith("chunk-") and name.endswith(f".{plan.run_id}.parquet"):
                    chunk = int(name[len("chunk-") :].partition(".")[0])
                    if plan.part_of(chunk) not in parts:
                        chunks.setdefault(plan.part_of(chunk), set()).add(chunk)
        return cls(output, plan, parts, chunks)

    @property
    def rows_done(self) -> int:
        """Rows of all written chunks."""
        rolled_up = sum(len(self.plan.rows_of_part(part)) for part in self.parts)
        staged = (chunk for chunks in self.chunks.values() for chunk in chunks)
        return rolled_up + sum(len(self.plan.rows_of(chunk)) for chunk in staged)

    def list_remaining(self) -> list[ChunkTask]:
        """The chunks still to be processed, in order."""
        return [
            ChunkTask(chunk)
            for part in range(self.plan.num_parts)
            if part not in self.parts
            for chunk in self.plan.chunks_of(part)
            if chunk not in self.chunks.get(part, ())
        ]

    def add(self, chunk: int) -> int | None:
        """Add a written chunk; returns the part that it completes, if any."""
        part = self.plan.part_of(chunk)
        self.chunks.setdefault(part, set()).add(chunk)
        return part if self._is_complete(part) else None

    def list_complete_parts(self) -> list[int]:
        """Parts whose chunks are all staged, but which are not rolled up."""
        return [
            part
            for part in range(self.plan.num_parts)
            if part not in self.parts and self._is_complete(part)
        ]

    def mark_rolled_up(self, part: int) -> None:
        """Add a part that is written, and remove its chunks."""
        self.parts.add(part)
        self.chunks.pop(part, None)
        filesystem.remove(layout.part_staging_folder(self.output, part))

    def _is_complete(self, part: int) -> bool:
        return len(self.chunks.get(part, ())) == len(self.plan.chunks_of(part))


def read_chunk_rows(spec: RunSpec, task: ChunkTask) -> pa.Table:
    """The manifest columns of a chunk's rows, read from its shard."""
    if task.rows is not None:
        return task.rows
    part = spec.plan.part_of(task.chunk)
    index = task.chunk - spec.plan.chunks_of(part).start
    with _SHARD_LOCK:
        shard = _open_shard(layout.shard_url(spec.output, part), spec.plan.run_id)
        return read_shard_chunk(shard, spec.plan, index)


_SHARD_LOCK = threading.Lock()
"""A worker's threads share one file handle."""


@functools.lru_cache(maxsize=2)
def _open_shard(url: str, run_id: str) -> pq.ParquetFile:
    """Kept open between chunks, by run: one that starts over has shards of the same names."""
    return pq.ParquetFile(filesystem.open_read(url), pre_buffer=False)


def read_committed(spec: RunSpec, task: ChunkTask) -> pa.Table | None:
    """The statuses of a chunk that is written; None when it is not.

    Ray processes a whole block again when the worker that had it is lost.
    """
    try:
        # on S3, `exists` would make a LIST, which costs as much as a PUT
        return read_chunk_table(_get_chunk_url(spec, task), columns=["status"])
    except StorageMissing:
        return None


def read_chunk_table(url: str, columns: list[str] | None = None) -> pa.Table:
    """The table of a chunk, read by one request; a stream would make three."""
    return pq.read_table(pa.BufferReader(filesystem.read(url)), columns=columns)


def write_chunk(spec: RunSpec, task: ChunkTask, table: pa.Table, timings: StageTimings) -> None:
    """Write a chunk under its own name, atomically; writing it twice gives the same bytes."""
    with timings.measure("commit"):
        layout.write_table(_get_chunk_url(spec, task), table)


def _get_chunk_url(spec: RunSpec, task: ChunkTask) -> str:
    get_url = layout.chunk_url if task.offsets is None else layout.retry_url
    return get_url(spec.output, spec.plan.part_of(task.chunk), task.chunk, spec.plan.run_id)
