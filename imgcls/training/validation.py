"""Validation metrics over all workers: loss, accuracy, balanced accuracy; for multilabel also mAP.

Every validation row counts once, without padding or dropping, for any number of workers. All
workers get the same numbers, because they decide on them which epoch is the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from imgcls.models.bundle import TaskName
from imgcls.models.multilabel import MULTILABEL
from imgcls.models.single_label import SINGLE_LABEL
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
    accuracy:          share of rows with the right class; for multilabel, share of the known
                       classes of all rows that a threshold of 0.5 decides correctly
    balanced_accuracy: mean recall of the classes that have rows; for multilabel, mean over classes
                       of the recall of their positives and of their negatives
    mean_average_precision: for multilabel; None for one label per image
    """

    loss: float
    accuracy: float
    balanced_accuracy: float
    rows: int
    mean_average_precision: float | None = None


class EvalAccumulator(Protocol):
    """Sums over the validation batches of one worker, and then over all workers.

    All state is sums, so that the order of rows and their division among workers do not matter.
    """

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch: logits (N, C) float32, and targets as `TargetTable.encode` returns them."""

    def compute(self, reduce: ReduceFn = all_reduce) -> EvalMetrics:
        """The metrics over all workers; every worker must call it.

        reduce: sums a tensor over all workers, in place
        """


def create_accumulator(task: TaskName, num_classes: int, device: torch.device) -> EvalAccumulator:
    """The accumulator of a task."""
    kind = SingleLabelAccumulator if task == "single_label" else MultiLabelAccumulator
    return kind(num_classes, device)


class SingleLabelAccumulator:
    """Loss, and rows and correct ones by class."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._rows = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._correct = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch; targets (N,) int64."""
        self._loss += SINGLE_LABEL.compute_loss(logits, targets).double()
        correct = targets[logits.argmax(1) == targets]
        self._rows += torch.bincount(targets, minlength=len(self._rows))
        self._correct += torch.bincount(correct, minlength=len(self._correct))

    def compute(self, reduce: ReduceFn = all_reduce) -> EvalMetrics:
        """The metrics over all workers; every worker must call it."""
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


class MultiLabelAccumulator:
    """Loss, and the logits of the positives and of the negatives of each class in bins.

    4,097 bins from -16 to 16, in which scores count as equal.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum, rows
        shape = (2, num_classes, _LOGIT_BINS)  # negatives, positives
        self._bins = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch; targets (N, C) float32, NaN where unknown."""
        loss = MULTILABEL.compute_loss(logits, targets).double()
        self._loss += torch.stack([loss, loss.new_tensor(len(logits))])
        # a diverged network is reported by its loss
        finite = logits.nan_to_num(0.0).clamp(-_MAX_LOGIT, _MAX_LOGIT)
        bins = (finite + _MAX_LOGIT) * (_ZERO_BIN / _MAX_LOGIT)
        classes = torch.arange(logits.shape[1], device=logits.device) * _LOGIT_BINS
        places = bins.long() + classes
        for value in (0, 1):
            found = torch.bincount(places[targets == value], minlength=self._bins[0].numel())
            self._bins[value] += found.view_as(self._bins[0])

    def compute(self, reduce: ReduceFn = all_reduce) -> EvalMetrics:
        """The metrics over all workers; every worker must call it."""
        for part in (self._loss, self._bins):
            reduce(part)
        loss, rows = self._loss.tolist()
        negatives, positives = self._bins.flip(2).double()  # the highest scores first
        above = slice(0, _LOGIT_BINS - _ZERO_BIN)  # scores of at least 0.5
        hits, false_alarms = positives[:, above].sum(1), negatives[:, above].sum(1)
        own, rest = positives.sum(1), negatives.sum(1)
        correct = hits.sum() + (rest - false_alarms).sum()
        recalls = torch.stack([hits / own, (rest - false_alarms) / rest])
        found, seen = positives.cumsum(1), (positives + negatives).cumsum(1)
        precision = (positives * found / seen.clamp_min(1)).sum(1) / own
        return EvalMetrics(
            loss=loss / rows if rows else math.nan,
            accuracy=float(correct / (own + rest).sum()),
            balanced_accuracy=float(recalls.nanmean(0).nanmean()),
            rows=int(rows),
            mean_average_precision=float(precision[(own > 0) & (rest > 0)].mean()),
        )


_MAX_LOGIT, _ZERO_BIN = 16.0, 2048
_LOGIT_BINS = 2 * _ZERO_BIN + 1


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
