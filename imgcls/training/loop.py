"""What every training worker runs: epochs of steps, each epoch judged on all validation rows.

Owns the step (its gradient is the mean over the global batch, however rows are shared out), the
evaluation (counts added over the workers, nothing padded) and which weights are kept. Promises that
all workers report equally often and come to the same verdict, since every number that decides
anything is added up over all of them first.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from imgcls.data.preprocess import Preprocess
from imgcls.models import zoo
from imgcls.models.bundle import WEIGHTS, Architecture
from imgcls.models.classifier import Precision, choose_precision
from imgcls.models.normalise import Normalise
from imgcls.training.deal import deal, shard, steps_per_epoch
from imgcls.training.ingest import Decoded, ImageSet
from imgcls.training.optim import OptimConfig, optimizer, schedule
from imgcls.training.progress import Epoch


@dataclass(frozen=True)
class Work:
    """All that a worker must know.

    weights: reference to the state dict to start from
    """

    architecture: Architecture
    num_classes: int
    weights: Any
    preprocess: Preprocess
    decoded: Decoded
    optim: OptimConfig
    epochs: int
    batch_size: int
    seed: int
    precision: Precision


@dataclass(frozen=True)
class Outcome:
    """What a worker came to.

    precision: what `auto` came to on the workers
    diverged:  which number ceased to be finite and so ended the training; None when all was well
    """

    history: list[Epoch]
    precision: str
    diverged: str | None


def run_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The training loop of one worker, called by Ray Train; returns an Outcome as a dict."""
    return asdict(_Trainer(config["work"], config["board"]).run())


class _Trainer:
    """One worker: its network, its rows and what they came to."""

    def __init__(self, work: Work, board: Any) -> None:
        context = ray.train.get_context()
        self.work, self.board = work, board
        board.enlist.remote(ray.get_runtime_context().current_actor)
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        _use_cores(context.get_local_world_size())
        _fix_randomness(work.seed, self.rank)
        blocks = ray.get(list(work.decoded.blocks))
        self.train = ImageSet(blocks, work.preprocess, held=False)
        self.val = ImageSet(blocks, work.preprocess, held=True)
        self.normalise = Normalise(work.preprocess, self.device)
        network = zoo.build(work.architecture, work.num_classes)
        network.load_state_dict(ray.get(work.weights))
        self.network = network.to(self.device).to(memory_format=torch.channels_last)
        # running statistics are averaged before each evaluation instead of copied at each step
        self.parallel: nn.Module = (
            nn.parallel.DistributedDataParallel(self.network, broadcast_buffers=False)
            if self.workers > 1
            else self.network
        )
        self.precision, self.precision_reason = choose_precision(work.precision, self.device)
        self.steps = steps_per_epoch(len(self.train), work.batch_size, self.workers)
        self.optimizer = optimizer(self.network, work.optim)
        self.schedule = schedule(self.optimizer, work.optim, self.steps * work.epochs)

    def run(self) -> Outcome:
        history: list[Epoch] = []
        best: Epoch | None = None
        self._post(f"training: {self.device.type}, {self.precision} ({self.precision_reason})")
        for number in range(1, self.work.epochs + 1):
            epoch = self._epoch(number)
            for name in ("train_loss", "val_loss"):
                if not math.isfinite(getattr(epoch, name)):
                    diverged = f"{name} is {getattr(epoch, name)} in epoch {number}"
                    return Outcome(history, self.precision, diverged)
            history.append(epoch)
            better = epoch.better_than(best)
            best = epoch if better else best
            self._post(epoch.line(self.work.epochs))
            with self._checkpoint(better and self.rank == 0) as checkpoint:
                ray.train.report(asdict(epoch), checkpoint=checkpoint)
        return Outcome(history, self.precision, None)

    def _epoch(self, number: int) -> Epoch:
        start = time.perf_counter()
        train_loss, train_correct, train_rows = self._learn(number)
        learnt = time.perf_counter()
        _average_buffers(self.network, self.workers)
        val_loss, val_correct, val_rows = self._evaluate()
        return Epoch(
            epoch=number,
            train_loss=train_loss / train_rows,
            train_accuracy=train_correct / train_rows,
            val_loss=val_loss / val_rows,
            val_accuracy=val_correct / val_rows,
            lr=self.lr,
            images_per_second=train_rows / (learnt - start),
            seconds=time.perf_counter() - start,
            train_rows=int(train_rows),
            val_rows=int(val_rows),
        )

    def _learn(self, number: int) -> tuple[float, float, float]:
        """One pass over this worker's training rows; loss, correct and rows over all workers."""
        self.network.train()
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        hands = deal(
            len(self.train),
            self.work.batch_size,
            rank=self.rank,
            workers=self.workers,
            epoch=number,
            seed=self.work.seed,
        )
        for hand in hands:
            inputs, labels = self._batch(self.train, hand.rows)
            with self._autocast():
                outputs = self.parallel(inputs)
            loss, logits = training_loss(outputs, labels, self.work.optim.label_smoothing)
            # workers' gradients are averaged, whereas the mean over the batch is what is meant
            (loss * (self.workers / hand.batch)).backward()
            self.lr = float(self.schedule.get_last_lr()[0])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.schedule.step()
            totals += _counts(loss.detach(), logits, labels)
        return _summed(totals)

    @torch.inference_mode()
    def _evaluate(self) -> tuple[float, float, float]:
        """All validation rows, shared out; loss, correct and rows over all workers."""
        self.network.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        rows = shard(len(self.val), rank=self.rank, workers=self.workers)
        for start in range(0, len(rows), self.work.batch_size):
            inputs, labels = self._batch(self.val, rows[start : start + self.work.batch_size])
            with self._autocast():
                logits = self.network(inputs).float()
            totals += _counts(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
        return _summed(totals)

    def _batch(self, images: ImageSet, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.from_numpy(images.labels[rows]).to(self.device)
        return self.normalise(images.pixels(rows)), labels

    def _autocast(self) -> torch.autocast:
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _post(self, line: str) -> None:
        if self.rank == 0:
            self.board.post.remote(line)

    @contextlib.contextmanager
    def _checkpoint(self, wanted: bool) -> Iterator[ray.train.Checkpoint | None]:
        if not wanted:
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {k: v.cpu().contiguous() for k, v in self.network.state_dict().items()}
            save_file(state, os.path.join(folder, WEIGHTS))
            yield ray.train.Checkpoint.from_directory(folder)


def training_loss(
    outputs: Any, labels: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of a network's outputs in training, and its (N, C) float32 logits.

    outputs: logits, or Inception's or GoogLeNet's named tuple of logits and auxiliary logits, whose
        losses weigh 0.4 and 0.3 (Szegedy et al., CVPR 2016 and 2015)
    """

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            logits.float(), labels, reduction="sum", label_smoothing=label_smoothing
        )

    if isinstance(outputs, torch.Tensor):
        return loss_of(outputs), outputs.float()
    loss = loss_of(outputs.logits)
    weights = {"aux_logits": 0.4, "aux_logits1": 0.3, "aux_logits2": 0.3}
    for name, weight in weights.items():
        auxiliary = getattr(outputs, name, None)
        if auxiliary is not None:
            loss = loss + weight * loss_of(auxiliary)
    return loss, outputs.logits.float()


def _counts(loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(3,) float64: summed loss, correct predictions, rows."""
    correct = (logits.argmax(1) == labels).sum()
    rows = torch.tensor(len(labels), device=loss.device)
    return torch.stack([loss.double(), correct.double(), rows.double()])


def _summed(totals: torch.Tensor) -> tuple[float, float, float]:
    """Totals over all workers, the same on each."""
    dist.all_reduce(totals)
    loss, correct, rows = totals.tolist()
    return loss, correct, rows


def _average_buffers(network: nn.Module, workers: int) -> None:
    """Give all workers the mean of their running statistics, so that they judge one network."""
    if workers == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= workers


def _use_cores(workers_here: int) -> None:
    """Share the machine's cores among its workers; Ray's default of one thread would idle them."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers_here))


def _fix_randomness(seed: int, rank: int) -> None:
    """Dropout differs between workers and repeats between runs."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank)).generate_state(1)[0]))
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
