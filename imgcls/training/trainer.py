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
from imgcls.models.finite import find_not_finite
from imgcls.training.checkpoints import Checkpoints, Standing
from imgcls.training.config import StopConfig, TrainConfig
from imgcls.training.control_sync import Pulse
from imgcls.training.data.batches import Batch, Images
from imgcls.training.data.cached import Decoded
from imgcls.training.data.streaming import Streamed
from imgcls.training.epoch_metrics import Criterion, Epoch
from imgcls.training.optim import linear_probe, strategy
from imgcls.training.optim.lr_finder import RangeTest
from imgcls.training.optim.optimizer import set_rates
from imgcls.training.sampler import Hand, balanced, deal, shuffled, steps_per_epoch
from imgcls.training.train_step import Learner, Place
from imgcls.training.validation import Tally, Verdict, shares, summed


@dataclass(frozen=True)
class Work:
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
    classes: int
    weights: Any
    preprocess: Preprocess
    images: Decoded | Streamed
    class_weights: list[float] | None
    head_shares: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What the workers came to.

    precision: what `auto` came to
    kind:      None when all was well; `diverged`, `failures` (too many images cannot be decoded) or
        `failed` (a worker did, and would again)
    problem:   in words
    failed:    images that cannot be decoded, of how many, when these are too many
    stopped:   whether it was told to stop, and has saved
    lr_curve:  (learning rate, loss) pairs of an LR range test
    """

    history: tuple[Epoch, ...]
    precision: str
    kind: str | None = None
    problem: str | None = None
    failed: tuple[int, int] = (0, 0)
    stopped: bool = False
    lr_curve: tuple[tuple[float, float], ...] = ()


class Ended(Exception):
    """The workers have agreed to end before the last epoch."""

    def __init__(self, **outcome: Any) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@dataclass(frozen=True)
class Totals:
    """What the steps of an epoch add up to: of one worker as a tensor, of all as numbers."""

    loss: float
    correct: float
    rows: float
    wait: float
    compute: float
    failed: float

    @classmethod
    def over_all(cls, totals: torch.Tensor) -> Totals:
        return cls(*summed(totals.clone()))


class Trainer:
    """One worker: its learner, its rows and what they came to."""

    def __init__(self, work: Work, place: Place, network: nn.Module, board: Any) -> None:
        config = work.config
        self.work, self.config, self.board = work, config, board
        self.rank, self.workers, self.device = place.rank, place.workers, place.device
        self.place = place
        self.train: Images = work.images.split(held=False)
        self.val: Images = work.images.split(held=True)
        self.learner = Learner(
            config,
            work.strategy,
            work.preprocess,
            work.class_weights,
            work.classes,
            network,
            place,
        )
        self.steps = steps_per_epoch(len(self.train), config.batch_size, self.workers)
        self.pulse = Pulse(board, self.device, save_seconds=60 * config.checkpoint_minutes)
        self.checkpoints = Checkpoints(config.output)
        self.standing = Standing()

    # ------------------------------------------------------------------ the run

    def run(self, report: Callable[[Epoch], None]) -> Outcome:
        """Train to the end; report is called with every epoch by every worker."""
        try:
            if self.config.find_lr:
                return self._outcome(lr_curve=self._range_test())
            self._resume()
            while not self._is_done():
                report(self._next())
            self.checkpoints.wait()
        except Ended as end:
            return self._outcome(**end.outcome)
        return self._outcome()

    def _outcome(self, **what: Any) -> Outcome:
        return Outcome(self.standing.history, self.place.precision, **what)

    def _is_done(self) -> bool:
        history = self.standing.history
        if not history:
            return False
        return (
            self.work.strategy == "probe"
            or history[-1].epoch >= self.config.epochs
            or is_stalled(history, self.config.early_stopping, self.config.best_by)
        )

    def _next(self) -> Epoch:
        """The probe or an epoch; judged, told and saved."""
        probes = strategy.has_probe(self.work.strategy) and not self.standing.history
        epoch = self._probe() if probes else self._epoch()
        history = (*self.standing.history, epoch)
        better = epoch.better_than(self.standing.best_epoch, self.config.best_by)
        best = len(history) - 1 if better else self.standing.best
        self.standing = Standing(epoch=epoch.epoch + 1, history=history, best=best)
        self._say(epoch)
        self._save(self.standing, best=better)
        return epoch

    # ------------------------------------------------------------------ saving and going on

    def _resume(self) -> None:
        """Go on from the newest whole state, the same for all workers."""
        found = self.checkpoints.latest() if self.rank == 0 else None
        number = torch.tensor(found[0].number if found else 0, device=self.device)
        dist.broadcast(number, 0)
        if int(number) == 0:
            return
        if self.rank == 0:
            self.checkpoints.discard_after(int(number))
        else:
            found = self.checkpoints.latest(at_most=int(number))
        if found is None or found[0].number != int(number):
            raise RuntimeError(
                f"{self.checkpoints.folder} is not the same for all workers; give an --output that "
                "every machine reaches"
            )
        saved, state = found
        self.learner.load(state)
        self.standing = saved.standing
        step = f", step {saved.standing.step} of {self.steps}" if saved.standing.step else ""
        self._say(f"going on: epoch {saved.standing.epoch}{step}")

    def _save(self, standing: Standing, *, best: bool = False) -> None:
        """Save the state; called by all workers, as running statistics are averaged first."""
        self.learner.average_statistics()
        self.pulse.saved()
        if self.rank == 0:
            state = self.learner.state()
            kept = state["average"] or state["network"]
            self.checkpoints.save(standing, state, kept if best else None)

    def _beat(self, standing: Standing, totals: torch.Tensor | None = None) -> None:
        """See whether all are to save or end; `standing` and `totals` are what would be saved."""
        agreed = self.pulse.beat(True if totals is None else torch.isfinite(totals[0]))
        if agreed is None:
            return
        if not agreed.finite:
            raise Ended(kind="diverged", problem=f"train_loss is nan in epoch {standing.epoch}")
        # a range test has nothing to save, and an unfinished training may lie where it would
        if (agreed.stop or agreed.save) and not self.config.find_lr:
            if totals is not None:
                standing = replace(standing, totals=tuple(summed(totals.clone())))
            self._save(standing)
        if agreed.stop:
            self.checkpoints.wait()
            raise Ended(stopped=True)

    # ------------------------------------------------------------------ an epoch

    def _epoch(self) -> Epoch:
        number = max(1, self.standing.epoch)
        self.standing = replace(self.standing, epoch=number)
        self.learner.free(number)
        local = self._learn(number)
        totals = Totals.over_all(local)
        learnt = time.perf_counter()
        self.learner.average_statistics()
        done = replace(self.standing, step=self.steps, totals=tuple(summed(local)))
        verdict, val_failed = self._evaluate(done)
        for name, value in (("train_loss", totals.loss), ("val_loss", verdict.loss)):
            if not math.isfinite(value):
                raise Ended(kind="diverged", problem=f"{name} is {value} in epoch {number}")
        # an infinite running variance, for one, leaves the losses finite
        for name in find_not_finite(self.learner.judged.state_dict()):
            problem = f"the tensor {name!r} holds NaN or infinity in epoch {number}"
            raise Ended(kind="diverged", problem=problem)
        self._check_failures(int(totals.failed) + val_failed, int(totals.rows) + verdict.rows)
        seconds = (totals.wait + totals.compute) / self.workers
        return Epoch(
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
            wait_seconds=totals.wait / self.workers,
            compute_seconds=totals.compute / self.workers,
            train_failed=int(totals.failed),
            val_failed=val_failed,
        )

    def _learn(self, number: int) -> torch.Tensor:
        """The steps of an epoch that are not yet done; (6,) float64, this worker's Totals."""
        totals = torch.zeros(6, dtype=torch.float64, device=self.device)
        if self.rank == 0 and self.standing.totals:
            totals += torch.tensor(self.standing.totals, dtype=torch.float64, device=self.device)
        mark = time.perf_counter()
        for step, hand, batch in self._steps(number, self.standing.step):
            arrived = time.perf_counter()
            at = (number - 1) * self.steps + step
            last = self.steps * self.config.epochs
            set_rates(self.learner.optimizer, self.config.optim, at, last)
            self.learner.seed(number, step)
            totals[:2] += self.learner.step(batch, hand.batch, at)
            self._tell_failures(batch, number)
            finished = time.perf_counter()
            spent = (len(batch.labels), arrived - mark, finished - arrived, len(batch.failures))
            totals[2:] += torch.tensor(spent, dtype=torch.float64, device=self.device)
            mark = finished
            self._beat(replace(self.standing, step=step + 1), totals)
        return totals

    def _steps(self, epoch: int, first: int = 0) -> Iterator[tuple[int, Hand, Batch]]:
        """The steps of an epoch from the first on, with this worker's images."""
        if self.config.data.sampling == "balanced":
            order = balanced(self.train.labels, epoch=epoch, seed=self.config.seed)
        else:
            order = shuffled(len(self.train), epoch=epoch, seed=self.config.seed)
        size, rank, workers = self.config.batch_size, self.rank, self.workers
        hands = list(deal(order, size, rank=rank, workers=workers, start=first))
        batches = self.train.batches([hand.rows for hand in hands])
        for place, (hand, batch) in enumerate(zip(hands, batches, strict=True)):
            yield first + place, hand, batch

    @torch.inference_mode()
    def _evaluate(self, standing: Standing) -> tuple[Verdict, int]:
        """All validation rows, shared out; and how many could not be decoded."""
        self.learner.judged.eval()
        tally = Tally(self.work.classes, self.device)
        failed = 0
        for batch in self._shared(self.val):
            if len(batch.labels):
                tally.add(self.learner.logits(batch.pixels), self.learner.labels(batch.labels))
            failed += len(batch.failures)
            self._tell_failures(batch, standing.epoch)
            self._beat(standing)
        (total,) = summed(torch.tensor([float(failed)], device=self.device))
        return tally.verdict(), int(total)

    def _shared(self, images: Images) -> Iterator[Batch]:
        """This worker's share of a split, in manifest order."""
        size = self.config.batch_size
        return images.batches(shares(len(images), size, rank=self.rank, workers=self.workers))

    # ------------------------------------------------------------------ other things to do

    def _probe(self) -> Epoch:
        """Fit the head on frozen features, and put it into the network and its average."""
        started = time.perf_counter()
        views = self.config.probe.views if self.learner.augment.recipe.hflip > 0 else 1

        def beating(images: Images) -> Iterator[Batch]:
            for batch in self._shared(images):
                yield batch
                self._beat(self.standing)

        train = linear_probe.features(self.learner, beating(self.train), views)
        val = linear_probe.features(self.learner, beating(self.val), 1)
        computed = time.perf_counter()
        overflowed = linear_probe.count_not_finite(train) + linear_probe.count_not_finite(val)
        if overflowed:
            remedy = "" if self.place.precision == "fp32" else "; run it with --precision fp32"
            raise Ended(
                kind="failed",
                problem=f"the features of {overflowed:,} views of images are NaN or too large in "
                f"{self.place.precision}{remedy}, or start from other model.weights",
            )
        head = linear_probe.fit(
            train,
            val,
            self.work.classes,
            l2=self.config.probe.l2,
            weights=self.learner.loss.weights,
        )
        for network in {self.learner.network, self.learner.judged}:
            linear_probe.install(network, head, self.work.head_shares)
        learnt, verdict = (
            linear_probe.judge(head, split, self.work.classes) for split in (train, val)
        )
        fitted = time.perf_counter()
        self._say(
            f"probe: {learnt.rows:,} features in {computed - started:.1f} s, head fitted in "
            f"{fitted - computed:.1f} s, l2 {head.l2:g}"
        )
        return Epoch(
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

    def _range_test(self) -> tuple[tuple[float, float], ...]:
        """Losses while the learning rate grows from step to step; ends when they blow up."""
        if strategy.has_probe(self.work.strategy):
            self._probe()
        self.learner.free(1)
        test = RangeTest(self.learner.optimizer)
        for epoch in itertools.count(1):
            for step, hand, batch in self._steps(epoch):
                test.set_rate()
                self.learner.seed(epoch, step)
                loss, _ = summed(self.learner.step(batch, hand.batch, len(test.curve)))
                test.add(loss / hand.batch)
                if test.is_over:
                    return tuple(test.curve)
                self._beat(self.standing)
        raise AssertionError("unreachable")

    # ------------------------------------------------------------------ small parts

    def _check_failures(self, failed: int, good: int) -> None:
        """End when more images fail than allowed; after a decoded cache there are none."""
        rows = failed + good
        if failed > self.config.data.max_error_rate * rows:
            raise Ended(kind="failures", failed=(failed, rows))

    def _tell_failures(self, batch: Batch, epoch: int) -> None:
        if epoch <= 1:
            for failure in batch.failures[:3]:
                self.board.post.remote(f"left out: {failure.url}: {failure.error}")

    def _say(self, post: str | Epoch) -> None:
        """Post, and wait until it is there: calls of an async actor may overtake each other."""
        if self.rank == 0:
            ray.get(self.board.post.remote(post))


def is_stalled(history: tuple[Epoch, ...], config: StopConfig, by: Criterion) -> bool:
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
