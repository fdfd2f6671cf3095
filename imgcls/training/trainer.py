"""Trainer: the training loop that every worker runs.

It fits the linear probe, trains the epochs, validates each of them, keeps the best weights, saves
the state and resumes from it. All workers make the same decisions at the same step, because every
number they decide on is summed over all workers first. A run that was killed and resumed takes the
same steps as an undisturbed one.
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

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.models.bundle import Architecture
from imgcls.models.finite import find_non_finite
from imgcls.training.checkpoints import Checkpoints, TrainProgress
from imgcls.training.config import EarlyStoppingConfig, Strategy, TrainConfig
from imgcls.training.control_sync import ControlSync
from imgcls.training.data.batches import Batch, ImageDataset
from imgcls.training.data.cached import CachedImages
from imgcls.training.data.streaming import StreamedImages
from imgcls.training.data.targets import TargetTable
from imgcls.training.epoch_metrics import EpochMetrics, SelectionMetric, TrainLoopResult
from imgcls.training.network import limit_norm_windows
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
from imgcls.training.step_totals import StepTotals
from imgcls.training.train_step import TrainStep, WorkerContext
from imgcls.training.validation import (
    EvalMetrics,
    all_reduce_sum,
    create_accumulator,
    shard_batches,
)
from imgcls.training.validation_predictions import PredictionRecorder


@dataclass(frozen=True)
class TrainLoopSpec:
    """Everything that a worker needs.

    targets:           the TargetTable; Ray's object reference of it until a worker has loaded it
    classes:           their names
    initial_weights:   Ray object reference of the initial state dict
    images:            source of the decoded images
    class_weights:     per class, for the loss; None for equal weights
    head_coefficients: see `network.compute_head_coefficients`; empty without a probe
    """

    config: TrainConfig
    strategy: Strategy
    architecture: Architecture
    targets: Any
    classes: list[str]
    initial_weights: Any
    preprocess: Preprocess
    images: CachedImages | StreamedImages
    class_weights: list[float] | None
    head_coefficients: tuple[float, ...]


class StopTraining(Exception):
    """Raised by all workers at the same step to end the training loop early.

    fields: of the TrainLoopResult
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)
        self.fields = fields


@dataclass(frozen=True)
class EpochTotals:
    """Sums over the steps of an epoch and all workers; of one worker they are a (6,) tensor."""

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
    """The training loop of one worker."""

    def __init__(
        self, spec: TrainLoopSpec, context: WorkerContext, network: nn.Module, channel: Any
    ) -> None:
        config = spec.config
        self.spec, self.config, self.channel = spec, config, channel
        self.rank, self.workers, self.device = context.rank, context.world_size, context.device
        self.context = context
        self.train: ImageDataset = spec.images.load_split(held=False)
        self.val: ImageDataset = spec.images.load_split(held=True)
        self.targets: TargetTable = spec.targets
        self.steps = steps_per_epoch(len(self.train), config.images_per_step, self.workers)
        if spec.strategy == "scratch":
            limit_norm_windows(network, self.steps * config.num_epochs * config.scale.accumulate)
        self.train_step = TrainStep(
            config,
            spec.strategy,
            spec.preprocess,
            spec.class_weights,
            self.targets,
            network,
            context,
        )
        self.control = ControlSync(
            channel, self.device, save_interval_s=60 * config.checkpoint_minutes
        )
        self.recorder = self._create_recorder()
        self.checkpoints = Checkpoints(config.output)
        self.progress = TrainProgress()

    # ------------------------------------------------------------------ the run

    def run(self, report: Callable[[EpochMetrics], None]) -> TrainLoopResult:
        """Run all epochs; every worker calls `report` with the metrics of every epoch."""
        try:
            if self.config.find_lr:
                return self._build_result(lr_curve=self._run_lr_finder())
            self._resume()
            while not self._is_done():
                report(self._run_next_epoch())
            self.checkpoints.wait_until_saved()
        except StopTraining as end:
            return self._build_result(**end.fields)
        return self._build_result()

    def _build_result(self, **fields: Any) -> TrainLoopResult:
        return TrainLoopResult(self.progress.history, self.context.precision, **fields)

    def _is_done(self) -> bool:
        history = self.progress.history
        if not history:
            return False
        return (
            self.spec.strategy == "probe"
            or history[-1].epoch >= self.config.num_epochs
            or is_stalled(history, self.config.early_stopping, self.config.best_by)
        )

    def _run_next_epoch(self) -> EpochMetrics:
        """Run the probe or one epoch, post its metrics and save the state."""
        probes = strategy.has_probe(self.spec.strategy) and not self.progress.history
        epoch = self._run_probe() if probes else self._train_epoch()
        history = (*self.progress.history, epoch)
        better = epoch.is_better_than(self.progress.best_epoch, self.config.best_by)
        best = len(history) - 1 if better else self.progress.best
        self.progress = TrainProgress(epoch=epoch.epoch + 1, history=history, best=best)
        self._post(epoch)
        self._save(self.progress, best=better)
        return epoch

    # ------------------------------------------------------------------ saving and resuming

    def _resume(self) -> None:
        """Load the newest complete state, the same on all workers."""
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
                f"{self.checkpoints.folder} is not the same for all workers. Pass an --output that "
                "every node can reach."
            )
        saved, state = found
        self.train_step.load_state_dict(state)
        self.progress = saved.progress
        step = f", step {saved.progress.step} of {self.steps}" if saved.progress.step else ""
        self._post(f"resuming: epoch {saved.progress.epoch}{step}")

    def _save(self, progress: TrainProgress, *, best: bool = False) -> None:
        """Save the state. Every worker calls it, because running statistics are averaged first.

        best: also keep the weights, and the predictions that `recorder` has
        """
        self.train_step.average_running_stats()
        self.control.mark_saved()
        found = self.recorder.gather(self.rank, self.workers, self.device) if best else None
        if self.rank == 0:
            state = self.train_step.state_dict()
            kept = self.train_step.get_weights(state) if best else None
            self.checkpoints.save(progress, state, kept, found)

    def _sync_control(self, progress: TrainProgress, totals: StepTotals | None = None) -> None:
        """Save or stop if the workers agree to; `progress` and `totals` are the state to save."""
        decision = self.control.step(True if totals is None else torch.isfinite(totals.scores[0]))
        if decision is None:
            return
        if not decision.is_finite:
            raise StopTraining(
                failure_kind="diverged",
                problem=f"train_loss is NaN or infinite in epoch {progress.epoch}",
            )
        # an LR range test has no state, and the folder may hold that of an unfinished training
        if (decision.should_stop or decision.should_save) and not self.config.find_lr:
            if totals is not None:
                progress = replace(progress, totals=tuple(all_reduce_sum(totals.to_tensor())))
            self._save(progress)
        if decision.should_stop:
            self.checkpoints.wait_until_saved()
            raise StopTraining

    # ------------------------------------------------------------------ an epoch

    def _train_epoch(self) -> EpochMetrics:
        number = max(1, self.progress.epoch)
        self.progress = replace(self.progress, epoch=number)
        self.train_step.set_trainable(number)
        local = self._train_steps(number)
        totals = EpochTotals.all_reduce(local)
        trained = time.perf_counter()
        self.train_step.average_running_stats()
        done = replace(self.progress, step=self.steps, totals=tuple(all_reduce_sum(local)))
        val_metrics, val_failed = self._evaluate(done)
        train_failed = int(totals.failed)
        self._check_failures((train_failed, int(totals.rows)), (val_failed, val_metrics.rows))
        for name, value in (("train_loss", totals.loss), ("val_loss", val_metrics.loss)):
            if not math.isfinite(value):
                raise StopTraining(
                    failure_kind="diverged", problem=f"{name} is {value} in epoch {number}"
                )
        # the losses can be finite while a tensor is not, e.g. an infinite running variance
        for name in find_non_finite(self.train_step.eval_network.state_dict()):
            problem = f"the tensor {name!r} holds NaN or infinity in epoch {number}"
            raise StopTraining(failure_kind="diverged", problem=problem)
        seconds = (totals.wait_s + totals.compute_s) / self.workers
        return EpochMetrics(
            epoch=number,
            train_loss=totals.loss / totals.rows,
            train_accuracy=totals.correct / totals.rows,
            val_loss=val_metrics.loss,
            val_accuracy=val_metrics.accuracy,
            lr=max(group["lr"] for group in self.train_step.optimizer.param_groups),
            images_per_second=totals.rows / seconds,
            seconds=seconds + time.perf_counter() - trained,
            train_rows=int(totals.rows),
            val_rows=val_metrics.rows,
            val_balanced_accuracy=val_metrics.balanced_accuracy,
            val_mean_average_precision=val_metrics.mean_average_precision,
            wait_seconds=totals.wait_s / self.workers,
            compute_seconds=totals.compute_s / self.workers,
            train_failed=train_failed,
            val_failed=val_failed,
        )

    def _train_steps(self, number: int) -> torch.Tensor:
        """Run the remaining steps of an epoch; (6,) float64, this worker's EpochTotals."""
        totals = StepTotals(self.device, self.progress.totals if self.rank == 0 else ())
        mark = time.perf_counter()
        for step, share, batch in self._iter_steps(number, self.progress.step):
            totals.timer.start(time.perf_counter() - mark)
            at = (number - 1) * self.steps + step
            last = self.steps * self.config.num_epochs
            set_learning_rates(self.train_step.optimizer, self.config.optim, at, last)
            self.train_step.seed_rng(number, step)
            totals.scores += self.train_step.step(batch, share.global_batch_size, at)
            totals.timer.stop()
            totals.add_images(len(batch.labels), len(batch.failures))
            self._post_failures(batch, number)
            self._sync_control(replace(self.progress, step=step + 1), totals)
            mark = time.perf_counter()
        return totals.to_tensor()

    def _iter_steps(self, epoch: int, first: int = 0) -> Iterator[tuple[int, StepShare, Batch]]:
        """The steps of an epoch from step `first`, with this worker's images."""
        if self.config.data.sampling == "balanced":
            classes = self.targets.decide(self.train.labels).numpy()
            order = sample_balanced(classes, epoch=epoch, seed=self.config.seed)
        else:
            order = shuffle_rows(len(self.train), epoch=epoch, seed=self.config.seed)
        size, rank, workers = self.config.images_per_step, self.rank, self.workers
        shares = list(iter_step_shares(order, size, rank=rank, workers=workers, start=first))
        batches = self.train.iter_batches([share.rows for share in shares])
        for step, (share, batch) in enumerate(zip(shares, batches, strict=True), start=first):
            yield step, share, batch

    @torch.inference_mode()
    def _evaluate(self, progress: TrainProgress) -> tuple[EvalMetrics, int]:
        """Metrics of all validation rows, and the number that could not be decoded."""
        self.train_step.eval_network.eval()
        targets = self.targets
        accumulator = create_accumulator(targets.task, targets.num_classes, self.device)
        self.recorder = self._create_recorder()
        failed = 0
        for batch in self._iter_sharded(self.val):
            self.recorder.add_rows(batch.rows, batch.failures)
            if len(batch.labels):
                logits = self.train_step.predict_logits(batch.pixels)
                codes = self.train_step.targets_to_device(batch.labels)
                accumulator.update(logits, codes)
                self.recorder.update(logits, codes)
            failed += len(batch.failures)
            self._post_failures(batch, progress.epoch)
            self._sync_control(progress)
        (total,) = all_reduce_sum(torch.tensor([float(failed)], device=self.device))
        return accumulator.compute(), int(total)

    def _create_recorder(self) -> PredictionRecorder:
        return PredictionRecorder(self.targets.task, self.spec.classes, len(self.val))

    def _iter_sharded(self, images: ImageDataset) -> Iterator[Batch]:
        """The batches of this worker's part of a split, in manifest order."""
        size = self.config.images_per_step
        return images.iter_batches(
            shard_batches(len(images), size, rank=self.rank, workers=self.workers)
        )

    # ------------------------------------------------------------------ probe and LR range test

    def _run_probe(self) -> EpochMetrics:
        """Fit the head on frozen features and install it in the network and its moving average."""
        started = time.perf_counter()
        self.recorder = self._create_recorder()
        views = self.config.probe.views if self.train_step.augment.recipe.hflip else 1
        counts = torch.zeros(2, 2, dtype=torch.float64, device=self.device)

        def iter_synced(images: ImageDataset) -> Iterator[Batch]:
            for batch in self._iter_sharded(images):
                if images is self.val:
                    self.recorder.add_rows(batch.rows, batch.failures)
                split = int(images is self.val)
                counts[split] += counts.new_tensor([len(batch.failures), len(batch.labels)])
                self._post_failures(batch, 0)
                yield batch
                self._sync_control(self.progress)

        train = linear_probe.extract_features(self.train_step, iter_synced(self.train), views)
        val = linear_probe.extract_features(self.train_step, iter_synced(self.val), 1)
        train_failed, train_rows, val_failed, val_rows = map(int, all_reduce_sum(counts.flatten()))
        self._check_failures((train_failed, train_rows), (val_failed, val_rows))
        computed = time.perf_counter()
        overflowed = linear_probe.count_non_finite(train) + linear_probe.count_non_finite(val)
        if overflowed:
            remedy = "" if self.context.precision == "fp32" else "; pass --precision fp32"
            raise StopTraining(
                failure_kind="failed",
                problem=f"the features of {overflowed:,} views of images are NaN or too large in "
                f"{self.context.precision}{remedy}, or other model.weights",
            )
        head = linear_probe.fit_head(
            train,
            val,
            self.targets.num_classes,
            l2=self.config.probe.l2,
            weights=self.train_step.loss.weights,
        )
        for network in {self.train_step.network, self.train_step.eval_network}:
            linear_probe.install_head(network, head, self.spec.head_coefficients)
        train_metrics, val_metrics = (
            linear_probe.evaluate_head(head, split, self.targets.num_classes, recorder=recorder)
            for split, recorder in ((train, None), (val, self.recorder))
        )
        fitted = time.perf_counter()
        self._post(
            f"probe: {train_metrics.rows:,} features in {computed - started:.1f} s, head fitted in "
            f"{fitted - computed:.1f} s, l2 {head.l2:g}"
        )
        return linear_probe.describe_probe(
            train_metrics,
            val_metrics,
            views=views,
            failed=(train_failed, val_failed),
            feature_seconds=computed - started,
            seconds=fitted - started,
        )

    def _run_lr_finder(self) -> tuple[tuple[float, float], ...]:
        """Losses while the learning rate rises from step to step, until they diverge."""
        if strategy.has_probe(self.spec.strategy):
            self._run_probe()
        self.train_step.set_trainable(1)
        finder = LrFinder(self.train_step.optimizer)
        for epoch in itertools.count(1):
            for step, share, batch in self._iter_steps(epoch):
                finder.set_lr()
                self.train_step.seed_rng(epoch, step)
                loss, _ = all_reduce_sum(
                    self.train_step.step(batch, share.global_batch_size, len(finder.curve))
                )
                finder.record(loss / share.global_batch_size)
                if finder.is_over:
                    return tuple(finder.curve)
                self._sync_control(self.progress)
        raise AssertionError("unreachable")

    # ------------------------------------------------------------------ messages and failures

    def _check_failures(self, train: tuple[int, int], val: tuple[int, int]) -> None:
        """Stop when more images failed than allowed (only when images are decoded per epoch).

        train, val: numbers of images that failed and of all others
        """
        failed, rows = train[0] + val[0], sum(train) + sum(val)
        problem = None
        for name, (_, good) in (("training", train), ("validation", val)):
            if not good:
                problem = f"none of the {name} images can be used"
        if problem or failed > self.config.data.max_error_rate * rows:
            raise StopTraining(
                failure_kind="failures", failed_images=(failed, rows), problem=problem
            )

    def _post_failures(self, batch: Batch, epoch: int) -> None:
        if epoch <= (0 if strategy.has_probe(self.spec.strategy) else 1):
            for failure in batch.failures[:3]:
                self.channel.post.remote(f"left out: {failure.url}: {failure.error}")

    def _post(self, item: str | EpochMetrics) -> None:
        """Post and wait for the delivery: calls to an async actor can overtake each other."""
        if self.rank == 0:
            ray.get(self.channel.post.remote(item))


def is_stalled(
    history: tuple[EpochMetrics, ...], config: EarlyStoppingConfig, by: SelectionMetric
) -> bool:
    """Whether the last `patience` epochs did not improve on the best before them."""
    if config.patience is None:
        return False
    sign = -1.0 if by == "val_loss" else 1.0
    best, epochs_since = -math.inf, 0
    for epoch in history:
        value = sign * getattr(epoch, by)
        if value > best + config.min_delta:
            best, epochs_since = value, 0
        else:
            epochs_since += 1
    return epochs_since >= config.patience
