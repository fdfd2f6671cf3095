"""Metrics of one epoch: the record, its line in the log, and which epoch is the best.

The result of the training loop, which returns them, is defined here too: Ray Train's controller
reads it, and should not import the loop for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

SelectionMetric = Literal["val_loss", "val_accuracy", "val_mean_average_precision"]


@dataclass(frozen=True)
class EpochMetrics:
    """Metrics of one pass over the training rows, and of all validation rows after it.

    Losses are in nats per image, accuracies in [0, 1]. train_loss and train_accuracy are those of
    the steps, computed while the weights changed. Epoch 0 is the linear probe.

    lr:                    highest learning rate of the last step; NaN for the probe
    images_per_second:     training images by the training time of all workers together
    seconds:               duration of the epoch, validation included
    val_balanced_accuracy: mean recall of the classes that have validation rows
    val_mean_average_precision: mean over classes, for multilabel; see `validation.EvalMetrics`
        for the accuracies there
    wait_seconds:          time per worker in which its device was idle until images arrived
    compute_seconds:       the rest of the training time per worker
    train_failed, val_failed:      images left out because they could not be decoded
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    lr: float
    images_per_second: float
    seconds: float
    train_rows: int
    val_rows: int
    val_balanced_accuracy: float = math.nan
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    train_failed: int = 0
    val_failed: int = 0
    phase: Literal["probe", "train"] = "train"
    val_mean_average_precision: float | None = None

    def format_line(self, epochs: int) -> str:
        """The line of this epoch in the log.

        epochs: number of epochs of the training
        """
        width = len(str(epochs))
        metrics = (
            f"  train loss {self.train_loss:.3f} acc {100 * self.train_accuracy:5.1f} %"
            f"  val loss {self.val_loss:.3f} {self.format_quality(5)}"
        )
        if self.phase == "probe":
            return f"probe {'':{2 * width + 1}}{metrics}  {self.seconds:.1f} s"
        busy = self.wait_seconds + self.compute_seconds
        waiting = self.wait_seconds / busy if busy else 0.0
        return (
            f"epoch {self.epoch:{width}}/{epochs}{metrics}  lr {self.lr:.1e}"
            f"  {self.images_per_second:,.0f} images/s (waiting {waiting:.0%})"
            f"  {self.seconds:.1f} s"
        )

    def format_quality(self, width: int = 0) -> str:
        """The validation accuracy, or the mAP for multilabel."""
        if self.val_mean_average_precision is None:
            return f"acc {100 * self.val_accuracy:{width}.1f} %"
        return f"mAP {100 * self.val_mean_average_precision:{width}.1f} %"

    def get_numbers(self) -> dict[str, float]:
        """All metrics but the number of the epoch, as the metric loggers take them."""
        return {
            name: float(value)
            for name, value in asdict(self).items()
            if isinstance(value, (int, float)) and name != "epoch"
        }

    @property
    def name(self) -> str:
        return "the probe" if self.phase == "probe" else f"epoch {self.epoch}"

    def is_better_than(self, other: EpochMetrics | None, by: SelectionMetric) -> bool:
        """Compare by validation loss, or by another metric and then validation loss."""
        if other is None:
            return True
        if by == "val_loss":
            return self.val_loss < other.val_loss
        values = ((getattr(each, by), -each.val_loss) for each in (self, other))
        return next(values) > next(values)


@dataclass(frozen=True)
class TrainLoopResult:
    """Result of the training loop, the same on every worker.

    precision:     the precision used, also when the request is `auto`
    failure_kind:  None on success; `diverged`, `failures` (too many images cannot be decoded) or
        `failed` (a worker failed, and would again)
    problem:       the failure as text
    failed_images: numbers of images that cannot be decoded and of all images, for `failures`
    lr_curve:      (learning rate, loss) pairs of an LR range test
    """

    history: tuple[EpochMetrics, ...]
    precision: str
    failure_kind: str | None = None
    problem: str | None = None
    failed_images: tuple[int, int] = (0, 0)
    lr_curve: tuple[tuple[float, float], ...] = ()


def format_selection_note(
    history: Sequence[EpochMetrics], best: EpochMetrics, *, lr: float
) -> str | None:
    """The warning about the kept epoch; None without one.

    Another epoch is more accurate than the one with the best loss, or fine-tuning did not improve
    on its linear probe.

    best: the epoch whose weights are kept
    lr:   optim.lr, for the advice
    """
    note = _format_accuracy_note(history, best)
    if note is None and history[0].phase == "probe" and len(history) > 1:
        note = _format_probe_note(history, best, lr)
    return note


def _format_accuracy_note(history: Sequence[EpochMetrics], best: EpochMetrics) -> str | None:
    """The note about an epoch that is more accurate than the kept one by two standard errors.

    The errors are those of (k + 1) of (n + 2) images, which are not 0 for none and all of them.
    """
    other = max(history, key=lambda each: each.val_accuracy)
    rows = best.val_rows
    is_single_label = best.val_mean_average_precision is None
    if other.phase == "probe" or not is_single_label or rows == 0:
        return None
    shares = [(each.val_accuracy * rows + 1) / (rows + 2) for each in (best, other)]
    error = math.sqrt(sum(share * (1 - share) for share in shares) / (rows + 2))
    if other.val_accuracy - best.val_accuracy <= 2 * error:
        return None
    return (
        f"{best.name} is kept for its val loss ({best.val_loss:.3f}), but {other.name} has a "
        f"higher val acc ({other.val_accuracy:.1%}; {best.name} {best.val_accuracy:.1%}); pass "
        "--best-by val_accuracy to keep the more accurate one"
    )


def _format_probe_note(
    history: Sequence[EpochMetrics], best: EpochMetrics, lr: float
) -> str | None:
    probe, last = history[0], history[-1]
    remedy = (
        "Fine-tuning overfits few images, or changes the weights too much: lower optim.lr "
        f"({lr:g}), freeze lower layers (finetune.unfreeze_every), add images, or train only the "
        "probe (--strategy probe)"
    )
    if best.phase == "probe":
        return (
            "no epoch was better than the probe; the bundle holds the probe (val "
            f"{probe.format_quality()}, loss {probe.val_loss:.3f}; after the last epoch "
            f"{last.format_quality().partition(' ')[2]}, loss {last.val_loss:.3f}). {remedy}"
        )
    by: SelectionMetric = "val_accuracy"
    if probe.val_mean_average_precision is not None:
        by = "val_mean_average_precision"
    after, before = getattr(best, by), getattr(probe, by)
    if after < before:
        name = "val acc" if by == "val_accuracy" else "val mAP"
        return (
            f"{best.name} has a better loss than the probe ({best.val_loss:.3f}, the probe "
            f"{probe.val_loss:.3f}), but a lower {name} ({after:.1%}, the probe {before:.1%}); "
            f"pass --best-by {by} to keep the more accurate one. {remedy}"
        )
    return None
