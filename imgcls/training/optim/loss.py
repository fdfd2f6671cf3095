"""Training loss of the task, optionally smoothed, weighted or focal, on hard or mixed labels.

With a teacher, the loss of its soft targets is added. Losses are sums over rows. The caller divides
by the number of rows of the global batch, so that the division of rows among workers changes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from imgcls.errors import ConfigError
from imgcls.formatting import format_list
from imgcls.models.single_label import SINGLE_LABEL
from imgcls.models.task import Task
from imgcls.training.config import LossConfig

AUXILIARY_WEIGHTS = {"aux_logits": 0.4, "aux_logits1": 0.3, "aux_logits2": 0.3}
"""Weights of Inception's and GoogLeNet's auxiliary losses (Szegedy et al., CVPR 2016 and 2015)."""


class TrainingLoss:
    """The training loss of a batch.

    weights: (C,) float32 per class, or None for equal ones
    task:    defines the loss
    temperature: of the soft targets of a teacher
    """

    def __init__(
        self,
        config: LossConfig,
        weights: torch.Tensor | None,
        task: Task = SINGLE_LABEL,
        temperature: float = 1.0,
    ) -> None:
        self._config, self._temperature = config, temperature
        self.weights, self.task = weights, task

    def __call__(self, outputs: Any, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss of a network's training outputs, and its (N, C) float32 logits.

        outputs: (N, C) logits, or Inception's or GoogLeNet's named tuple with auxiliary logits
        targets: (N,) int64 class indices, or (N, C) float32 shares of classes, see the task; or
            (N, 2 C) float32 as `TargetTable.encode_for_training` returns them
        """
        if isinstance(outputs, torch.Tensor):
            return self._compute_sum(outputs, targets), outputs.float()
        loss = self._compute_sum(outputs.logits, targets)
        for name, weight in AUXILIARY_WEIGHTS.items():
            auxiliary = getattr(outputs, name, None)
            if auxiliary is not None:
                loss = loss + weight * self._compute_sum(auxiliary, targets)
        return loss, outputs.logits.float()

    def count_correct(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As `Task.count_correct`; of an image without a label, whether the teacher predicts it."""
        classes = logits.shape[1]
        if not _has_soft_targets(targets, classes):
            return self.task.count_correct(logits, targets)
        labels, soft = targets.split(classes, dim=1)
        return self.task.count_correct(logits, labels.where(labels.any(1, keepdim=True), soft))

    def _compute_sum(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits, classes = logits.float(), logits.shape[1]
        smoothing = self._config.label_smoothing
        if not _has_soft_targets(targets, classes):
            return self._compute_label_loss(logits, targets, smoothing)
        labels, soft = targets.split(classes, dim=1)
        # smoothed here, because the shares of a row do not add up to 1
        labels = labels * (1 - smoothing) + labels.sum(1, keepdim=True) * smoothing / classes
        loss = self._compute_label_loss(logits, labels, 0.0)
        return loss + compute_distillation_loss(logits, soft, self._temperature)

    def _compute_label_loss(
        self, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float
    ) -> torch.Tensor:
        config = self._config
        return self.task.compute_loss(
            logits,
            targets,
            weights=self.weights,
            label_smoothing=label_smoothing,
            focal_gamma=config.focal_gamma,
            negative_gamma=config.negative_gamma,
            negative_margin=config.negative_margin,
        )


def compute_distillation_loss(
    logits: torch.Tensor, soft: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Sum over N rows of weight * T^2 * KL(soft targets || softmax(logits / T)).

    T^2 keeps the size of the gradients that of a loss of labels.

    logits: (N, C) float32 of the student
    soft:   (N, C) float32 softmax of the teacher's logits over T, each row times its weight
    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Examples
    --------
    >>> import torch
    >>> logits, soft = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    >>> round(float(compute_distillation_loss(logits, soft, 1.0)), 3)
    0.434
    """
    weight = soft.sum(1, keepdim=True)
    entropy = torch.xlogy(soft, soft / weight.clamp_min(torch.finfo(torch.float32).tiny))
    log_scores = (logits / temperature).log_softmax(dim=1)
    return temperature**2 * (entropy - soft * log_scores).sum()


def _has_soft_targets(targets: torch.Tensor, classes: int) -> bool:
    return targets.dim() == 2 and targets.shape[1] == 2 * classes


def compute_class_weights(
    config: LossConfig,
    classes: Sequence[str],
    counts: Sequence[int],
    negatives: Sequence[int] | None = None,
) -> list[float] | None:
    """Loss weight of each class; None for equal weights.

    For one label per image their mean over the training rows is 1. For multilabel they weight the
    positives of a class: its negatives by its positives if balanced, else the values as given.

    counts:    number of training images of each class
    negatives: number of training images known to be of another class, for multilabel
    Raises ConfigError when a name is not a class.
    """
    if config.class_weights == "none":
        return None
    if config.class_weights == "balanced":
        if negatives is not None:
            pairs = zip(counts, negatives, strict=True)
            return [max(1, without) / max(1, count) for count, without in pairs]
        return [sum(counts) / (len(counts) * max(1, count)) for count in counts]
    unknown = [name for name in config.class_weights if name not in classes]
    if unknown:
        raise ConfigError(
            f"loss.class_weights: no class {unknown[0]!r}; the classes are "
            f"{format_list(classes, 10)}"
        )
    weights = [float(config.class_weights.get(name, 1.0)) for name in classes]
    if negatives is not None:
        return weights
    total = sum(weight * count for weight, count in zip(weights, counts, strict=True))
    if total == 0:
        raise ConfigError("loss.class_weights: all weights are 0. Set at least one above 0.")
    return [weight * sum(counts) / total for weight in weights]
