"""The LR range test: the loss while the learning rate grows from step to step (Smith, WACV 2017).

Owns when it is over and which rate to take from it; the steps are the trainer's own.
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
"""It ends when the smoothed loss is this many times its lowest."""
SMOOTHING = 0.9


class LrFinder:
    """Sets the learning rate of each step and keeps what came of it.

    curve: (highest learning rate of the step, mean loss) pairs, finite ones
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
        return low * (high / low) ** (len(self.curve) / (MAX_STEPS - 1))

    def set_lr(self) -> None:
        """For the next step; groups keep their proportions."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * group["peak"] / self._peak

    def record(self, loss: float) -> None:
        """Take in the mean loss of a step over all workers."""
        if math.isfinite(loss):
            self.curve.append((self.lr, loss))
            self._smooth = SMOOTHING * self._smooth + (1 - SMOOTHING) * loss
            unbiased = self._smooth / (1 - SMOOTHING ** len(self.curve))
            self._lowest = min(self._lowest, unbiased)
            blown = unbiased > DIVERGENCE_FACTOR * self._lowest
        else:
            blown = True
        self.is_over = blown or len(self.curve) == MAX_STEPS


def find_steepest_lr(lrs: Sequence[float], smoothed: npt.NDArray[np.float64]) -> float:
    """The learning rate at which the smoothed loss falls fastest per decade, before its minimum."""
    lowest = max(2, int(np.argmin(smoothed)) + 1)
    slope = np.gradient(smoothed[:lowest], np.log10(lrs[:lowest]))
    return float(lrs[int(np.argmin(slope))])
