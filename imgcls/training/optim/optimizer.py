"""Optimizer, learning-rate schedules and the moving average of the weights.

Schedules are functions of the step alone, so that a resumed run needs no scheduler state. Which
parameters share a learning rate is decided in `param_groups`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from imgcls.training.config import OptimConfig
from imgcls.training.optim.param_groups import ParamGroup

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4
ONE_CYCLE_MOMENTUM = (0.85, 0.95)
EMA_WARMUP = 10


def build_optimizer(
    network: nn.Module, groups: Sequence[ParamGroup], config: OptimConfig, *, batch_size: int
) -> torch.optim.Optimizer:
    """The optimizer of all parameters; each group stores its peak learning rate as `peak`."""
    parameters = dict(network.named_parameters())
    peak = config.compute_peak_lr(batch_size)
    settings = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": peak * group.lr_scale,
            "peak": peak * group.lr_scale,
            "weight_decay": config.weight_decay if group.has_weight_decay else 0.0,
        }
        for group in groups
    ]
    if config.name == "sgd":
        return torch.optim.SGD(
            settings, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
        )
    return torch.optim.AdamW(settings, fused=True)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int
) -> None:
    """Set the learning rate of every group for step number `step` of `steps`, counted from 0."""
    factor = compute_lr_factor(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    if config.schedule == "one_cycle":
        low, high = ONE_CYCLE_MOMENTUM
        momentum = high + (low - high) * _compute_one_cycle(config, step, steps, 0.0, 0.0)
        for group in optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            else:
                group["momentum"] = momentum


def compute_lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of a step, as a fraction of the peak."""
    warmup = round(config.warmup * steps)
    if config.schedule == "one_cycle":
        return _compute_one_cycle(config, step, steps, ONE_CYCLE_START, ONE_CYCLE_END)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return config.step_factor ** int(step / (config.step_every * steps) + 1e-9)
    return _interpolate_cosine(1.0, 0.0, (step - warmup) / max(1, steps - warmup))


def _compute_one_cycle(
    config: OptimConfig, step: int, steps: int, start: float, end: float
) -> float:
    """Half a cosine from `start` to 1 at the end of the warmup, and another down to `end`."""
    peak = config.warmup * max(1, steps - 1)
    if step < peak:
        return _interpolate_cosine(start, 1.0, step / peak)
    return _interpolate_cosine(1.0, end, (step - peak) / max(1.0, steps - 1 - peak))


def _interpolate_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class ModelEma:
    """Exponential moving average of a network's weights and running statistics.

    From random weights, the decay in step t is min(decay, (1 + t) / (10 + t)), so that the initial
    weights lose their influence within a few steps. Source: num_updates of TensorFlow's
    ExponentialMovingAverage. From weights with a fitted head the decay is constant: after the few
    steps that few images give, the average is still near the start, and more accurate than either
    end (Wortsman et al., CVPR 2022, "Robust fine-tuning of zero-shot models").

    torch's AveragedModel gives the same numbers, but lists all tensors again in every update: 0.34
    instead of 0.06 ms for the small CNN on a CPU, and a copy that a GPU has to wait for.

    network: the network with the averaged weights
    """

    def __init__(self, network: nn.Module, decay: float, *, is_fitted: bool = False) -> None:
        """is_fitted: whether the training starts from weights with a fitted head"""
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay, self._is_fitted = decay, is_fitted
        averages, weights = self.network.state_dict(), network.state_dict()
        pairs = list(zip(averages.values(), weights.values(), strict=True))
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._weights = [weight for average, weight in pairs if average.is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the network's weights after step number `step`, counted from 0."""
        decay = self._decay
        if not self._is_fitted:
            decay = min(decay, (1 + step) / (EMA_WARMUP + step))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        for counter, current in self._counters:
            counter.copy_(current)


def copy_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a state dict in main memory."""
    return {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }


def copy_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of an optimizer's state in main memory."""

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().cpu().clone()
        if isinstance(value, Mapping):
            return {key: copied(each) for key, each in value.items()}
        if isinstance(value, list):
            return [copied(each) for each in value]
        return value

    state: dict[str, Any] = copied(optimizer.state_dict())
    return state
