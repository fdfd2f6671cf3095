"""What every training worker does: the probe, epochs of steps, each judged on all validation rows.

Owns how far a run has come, which weights are kept, and going on from a saved state. Promises that
all workers take the same decisions at the same step, since every number that decides anything is
added up over all of them first, and that a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import nn

from imgcls.data.preprocess import Preprocess
from imgcls.models.bundle import Architecture
from imgcls.models.finite import find_non_finite
from imgcls.training.checkpoints import Checkpoints, TrainProgress
from imgcls.training.config import EarlyStoppingConfig, TrainConfig
from imgcls.training.control_sync import ControlSync
from imgcls.training.data.batches import Batch, ImageDataset
from imgcls.training.data.cached import CachedImages
from imgcls.training.data.streaming import StreamedImages
from imgcls.training.epoch_metrics import EpochMetrics, SelectionMetric
from imgcls.training.optim import linear_probe, strategy
from imgcls.training.optim.lr_finder import LrFinder
from imgcls.training.optim.optimizer import set_learning_rates
from imgcls.training.sampler import (
    StepShare,
    iter_step_shares,
    sample_balanced,
    shuffle_rows,
    steps_per_epoch,
)
from imgcls.training.train_step import TrainStep, WorkerContext
from imgcls.training.validation import EvalAccumulator, EvalMetrics, all_reduce_sum, shard_batches


@dataclass(frozen=True)
class TrainLoopSpec:
    """All that a worker must know.

    strategy:      as settled
    weights:       reference to the state dict to start from
    images:        where decoded images come from
    class_weights: of the loss, or None
    head_shares:   as `network.head_shares` gives them; empty without a probe
    """

    config: TrainConfig
    strategy: strategy.Strategy
    architecture: Architecture
    num_classes: int
    initial_weights: Any
    preprocess: Preprocess
    images: CachedImages | StreamedImages
    class_weights: list[float] | None
    head_coefficients: tuple[float, ...]


@dataclass(frozen=True)
class TrainLoopResult:
    """What the workers came to.

    precision: what `auto` came to
    kind:      None when all was well; `diverged`, `failures` (too many images cannot be decoded) or
        `failed` (a worker did, and would again)
    problem:   in words
    failed:    images that cannot be decoded, of how many, when these are too many
    stopped:   whether it was told to stop, and has saved
    lr_curve:  (learning rate, loss) pairs of an LR range test
    """

    history: tuple[EpochMetrics, ...]
    precision: str
    kind: str | None = None
    problem: str | None = None
    failed: tuple[int, int] = (0, 0)
    stopped: bool = False
    lr_curve: tuple[tuple[float, float], ...] = ()


class StopTraining(Exception):
    """The workers have agreed to end before the last epoch."""

    def __init__(self, **outcome: Any) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@dataclass(frozen=True)
class EpochTotals:
    """What the steps of an epoch add up to: of one worker as a tensor, of all as numbers."""

    loss: float
    correct: float
    rows: float
    wait_s: float
    compute_s: float
    failed: float

    @classmethod
    def all_reduce(cls, totals: torch.Tensor) -> EpochTotals:
        return cls(*all_reduce_sum(totals.clone()))


class Trainer:
    """One worker: its learner, its rows and what they came to."""

    def __init__(
        self, work: TrainLoopSpec, place: WorkerContext, network: nn.Module, board: Any
    ) -> None:
        config = work.config
        self.work, self.config, self.board = work, config, board
        self.rank, self.workers, self.device = place.rank, place.world_size, place.device
        self.place = place
        self.train: ImageDataset = work.images.load_split(held=False)
        self.val: ImageDataset = work.images.load_split(held=True)
        self.learner = TrainStep(
            config,
            work.strategy,
            work.preprocess,
            work.class_weights,
            work.num_classes,
            network,
            place,
        )
        self.steps = steps_per_epoch(len(self.train), config.batch_size, self.workers)
        self.pulse = ControlSync(board, self.device, save_seconds=60 * config.checkpoint_minutes)
        self.checkpoints = Checkpoints(config.output)
        self.standing = TrainProgress()

    # ------------------------------------------------------------------ the run

    def run(self, report: Callable[[EpochMetrics], None]) -> TrainLoopResult:
        """Train to the end; report is called with every epoch by every worker."""
        try:
            if self.config.find_lr:
                return self._build_result(lr_curve=self._run_lr_finder())
            self._resume()
            while not self._is_done():
                report(self._run_next_epoch())
            self.checkpoints.wait_until_saved()
        except StopTraining as end:
            return self._build_result(**end.outcome)
        return self._build_result()

    def _build_result(self, **what: Any) -> TrainLoopResult:
        return TrainLoopResult(self.standing.history, self.place.precision, **what)

    def _is_done(self) -> bool:
        history = self.standing.history
        if not history:
            return False
        return (
            self.work.strategy == "probe"
            or history[-1].epoch >= self.config.epochs
            or is_stalled(history, self.config.early_stopping, self.config.best_by)
        )

    def _run_next_epoch(self) -> EpochMetrics:
        """The probe or an epoch; judged, told and saved."""
        probes = strategy.has_probe(self.work.strategy) and not self.standing.history
        epoch = self._run_probe() if probes else self._train_epoch()
        history = (*self.standing.history, epoch)
        better = epoch.is_better_than(self.standing.best_epoch, self.config.best_by)
        best = len(history) - 1 if better else self.standing.best
        self.standing = TrainProgress(epoch=epoch.epoch + 1, history=history, best=best)
        self._post(epoch)
        self._save(self.standing, best=better)
        return epoch

    # ------------------------------------------------------------------ saving and going on

    def _resume(self) -> None:
        """Go on from the newest whole state, the same for all workers."""
        found = self.checkpoints.load_latest() if self.rank == 0 else None
        number = torch.tensor(found[0].number if found else 0, device=self.device)
        dist.broadcast(number, 0)
        if int(number) == 0:
            return
        if self.rank == 0:
            self.checkpoints.discard_after(int(number))
        else:
            found = self.checkpoints.load_latest(at_most=int(number))
        if found is None or found[0].number != int(number):
            raise RuntimeError(
                f"{self.checkpoints.folder} is not the same for all workers; give an --output that "
                "every machine reaches"
            )
        saved, state = found
        self.learner.load_state_dict(state)
        self.standing = saved.standing
        step = f", step {saved.standing.step} of {self.steps}" if saved.standing.step else ""
        self._post(f"going on: epoch {saved.standing.epoch}{step}")

    def _save(self, standing: TrainProgress, *, best: bool = False) -> None:
        """Save the state; called by all workers, as running statistics are averaged first."""
        self.learner.average_running_stats()
        self.pulse.mark_saved()
        if self.rank == 0:
            state = self.learner.state_dict()
            kept = state["average"] or state["network"]
            self.checkpoints.save(standing, state, kept if best else None)

    def _sync_control(self, standing: TrainProgress, totals: torch.Tensor | None = None) -> None:
        """See whether all are to save or end; `standing` and `totals` are what would be saved."""
        agreed = self.pulse.step(True if totals is None else torch.isfinite(totals[0]))
        if agreed is None:
            return
        if not agreed.is_finite:
            raise StopTraining(
                kind="diverged", problem=f"train_loss is nan in epoch {standing.epoch}"
            )
        # a range test has nothing to save, and an unfinished training may lie where it would
        if (agreed.should_stop or agreed.should_save) and not self.config.find_lr:
            if totals is not None:
                standing = replace(standing, totals=tuple(all_reduce_sum(totals.clone())))
            self._save(standing)
        if agreed.should_stop:
            self.checkpoints.wait_until_saved()
            raise StopTraining(stopped=True)

    # ------------------------------------------------------------------ an epoch

    def _train_epoch(self) -> EpochMetrics:
        number = max(1, self.standing.epoch)
        self.standing = replace(self.standing, epoch=number)
        self.learner.set_trainable(number)
        local = self._train_steps(number)
        totals = EpochTotals.all_reduce(local)
        learnt = time.perf_counter()
        self.learner.average_running_stats()
        done = replace(self.standing, step=self.steps, totals=tuple(all_reduce_sum(local)))
        verdict, val_failed = self._evaluate(done)
        for name, value in (("train_loss", totals.loss), ("val_loss", verdict.loss)):
            if not math.isfinite(value):
                raise StopTraining(kind="diverged", problem=f"{name} is {value} in epoch {number}")
        # an infinite running variance, for one, leaves the losses finite
        for name in find_non_finite(self.learner.judged.state_dict()):
            problem = f"the tensor {name!r} holds NaN or infinity in epoch {number}"
            raise StopTraining(kind="diverged", problem=problem)
        self._check_failures(int(totals.failed) + val_failed, int(totals.rows) + verdict.rows)
        seconds = (totals.wait_s + totals.compute_s) / self.workers
        return EpochMetrics(
            epoch=number,
            train_loss=totals.loss / totals.rows,
            train_accuracy=totals.correct / totals.rows,
            val_loss=verdict.loss,
            val_accuracy=verdict.accuracy,
            lr=max(group["lr"] for group in self.learner.optimizer.param_groups),
            images_per_second=totals.rows / seconds,
            seconds=seconds + time.perf_counter() - learnt,
            train_rows=int(totals.rows),
            val_rows=verdict.rows,
            val_balanced_accuracy=verdict.balanced_accuracy,
            wait_seconds=totals.wait_s / self.workers,
            compute_seconds=totals.compute_s / self.workers,
            train_failed=int(totals.failed),
            val_failed=val_failed,
        )

    def _train_steps(self, number: int) -> torch.Tensor:
        """The steps of an epoch that are not yet done; (6,) float64, this worker's Totals."""
        totals = torch.zeros(6, dtype=torch.float64, device=self.device)
        if self.rank == 0 and self.standing.totals:
            totals += torch.tensor(self.standing.totals, dtype=torch.float64, device=self.device)
        mark = time.perf_counter()
        for step, hand, batch in self._iter_steps(number, self.standing.step):
            arrived = time.perf_counter()
            at = (number - 1) * self.steps + step
            last = self.steps * self.config.epochs
            set_learning_rates(self.learner.optimizer, self.config.optim, at, last)
            self.learner.seed_rng(number, step)
            totals[:2] += self.learner.step(batch, hand.global_batch_size, at)
            self._post_failures(batch, number)
            finished = time.perf_counter()
            spent = (len(batch.labels), arrived - mark, finished - arrived, len(batch.failures))
            totals[2:] += torch.tensor(spent, dtype=torch.float64, device=self.device)
            mark = finished
            self._sync_control(replace(self.standing, step=step + 1), totals)
        return totals

    def _iter_steps(self, epoch: int, first: int = 0) -> Iterator[tuple[int, StepShare, Batch]]:
        """The steps of an epoch from the first on, with this worker's images."""
        if self.config.data.sampling == "balanced":
            order = sample_balanced(self.train.labels, epoch=epoch, seed=self.config.seed)
        else:
            order = shuffle_rows(len(self.train), epoch=epoch, seed=self.config.seed)
        size, rank, workers = self.config.batch_size, self.rank, self.workers
        hands = list(iter_step_shares(order, size, rank=rank, workers=workers, start=first))
        batches = self.train.iter_batches([hand.rows for hand in hands])
        for place, (hand, batch) in enumerate(zip(hands, batches, strict=True)):
            yield first + place, hand, batch

    @torch.inference_mode()
    def _evaluate(self, standing: TrainProgress) -> tuple[EvalMetrics, int]:
        """All validation rows, shared out; and how many could not be decoded."""
        self.learner.judged.eval()
        tally = EvalAccumulator(self.work.num_classes, self.device)
        failed = 0
        for batch in self._iter_sharded(self.val):
            if len(batch.labels):
                tally.update(
                    self.learner.predict_logits(batch.pixels),
                    self.learner.labels_to_device(batch.labels),
                )
            failed += len(batch.failures)
            self._post_failures(batch, standing.epoch)
            self._sync_control(standing)
        (total,) = all_reduce_sum(torch.tensor([float(failed)], device=self.device))
        return tally.compute(), int(total)

    def _iter_sharded(self, images: ImageDataset) -> Iterator[Batch]:
        """This worker's share of a split, in manifest order."""
        size = self.config.batch_size
        return images.iter_batches(
            shard_batches(len(images), size, rank=self.rank, workers=self.workers)
        )

    # ------------------------------------------------------------------ other things to do

    def _run_probe(self) -> EpochMetrics:
        """Fit the head on frozen features, and put it into the network and its average."""
        started = time.perf_counter()
        views = self.config.probe.views if self.learner.augment.recipe.hflip else 1

        def beating(images: ImageDataset) -> Iterator[Batch]:
            for batch in self._iter_sharded(images):
                yield batch
                self._sync_control(self.standing)

        train = linear_probe.extract_features(self.learner, beating(self.train), views)
        val = linear_probe.extract_features(self.learner, beating(self.val), 1)
        computed = time.perf_counter()
        overflowed = linear_probe.count_non_finite(train) + linear_probe.count_non_finite(val)
        if overflowed:
            remedy = "" if self.place.precision == "fp32" else "; run it with --precision fp32"
            raise StopTraining(
                kind="failed",
                problem=f"the features of {overflowed:,} views of images are NaN or too large in "
                f"{self.place.precision}{remedy}, or start from other model.weights",
            )
        head = linear_probe.fit_head(
            train,
            val,
            self.work.num_classes,
            l2=self.config.probe.l2,
            weights=self.learner.loss.weights,
        )
        for network in {self.learner.network, self.learner.judged}:
            linear_probe.install_head(network, head, self.work.head_coefficients)
        learnt, verdict = (
            linear_probe.evaluate_head(head, split, self.work.num_classes) for split in (train, val)
        )
        fitted = time.perf_counter()
        self._post(
            f"probe: {learnt.rows:,} features in {computed - started:.1f} s, head fitted in "
            f"{fitted - computed:.1f} s, l2 {head.l2:g}"
        )
        return EpochMetrics(
            epoch=0,
            phase="probe",
            train_loss=learnt.loss,
            train_accuracy=learnt.accuracy,
            val_loss=verdict.loss,
            val_accuracy=verdict.accuracy,
            val_balanced_accuracy=verdict.balanced_accuracy,
            lr=math.nan,
            images_per_second=learnt.rows / (computed - started),
            seconds=fitted - started,
            train_rows=learnt.rows // views,
            val_rows=verdict.rows,
        )

    def _run_lr_finder(self) -> tuple[tuple[float, float], ...]:
        """Losses while the learning rate grows from step to step; ends when they blow up."""
        if strategy.has_probe(self.work.strategy):
            self._run_probe()
        self.learner.set_trainable(1)
        test = LrFinder(self.learner.optimizer)
        for epoch in itertools.count(1):
            for step, hand, batch in self._iter_steps(epoch):
                test.set_lr()
                self.learner.seed_rng(epoch, step)
                loss, _ = all_reduce_sum(
                    self.learner.step(batch, hand.global_batch_size, len(test.curve))
                )
                test.record(loss / hand.global_batch_size)
                if test.is_over:
                    return tuple(test.curve)
                self._sync_control(self.standing)
        raise AssertionError("unreachable")

    # ------------------------------------------------------------------ small parts

    def _check_failures(self, failed: int, good: int) -> None:
        """End when more images fail than allowed; after a decoded cache there are none."""
        rows = failed + good
        if failed > self.config.data.max_error_rate * rows:
            raise StopTraining(kind="failures", failed=(failed, rows))

    def _post_failures(self, batch: Batch, epoch: int) -> None:
        if epoch <= 1:
            for failure in batch.failures[:3]:
                self.board.post.remote(f"left out: {failure.url}: {failure.error}")

    def _post(self, post: str | EpochMetrics) -> None:
        """Post, and wait until it is there: calls of an async actor may overtake each other."""
        if self.rank == 0:
            ray.get(self.board.post.remote(post))


def is_stalled(
    history: tuple[EpochMetrics, ...], config: EarlyStoppingConfig, by: SelectionMetric
) -> bool:
    """Whether the last `patience` epochs brought no improvement."""
    if config.patience is None:
        return False
    sign = -1.0 if by == "val_loss" else 1.0
    best, since = -math.inf, 0
    for epoch in history:
        value = sign * getattr(epoch, by)
        if value > best + config.min_delta:
            best, since = value, 0
        else:
            since += 1
    return since >= config.patience
