"""Which rows each worker learns from in each step: a seeded shuffle, dealt like cards.

Promises that an epoch holds every row exactly once, none dropped and none padded, that in every
step the workers' shares differ by at most one row, and that every worker has a row in every step,
so that all take the same number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Hand:
    """One worker's part of one step.

    rows:  (n,) int64, which rows; n is at least 1
    batch: rows that all workers together have in this step
    """

    rows: Rows
    batch: int


def steps_per_epoch(rows: int, batch_size: int, workers: int) -> int:
    """Steps that rows make, in batches of at most `batch_size` where that leaves no worker idle."""
    if rows < workers:
        raise ValueError(f"{rows} rows cannot be dealt to {workers} workers")
    return min(-(-rows // batch_size), rows // workers)


def deal(
    rows: int, batch_size: int, *, rank: int, workers: int, epoch: int, seed: int
) -> Iterator[Hand]:
    """The steps of one worker in one epoch.

    batch_size: rows in a step over all workers; batches differ by at most one row, so the last is
        no smaller than the others
    Raises ValueError when there are fewer rows than workers.
    """
    steps = steps_per_epoch(rows, batch_size, workers)
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    for step in range(steps):
        start, stop = step * rows // steps, (step + 1) * rows // steps
        # card number i goes to worker i % workers, over the whole epoch
        yield Hand(order[start + (rank - start) % workers : stop : workers], stop - start)


def shard(rows: int, *, rank: int, workers: int) -> Rows:
    """The rows that one worker evaluates; over all workers every row once."""
    return np.arange(rank, rows, workers)
