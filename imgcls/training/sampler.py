"""Which rows each worker learns from in each step: a seeded shuffle, dealt like cards.

Promises that an epoch holds every row exactly once, none dropped and none padded (unless classes
are to be balanced), that in every step the workers' shares differ by at most one row, and that
every worker has a row in every step, so that all take the same number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepShare:
    """One worker's part of one step.

    rows:  (n,) int64, which rows; n is at least 1
    batch: rows that all workers together have in this step
    """

    rows: Int64Array
    global_batch_size: int


def steps_per_epoch(rows: int, batch_size: int, workers: int) -> int:
    """Steps that rows make, in batches of at most `batch_size` where that leaves no worker idle."""
    if rows < workers:
        raise ValueError(f"{rows} rows cannot be dealt to {workers} workers")
    return min(-(-rows // batch_size), rows // workers)


def shuffle_rows(rows: int, *, epoch: int, seed: int) -> Int64Array:
    """(rows,) int64: every row once."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def sample_balanced(labels: Int64Array, *, epoch: int, seed: int) -> Int64Array:
    """(N,) int64: N rows with as many of each class as of any other, give or take one.

    labels: (N,) int64; a class that is repeated shows all its rows before any of them again
    """
    rng = np.random.default_rng((seed, epoch))
    classes = rng.permutation(np.unique(labels))
    chosen = []
    for place, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        quota = len(labels) // len(classes) + (place < len(labels) % len(classes))
        passes = [rng.permutation(members) for _ in range(-(-quota // len(members)))]
        chosen.append(np.concatenate(passes)[:quota] if passes else members[:0])
    return rng.permutation(np.concatenate(chosen))


def iter_step_shares(
    order: Int64Array, batch_size: int, *, rank: int, workers: int, start: int = 0
) -> Iterator[StepShare]:
    """The steps of one worker in one epoch.

    order:      (N,) int64, the rows of the epoch over all workers
    batch_size: rows in a step over all workers; batches differ by at most one row, so the last is
        no smaller than the others
    start:      the first step to deal, for an epoch that goes on
    Raises ValueError when there are fewer rows than workers.
    """
    rows = len(order)
    steps = steps_per_epoch(rows, batch_size, workers)
    for step in range(start, steps):
        first, last = step * rows // steps, (step + 1) * rows // steps
        # card number i goes to worker i % workers, over the whole epoch
        yield StepShare(order[first + (rank - first) % workers : last : workers], last - first)


def shard_rows(rows: int, *, rank: int, workers: int) -> Int64Array:
    """The rows that one worker evaluates; over all workers every row once."""
    return np.arange(rank, rows, workers)
