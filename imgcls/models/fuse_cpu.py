"""Fused convolutions for CPUs: residual addition and activation in one oneDNN kernel.

oneDNN adds a residual and applies an activation while the result is in the cache; separate steps
are one more pass through memory each. Weights are packed once. The operators are those that
`torch.compile` chooses; here a torch.fx graph is rewritten in half a second, without a compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from imgcls.models.fold_batchnorm import trace_network
from imgcls.models.fusion import FusionSite, find_fusable_convolutions, replace_convolutions

NOMINAL_BATCH = 32
"""Batch size that weights are packed for; they work for any other."""

_ACTIVATIONS: dict[Any, tuple[str, tuple[float, ...]]] = {
    nn.ReLU: ("relu", ()),
    F.relu: ("relu", ()),
    nn.ReLU6: ("hardtanh", (0.0, 6.0)),
    nn.Hardswish: ("hardswish", ()),
    nn.SiLU: ("swish", ()),
    nn.Sigmoid: ("sigmoid", ()),
}
"""oneDNN's name of each activation, and its parameters."""
_RESIDUAL_ACTIVATIONS = (nn.ReLU, F.relu)
"""Activations that torch fuses after the addition of a residual."""


class FusedConv2d(nn.Module):
    """act(conv(x) + residual); activation and residual are optional.

    name:       name of the convolution in the network
    source:     the convolution, until it is packed
    input_size: [N, C, H, W] that its weights are packed for
    Packed weights are specific to this processor: they are neither saved nor moved.
    """

    def __init__(
        self,
        name: str,
        source: nn.Conv2d,
        input_size: list[int],
        activation: str,
        scalars: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.name = name
        self.source: nn.Conv2d | None = source
        self.input_size = input_size
        self.activation = activation
        self.scalars = list(scalars)
        self.layout = (list(source.padding), list(source.stride), list(source.dilation))

    def pack(self) -> None:
        """Pack the weights for this processor."""
        source = self.source
        assert source is not None
        self._groups = source.groups
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(
            source.weight.detach(), *self.layout, source.groups, self.input_size
        )
        self._bias = None if source.bias is None else source.bias.detach()
        self.source = None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, in_place: bool = False
    ) -> torch.Tensor:
        """x: (N, C, H, W); residual: of the result's shape; `in_place` overwrites it."""
        weights = (self._weight, self._bias, *self.layout, self._groups)
        result: torch.Tensor
        if residual is None:
            result = torch.ops.mkldnn._convolution_pointwise(
                x, *weights, self.activation, self.scalars, None
            )
            return result
        if self._groups > 1 and not in_place:
            # torch fuses grouped convolutions in place only; its other way fails in bfloat16
            residual, in_place = residual.clone(memory_format=torch.channels_last), True
        after = (None if self.activation == "none" else self.activation, self.scalars, None)
        if in_place:
            result = torch.ops.mkldnn._convolution_pointwise_.binary(
                residual, x, *weights, "add", None, *after
            )
        else:
            result = torch.ops.mkldnn._convolution_pointwise.binary(
                x, residual, *weights, "add", None, *after
            )
        return result


def fuse_convolutions(network: nn.Module, side: int, *, keep: nn.Module) -> nn.Module:
    """Fuse the convolutions of a network; returns it unchanged if that is not possible.

    network: in eval mode, on a CPU, its convolutions of one floating dtype and channels last
    side:    height and width of the input, in pixels
    keep:    a layer that is not replaced
    """
    graph = insert_fused_convolutions(network, side, keep=keep)
    if graph is None:
        return network
    pack_convolutions(graph)
    return graph


def pack_convolutions(graph: fx.GraphModule) -> None:
    """Pack the fused convolutions of a graph, which is required to run it."""
    for module in graph.modules():
        if isinstance(module, FusedConv2d):
            module.pack()


def has_onednn_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN has convolutions of a dtype for this CPU; bf16 requires more than AVX2."""
    return torch.backends.mkldnn.is_available() and (
        dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def insert_fused_convolutions(
    network: nn.Module, side: int, *, keep: nn.Module
) -> fx.GraphModule | None:
    """Replace convolutions by fused ones, not yet packed; None if there are none."""
    convolutions = find_fusable_convolutions(network)
    if not convolutions:
        return None
    weight = convolutions[0].weight
    graph = trace_network(network) if has_onednn_kernels(weight.dtype) else None
    if graph is None:
        return None
    sample = weight.new_zeros((2, 3, side, side)).to(memory_format=torch.channels_last)
    replace_convolutions(
        graph,
        sample,
        keep=keep,
        activations=_ACTIVATIONS,
        residual_activations=_RESIDUAL_ACTIVATIONS,
        build=_build_layer,
    )
    return graph


def _build_layer(site: FusionSite) -> tuple[FusedConv2d, tuple[bool, ...]]:
    activation = ("none", ()) if site.activation is None else _ACTIVATIONS[site.activation]
    size = [NOMINAL_BATCH, *site.input_shape[1:]]
    layer = FusedConv2d(site.name, site.convolution, size, *activation)
    return layer, (site.frees_residual,) if site.has_residual else ()
