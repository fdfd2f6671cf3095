"""Validation metrics over all workers: loss, accuracy and balanced accuracy.

Every validation row counts once, without padding or dropping, for any number of workers. All
workers get the same numbers, because they decide on them which epoch is the best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from imgcls.models.task import SINGLE_LABEL
from imgcls.training.sampler import Int64Array, shard_rows

ReduceFn = Callable[[torch.Tensor], torch.Tensor]


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all workers, in place."""
    dist.all_reduce(tensor)
    return tensor


@dataclass(frozen=True)
class EvalMetrics:
    """Metrics of one network on all validation rows.

    loss:              mean, in nats per row
    balanced_accuracy: mean recall of the classes that have rows
    """

    loss: float
    accuracy: float
    balanced_accuracy: float
    rows: int


class EvalAccumulator:
    """Sums over the validation batches of one worker, and then over all workers.

    All state is sums, so that the order of rows and their division among workers do not matter.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._rows = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._correct = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: logits (N, C) float32, labels (N,) int64."""
        self._loss += SINGLE_LABEL.compute_loss(logits, labels).double()
        correct = labels[logits.argmax(1) == labels]
        self._rows += torch.bincount(labels, minlength=len(self._rows))
        self._correct += torch.bincount(correct, minlength=len(self._correct))

    def compute(self, reduce: ReduceFn = all_reduce) -> EvalMetrics:
        """The metrics over all workers; every worker must call it.

        reduce: sums a tensor over all workers, in place
        """
        for part in (self._loss, self._rows, self._correct):
            reduce(part)
        present = self._rows > 0
        rows = self._rows.sum()
        return EvalMetrics(
            loss=float(self._loss / rows),
            accuracy=float(self._correct.sum() / rows),
            balanced_accuracy=float((self._correct[present] / self._rows[present]).mean()),
            rows=int(rows),
        )


def shard_batches(rows: int, batch_size: int, *, rank: int, workers: int) -> list[Int64Array]:
    """The validation batches of one worker; equally many for every worker, some may be empty.

    batch_size: maximum rows of a batch over all workers (one more per worker is possible)
    """
    mine = shard_rows(rows, rank=rank, workers=workers)
    count = max(1, -(-rows // batch_size))
    return [np.asarray(part) for part in np.array_split(mine, count)]


def average_buffers(network: nn.Module, workers: int) -> None:
    """Set the running statistics to their mean over all workers.

    One all-reduce for all buffers of a dtype: a small one takes about as long as a large one.
    """
    if workers == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for buffer in network.buffers():
        if buffer.is_floating_point():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        joined = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(joined)
        joined /= workers
        parts = joined.split([buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, parts, strict=True):
            buffer.copy_(mean.view(buffer.shape))


def all_reduce_sum(totals: torch.Tensor) -> list[float]:
    """Sum a tensor over all workers, in place; the same values on each."""
    values: list[float] = all_reduce(totals).tolist()
    return values
