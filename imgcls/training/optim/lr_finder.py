"""Learning rate finder: the LR range test (Smith, WACV 2017).

The learning rate rises from step to step until the loss diverges. The steps are the trainer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

LR_RANGE = (1e-6, 1.0)
MAX_STEPS = 150
DIVERGENCE_FACTOR = 4.0
"""The test ends when the smoothed loss is this many times its minimum."""
SMOOTHING = 0.9


class LrFinder:
    """Sets the learning rate of each step and records its loss.

    curve: (peak learning rate of the step, mean loss) pairs; only finite losses
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._peak = max(group["peak"] for group in optimizer.param_groups)
        self.curve: list[tuple[float, float]] = []
        self.is_over = False
        self._smooth, self._lowest = 0.0, math.inf

    @property
    def lr(self) -> float:
        low, high = LR_RANGE
        return float(low * (high / low) ** (len(self.curve) / (MAX_STEPS - 1)))

    def set_lr(self) -> None:
        """Set the learning rate of the next step; the ratios between groups stay."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * group["peak"] / self._peak

    def record(self, loss: float) -> None:
        """Record the mean loss of a step over all workers."""
        if math.isfinite(loss):
            self.curve.append((self.lr, loss))
            self._smooth = SMOOTHING * self._smooth + (1 - SMOOTHING) * loss
            unbiased = self._smooth / (1 - SMOOTHING ** len(self.curve))
            self._lowest = min(self._lowest, unbiased)
            has_diverged = unbiased > DIVERGENCE_FACTOR * self._lowest
        else:
            has_diverged = True
        self.is_over = has_diverged or len(self.curve) == MAX_STEPS


def find_steepest_lr(lrs: Sequence[float], smoothed: npt.NDArray[np.float64]) -> float:
    """Learning rate at which the smoothed loss falls fastest per decade, before its minimum."""
    lowest = max(2, int(np.argmin(smoothed)) + 1)
    slope = np.gradient(smoothed[:lowest], np.log10(lrs[:lowest]))
    return float(lrs[int(np.argmin(slope))])
