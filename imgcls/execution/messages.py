"""Messages between the driver and its workers: the run, a chunk to process, its result.

Imports no torch: the driver of a run does not need it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import OK
from imgcls.execution.plan import Plan


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that a worker needs to process any chunk of a run; jobs add their own fields.

    session:        name of one pass of one driver over the run
    io_concurrency: concurrent reads per worker
    crash_retries:  retries of a chunk after a worker crash before its rows are processed one at a
                    time
    is_on_web:      whether the inputs are on web servers, which limits the number of readers
    """

    output: str
    plan: Plan
    io_concurrency: int
    storage: StorageConfig
    session: str
    crash_retries: int
    is_on_web: bool = False


@dataclass(frozen=True, slots=True)
class ChunkTask:
    """A chunk to process: all its rows, or for a retry the rows at `offsets` within it.

    The driver has one for each chunk of a run.

    rows: path and label columns of the rows of a retry. A committed run has no manifest shards.
    """

    chunk: int
    offsets: tuple[int, ...] | None = None
    rows: pa.Table | None = None


@dataclass
class StageTimings:
    """Wall seconds that a worker spent in each stage of a chunk, and the bytes that it read.

    gpu: seconds in which a GPU ran forward passes, counted once where those of two chunks overlap;
        not a stage
    """

    fetch: float = 0.0
    prepare: float = 0.0
    classify: float = 0.0
    commit: float = 0.0
    gpu: float = 0.0
    bytes: int = 0

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)

    def plus(self, other: StageTimings) -> StageTimings:
        """Sum of both, field by field."""
        return StageTimings(
            **{name: value + getattr(other, name) for name, value in asdict(self).items()}
        )

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, and of the GPU."""
        return {name: value for name, value in asdict(self).items() if name != "bytes"}


@dataclass(frozen=True)
class PreparedChunk:
    """Output of the first stage where a chunk is processed in two: what the second one needs.

    data:    whatever the job's first stage made of the rows
    crashes: workers that crashed or were lost at this chunk in the first stage
    """

    task: ChunkTask
    data: Any
    timings: StageTimings
    crashes: int


@dataclass(frozen=True)
class ChunkResult:
    """A chunk that is written: its rows by status and the time of each stage.

    worker:  host/pid of the worker that wrote it
    crashes: workers that crashed or were lost at this chunk
    details: facts that are the same for all chunks of a worker, such as the model's precision
    """

    task: ChunkTask
    rows: int
    status: dict[str, int]
    timings: StageTimings
    worker: str
    crashes: int = 0
    details: dict[str, str] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Number of rows whose status is not ok."""
        return self.rows - self.status.get(OK, 0)
