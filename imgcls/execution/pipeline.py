"""The Ray Data pipeline of one pass: each dataset row is one chunk, each result its counts.

A chunk is written before its result is returned, so a lost worker, task or driver costs at most the
chunks in flight.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import ray.data

from imgcls.cluster import ray_internals
from imgcls.cluster.ray_data import DataExecution
from imgcls.execution.messages import ChunkResult, ChunkTask, RunSpec
from imgcls.execution.placement import Placement
from imgcls.execution.worker import Job

MAX_BLOCK_CHUNKS = 256
"""Maximum number of chunks in a block. A block costs the driver 40 KB and 4 ms."""
MAX_BLOCK_ROWS = 262_144
"""Maximum number of rows in a block: a part has several blocks, so that parts are completed, and
rolled up, one after another."""


class Pipeline:
    """Chunks of a job on the cluster; after one that was stopped another can be started."""

    def __init__(
        self, job: Job, spec: RunSpec, placement: Placement, tasks: Sequence[ChunkTask]
    ) -> None:
        spec, placement = apply_host_limits(spec, placement, len(tasks))
        self._execution = DataExecution()
        with self._execution.own_settings() as context:
            # each result leaves its worker at once, not when the block of its chunk is done
            context.target_max_block_size = 1
            ray_internals.limit_result_buffer(context, placement.max_buffered_results)
            context.execution_no_progress_timeout_s = -1  # `scale` sets the timeouts
            blocks = build_blocks(tasks, placement.num_readers, spec.plan.chunk_rows)
            dataset = ray.data.from_blocks(blocks)
            self._dataset = placement.add_stages(dataset, job, spec)

    def run(self) -> Iterator[ChunkResult]:
        """Process the chunks; yields each when it is written, in any order, until stopped."""
        try:
            for batch in self._dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                assert isinstance(batch, pa.Table)
                for payload in batch.column("result").to_pylist():
                    yield pickle.loads(payload)
        finally:
            self._execution.close()

    def stop(self) -> None:
        """Take the workers away, whatever they are doing, so that `run` ends.

        Call it again until `run` has ended: it has no effect in the moment before Ray Data starts.
        """
        self._execution.stop()


def apply_host_limits(
    spec: RunSpec, placement: Placement, chunks: int
) -> tuple[RunSpec, Placement]:
    """Divide the request limit per host among the workers, so that it holds for all together.

    Reads from web servers run ahead by at most twice a worker's share of the limit. Time in the
    queue of a host does not count as retry time: with a longer queue, a worker could wait many
    retry times for its next file when a server does not answer, and would count as hung.
    """
    if spec.is_on_web:
        placement = placement.limit_readers(spec.storage.max_requests_per_host)
    placement = replace(placement, workers=min(placement.workers, chunks))
    spec = replace(spec, storage=spec.storage.split_across(placement.num_readers))
    if spec.is_on_web:
        most = 2 * spec.storage.max_requests_per_host
        spec = replace(spec, io_concurrency=min(spec.io_concurrency, most))
    return spec, placement


def build_blocks(tasks: Sequence[ChunkTask], consumers: int, chunk_rows: int) -> list[pa.Table]:
    """Blocks of tasks that shrink towards the end: few blocks, and no idle worker at the end.

    consumers:  processes that take blocks, which are those of the first stage. With the number of
        GPU workers instead, one of 17 decoding tasks would get an eighth of all chunks.
    chunk_rows: rows of a chunk
    Source: guided self-scheduling, Polychronopoulos and Kuck, IEEE ToC 1987.
    """
    blocks = []
    start = 0
    largest = max(1, min(MAX_BLOCK_CHUNKS, MAX_BLOCK_ROWS // chunk_rows))
    while start < len(tasks):
        size = min(largest, max(1, (len(tasks) - start) // (8 * consumers)))
        blocks.append(pa.table({"task": [pickle.dumps(t) for t in tasks[start : start + size]]}))
        start += size
    return blocks
