"""What travels between the driver and its workers: the order, the piece of work, the receipt.

Light on purpose: the driver of a run imports no torch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pyarrow as pa

from imgcls.data.filesystem import MAX_IMAGE_BYTES
from imgcls.data.preprocess import DecodeMode
from imgcls.data.storage_settings import StorageConfig
from imgcls.execution.plan import Plan
from imgcls.runs.schema import OK


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What a worker must know to do any chunk of any run.

    session:       a name that no other driver's pass over the run has
    crash_retries: workers that a chunk may kill, beside the first, before its images are tried
                   one by one
    on_web:        whether images are on web servers, which limits how many workers read
    """

    output: str
    plan: Plan
    path_column: str
    root: str
    batch_size: int
    max_pixels: int
    max_bytes: int = MAX_IMAGE_BYTES
    io_concurrency: int
    storage: StorageConfig
    session: str
    crash_retries: int
    is_on_web: bool = False


@dataclass(frozen=True, kw_only=True)
class PredictSpec(RunSpec):
    """What it must know to label."""

    bundle_url: str
    bundle_sha256: str
    label_column: str | None
    top_k: int
    thresholds: tuple[float, ...]
    scores: bool
    scores_type: str = "float32"
    embeddings: bool
    decode: DecodeMode
    precision: str
    compile: bool


@dataclass(frozen=True, kw_only=True)
class ScanSpec(RunSpec):
    """What it must know to tell what images are like; with a bundle, their embeddings too."""

    bundle_url: str | None
    bundle_sha256: str | None
    decode: DecodeMode | None


@dataclass(frozen=True)
class ChunkTask:
    """A chunk to do: all its rows, or for a retry those at `offsets` within it.

    A retry carries the path and label columns of its rows: the shards of a committed run are gone.
    """

    chunk: int
    offsets: tuple[int, ...] | None = None
    rows: pa.Table | None = None


@dataclass
class StageTimings:
    """What a chunk took of a worker: wall seconds in each stage, and bytes of images read.

    gpu: seconds that a GPU was busy with the forward passes; no stage of its own
    """

    fetch: float = 0.0
    prepare: float = 0.0
    classify: float = 0.0
    commit: float = 0.0
    gpu: float = 0.0
    bytes: int = 0

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time within it as that of a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - began)

    def plus(self, more: StageTimings) -> StageTimings:
        """Both added up."""
        return StageTimings(
            **{name: value + getattr(more, name) for name, value in asdict(self).items()}
        )

    def seconds(self) -> dict[str, float]:
        """By stage, and of the GPU."""
        return {name: value for name, value in asdict(self).items() if name != "bytes"}


@dataclass(frozen=True)
class ChunkResult:
    """A chunk that is durable: what became of its rows, and the time each stage took.

    status: rows by status
    deaths: workers that it has cost
    """

    task: ChunkTask
    rows: int
    status: dict[str, int]
    timings: StageTimings
    precision: str
    worker: str
    crashes: int = 0

    @property
    def errors(self) -> int:
        return self.rows - self.status.get(OK, 0)
