"""What an epoch's rows add up to, over all workers: losses, correct predictions, recall by class.

Promises that every validation row counts once, none dropped or padded, however many workers share
them, and that all workers see the same numbers, since all that is decided hangs on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from imgcls.models.task import SINGLE_LABEL
from imgcls.training.sampler import Int64Array, shard_rows


@dataclass(frozen=True)
class EvalMetrics:
    """The validation rows as one network sees them; loss in nats per row, accuracies in [0, 1].

    balanced_accuracy: mean recall over the classes that have rows
    """

    loss: float
    accuracy: float
    balanced_accuracy: float
    rows: int


class EvalAccumulator:
    """Adds up validation batches of one worker, then those of all.

    Everything is a sum, so that the order and the sharing out of rows change nothing.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._seen = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._right = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """logits (N, C) float32, labels (N,) int64."""
        self._loss += SINGLE_LABEL.compute_loss(logits, labels).double()
        right = labels[logits.argmax(1) == labels]
        self._seen += torch.bincount(labels, minlength=len(self._seen))
        self._right += torch.bincount(right, minlength=len(self._right))

    def compute(self) -> EvalMetrics:
        """Over all workers, each of which must ask for it."""
        for part in (self._loss, self._seen, self._right):
            dist.all_reduce(part)
        present = self._seen > 0
        rows = self._seen.sum()
        return EvalMetrics(
            loss=float(self._loss / rows),
            accuracy=float(self._right.sum() / rows),
            balanced_accuracy=float((self._right[present] / self._seen[present]).mean()),
            rows=int(rows),
        )


def shard_batches(rows: int, batch_size: int, *, rank: int, workers: int) -> list[Int64Array]:
    """One worker's rows in batches, as many for every worker, some of which may be empty.

    batch_size: rows of a batch over all workers, at most, give or take one per worker
    """
    mine = shard_rows(rows, rank=rank, workers=workers)
    count = max(1, -(-rows // batch_size))
    return [np.asarray(part) for part in np.array_split(mine, count)]


def average_buffers(network: nn.Module, workers: int) -> None:
    """Give all workers the mean of their running statistics, so that they judge one network."""
    if workers == 1:
        return
    for buffer in _floating_point(network.buffers()):
        dist.all_reduce(buffer)
        buffer /= workers


def _floating_point(buffers: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    return (buffer for buffer in buffers if buffer.is_floating_point())


def all_reduce_sum(totals: torch.Tensor) -> list[float]:
    """Over all workers, the same on each; the tensor is added to in place."""
    dist.all_reduce(totals)
    values: list[float] = totals.tolist()
    return values
