"""What travels between the driver and its workers: the order, the piece of work, the receipt.

Light on purpose: the driver of a run imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pyarrow as pa

from imgcls.data.stores import StorageConfig
from imgcls.labeling.plan import Plan


@dataclass(frozen=True)
class WorkSpec:
    """All that a worker must know to do any chunk of a run."""

    output: str
    plan: Plan
    bundle_url: str
    bundle_sha256: str
    path_column: str
    label_column: str | None
    root: str
    top_k: int
    thresholds: tuple[float, ...]
    scores: bool
    embeddings: bool
    precision: str
    compile: bool
    batch_size: int
    max_pixels: int
    fetches: int
    storage: StorageConfig


@dataclass(frozen=True)
class Work:
    """A chunk to do: all its rows, or for a retry those at `offsets` within it.

    A retry carries the path and label columns of its rows: the shards of a committed run are gone.
    """

    chunk: int
    offsets: tuple[int, ...] | None = None
    rows: pa.Table | None = None


@dataclass
class Seconds:
    """Wall time that a worker spent in each stage of a chunk; `gpu` is no stage of its own.

    gpu: time that a GPU was busy with the forward passes
    """

    fetch: float = 0.0
    prepare: float = 0.0
    classify: float = 0.0
    commit: float = 0.0
    gpu: float = 0.0

    def plus(self, more: Seconds) -> Seconds:
        """Stage times added up."""
        return Seconds(
            *(a + b for a, b in zip(self.as_dict().values(), more.as_dict().values(), strict=True))
        )

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Done:
    """A chunk that is durable: what became of its rows, and the time each stage took."""

    work: Work
    rows: int
    errors: int
    seconds: Seconds
    precision: str
    worker: str
