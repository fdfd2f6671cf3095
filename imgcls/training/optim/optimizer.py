"""How the weights move: the optimiser, its learning rate at every step, and the averaged weights.

Owns the schedules, which are functions of the step alone, so that a resumed run needs no state for
them. Which parameters share a rate is decided in `layers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from imgcls.config import Section, UnitFloat
from imgcls.training.optim.param_groups import ParamGroup

OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["cosine", "one_cycle", "step", "constant"]

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4
ONE_CYCLE_MOMENTUM = (0.85, 0.95)
EMA_WARMUP = 10


class OptimConfig(Section):
    """How the weights move."""

    name: OptimizerName = "adamw"
    """adamw (Loshchilov & Hutter 2019) or sgd with Nesterov momentum, which wants a higher lr."""
    lr: PositiveFloat | None = None
    """Highest learning rate, of the head where rates differ; 3e-4 by default from weights, from
    scratch 3e-3 for the small CNN and 1e-3 for others."""
    scale_lr_from: PositiveInt | None = None
    """Linear scaling rule: optim.lr is meant for this batch_size, and grows with it."""
    schedule: ScheduleName = "cosine"
    """After the warm-up: cosine to 0, one_cycle (Smith 2018), drops by step_factor, constant."""
    warmup: UnitFloat = 0.1
    """Share of all steps in which the learning rate rises to optim.lr."""
    step_every: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Schedule step: share of all steps between drops."""
    step_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Schedule step: what the learning rate is multiplied by at each drop."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Of sgd."""
    weight_decay: NonNegativeFloat = 0.05
    """Pull towards 0 on weight matrices; biases and normalisation are left free."""
    clip_norm: PositiveFloat | None = None
    """Longest gradient over all parameters; longer ones are scaled down to it."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.99
    """Decay per step of the averaged weights, which are judged and kept; none for no average."""

    def compute_peak_lr(self, batch_size: int) -> float:
        """The highest learning rate for batches of this size."""
        if self.lr is None:
            raise ValueError("optim.lr is still open; `default_lr` of the strategy is meant")
        return self.lr * (batch_size / self.scale_lr_from if self.scale_lr_from else 1)


def build_optimizer(
    network: nn.Module, groups: Sequence[ParamGroup], config: OptimConfig, *, batch_size: int
) -> torch.optim.Optimizer:
    """The optimiser over all parameters; every group remembers its highest rate as `peak`."""
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
    """Give every group its learning rate for step number `step` of `steps`, counted from 0."""
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
    """Share of the highest learning rate at a step."""
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
    """Half a cosine from `start` to 1 at the end of the warm-up, and another down to `end`."""
    peak = config.warmup * max(1, steps - 1)
    if step < peak:
        return _interpolate_cosine(start, 1.0, step / peak)
    return _interpolate_cosine(1.0, end, (step - peak) / max(1.0, steps - 1 - peak))


def _interpolate_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class ModelEma:
    """Exponential moving average of a network's weights and running statistics.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that an average of few steps does not
    hold on to where it began. Source: TensorFlow's ExponentialMovingAverage with num_updates.
    """

    def __init__(self, network: nn.Module, average: nn.Module, decay: float) -> None:
        self.network = average.requires_grad_(False)
        self._decay = decay
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values()))  # noqa: B905  the same keys
        self._averages = [mine for mine, _ in pairs if mine.is_floating_point()]
        self._sources = [theirs for mine, theirs in pairs if mine.is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's weights after step number `step`, counted from 0."""
        share = 1 - min(self._decay, (1 + step) / (EMA_WARMUP + step))
        torch._foreach_lerp_(self._averages, self._sources, share)
        for mine, theirs in self._counters:
            mine.copy_(theirs)


def copy_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a state dict in main memory, which further steps do not change."""
    return {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }


def copy_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of an optimiser's state in main memory."""

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
