"""Depthwise convolutions of a bfloat16 training on a CPU, in float32 where that is faster.

oneDNN has no bfloat16 kernel of its own for the gradients of depthwise convolutions with a stride
or with filters larger than 3x3, and falls back to those of grouped convolutions, which compute
mostly zeros. On an AMD EPYC (Zen 4, AVX-512 BF16) the gradients take 1.5 to 80 times as long as in
float32, so that EfficientNet-B0 and MobileNetV3 trained more slowly in bfloat16 than in float32.
"""

from __future__ import annotations

import torch
from torch import nn


def use_float32_depthwise(network: nn.Module) -> None:
    """Let these convolutions of a network compute in float32 under autocast; changes its layers.

    Only forward passes that are differentiated are affected: the others are fast in bfloat16. A
    layer gets a subclass of its class, so that copies and state dicts of the network stay the same.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _is_slow_in_bfloat16(module):
            own_class = type(module)
            module.__class__ = type(own_class.__name__, (_Float32Forward, own_class), {})


def _is_slow_in_bfloat16(layer: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise with a stride or with filters larger than 3x3."""
    is_depthwise = 1 < layer.groups == layer.in_channels == layer.out_channels
    return is_depthwise and (max(layer.stride) > 1 or max(layer.kernel_size) > 3)


class _Float32Forward(nn.Module):
    """Mixin before a layer's class; its output has the dtype of its input."""

    weight: torch.Tensor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        compute = super().forward
        needs_gradient = inputs.requires_grad or self.weight.requires_grad
        if not (torch.is_grad_enabled() and needs_gradient):
            direct: torch.Tensor = compute(inputs)
            return direct
        with torch.autocast(inputs.device.type, enabled=False):
            outputs: torch.Tensor = compute(inputs.float())
        return outputs.to(inputs.dtype)
