"""How the weights move: AdamW, warmed up and then cooled along a cosine, step by step."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

from imgcls.config import Section


class OptimConfig(Section):
    """How the weights move."""

    lr: PositiveFloat = 1e-3
    """Highest learning rate, reached at the end of the warm-up."""
    warmup: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Share of all steps in which the learning rate rises to optim.lr; it then falls to 0."""
    weight_decay: NonNegativeFloat = 0.05
    """Pull of AdamW towards 0 on weight matrices; biases and normalisation are left free."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target that is spread over all classes."""


def optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters, those with one dimension without decay."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)


def schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Multiplies the learning rate by `lr_factor` at each of `steps` steps."""
    warmup = round(config.warmup * steps)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, warmup=warmup, steps=steps)
    )


def lr_factor(step: int, *, warmup: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a line up to 1, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
