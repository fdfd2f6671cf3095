"""Distributed sampler: a seeded shuffle, split into equal shares per worker and step.

An epoch has every row exactly once, without padding or dropping (unless classes are balanced). In
every step the shares of the workers differ by at most one row, and every worker has at least one
row, so that all workers make the same number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepShare:
    """The rows of one worker in one step.

    rows:              (n,) int64 row indices; n is at least 1
    global_batch_size: number of rows of all workers together in this step
    """

    rows: Int64Array
    global_batch_size: int


def steps_per_epoch(rows: int, batch_size: int, workers: int) -> int:
    """Number of steps; batches have at most `batch_size` rows, or one row per worker if less."""
    if rows < workers:
        raise ValueError(f"{rows} rows cannot be split among {workers} workers")
    return min(-(-rows // batch_size), rows // workers)


def shuffle_rows(rows: int, *, epoch: int, seed: int) -> Int64Array:
    """(rows,) int64: a permutation of all row indices."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def sample_balanced(labels: Int64Array, *, epoch: int, seed: int) -> Int64Array:
    """(N,) int64 row indices with equally many rows of each class (they differ by at most one).

    Rows of a class are repeated only after all rows of that class were used.

    labels: (N,) int64
    """
    rng = np.random.default_rng((seed, epoch))
    classes = rng.permutation(np.unique(labels))
    chosen = []
    for position, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        quota = len(labels) // len(classes) + (position < len(labels) % len(classes))
        passes = [rng.permutation(members) for _ in range(-(-quota // len(members)))]
        chosen.append(np.concatenate(passes)[:quota] if passes else members[:0])
    return rng.permutation(np.concatenate(chosen))


def iter_step_shares(
    order: Int64Array, batch_size: int, *, rank: int, workers: int, start: int = 0
) -> Iterator[StepShare]:
    """The steps of one worker in one epoch.

    order:      (N,) int64, the rows of the epoch over all workers
    batch_size: maximum rows of a step over all workers; the sizes of steps differ by at most one
    start:      first step, when an interrupted epoch is resumed
    Raises ValueError when there are fewer rows than workers.
    """
    rows = len(order)
    steps = steps_per_epoch(rows, batch_size, workers)
    for step in range(start, steps):
        first, last = step * rows // steps, (step + 1) * rows // steps
        # element i of the epoch's order goes to worker i % workers
        yield StepShare(order[first + (rank - first) % workers : last : workers], last - first)


def shard_rows(rows: int, *, rank: int, workers: int) -> Int64Array:
    """The validation rows of one worker; every row belongs to exactly one worker."""
    return np.arange(rank, rows, workers)
