"""What is minimised: cross-entropy, smoothed, weighted or focal, over hard or mixed labels.

Owns class weights and the sampling that balances classes. Losses are sums over rows; the caller
divides by the rows of the whole batch over all workers, so that sharing them out changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat

from imgcls.config import Section
from imgcls.errors import ConfigError
from imgcls.models.task import SINGLE_LABEL

AUXILIARY_WEIGHTS = {"aux_logits": 0.4, "aux_logits1": 0.3, "aux_logits2": 0.3}
"""Weights of Inception's and GoogLeNet's auxiliary losses (Szegedy et al., CVPR 2016 and 2015)."""


class LossConfig(Section):
    """What is minimised."""

    class_weights: Literal["none", "balanced"] | dict[str, NonNegativeFloat] = "none"
    """balanced: inversely to a class's images; or a map {name: weight}, others weigh 1."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target that is spread over all classes."""
    focal_gamma: NonNegativeFloat = 0.0
    """Focal loss (Lin et al. 2017): weakens what is already right; 2 is usual, 0 is none."""


class TrainingLoss:
    """The training loss of a batch.

    weights: (C,) float32 per class, or None for equal ones
    """

    def __init__(self, config: LossConfig, weights: torch.Tensor | None) -> None:
        self._smoothing, self._gamma = config.label_smoothing, config.focal_gamma
        self.weights = weights

    def __call__(self, outputs: Any, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss of a network's outputs in training, and its (N, C) float32 logits.

        outputs: (N, C) logits, or Inception's or GoogLeNet's named tuple with auxiliary logits
        targets: (N,) int64 class indices, or (N, C) float32 shares of classes
        """
        if isinstance(outputs, torch.Tensor):
            return self._compute_sum(outputs, targets), outputs.float()
        loss = self._compute_sum(outputs.logits, targets)
        for name, weight in AUXILIARY_WEIGHTS.items():
            auxiliary = getattr(outputs, name, None)
            if auxiliary is not None:
                loss = loss + weight * self._compute_sum(auxiliary, targets)
        return loss, outputs.logits.float()

    def _compute_sum(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return SINGLE_LABEL.compute_loss(
            logits.float(),
            targets,
            weights=self.weights,
            label_smoothing=self._smoothing,
            focal_gamma=self._gamma,
        )


def compute_class_weights(
    config: LossConfig, classes: Sequence[str], counts: Sequence[int]
) -> list[float] | None:
    """Weight of each class's rows, with mean 1 over the training rows; None for equal weights.

    counts: training images of each class
    Raises ConfigError when a name is no class.
    """
    if config.class_weights == "none":
        return None
    if config.class_weights == "balanced":
        return [sum(counts) / (len(counts) * max(1, count)) for count in counts]
    unknown = [name for name in config.class_weights if name not in classes]
    if unknown:
        listed = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise ConfigError(f"loss.class_weights: no class {unknown[0]!r}; there are {listed}")
    weights = [float(config.class_weights.get(name, 1.0)) for name in classes]
    total = sum(weight * count for weight, count in zip(weights, counts, strict=True))
    if total == 0:
        raise ConfigError("loss.class_weights: all weights are 0; give one class at least some")
    return [weight * sum(counts) / total for weight in weights]
