"""Fused convolutions for GPUs: bias, residual addition and ReLU in one cuDNN kernel.

Without this, each of them is one more pass through the GPU's memory. The result is rounded once
instead of up to three times. A network is fused when it is loaded, and compared with itself then;
where cuDNN cannot run a layer, or its numbers differ, the network stays as it was, and a note has
the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from imgcls import log
from imgcls.errors import first_line
from imgcls.models.fold_batchnorm import trace_network
from imgcls.models.fusion import FusionSite, find_fusable_convolutions, replace_convolutions

MAX_KERNEL_SIZE = 5
"""Largest kernel that is fused; with 7x7 in channels-last memory cuDNN's fused kernel is many times
slower than its plain one. Source: github.com/pytorch/pytorch/issues/68506."""
COMPARED_ROWS = 4
"""Images at the start and at the end of a batch whose results are compared."""

_ACTIVATIONS = (nn.ReLU, F.relu)
_ERRORS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-14}
"""Accepted mean error of a layer, as a fraction of the mean of what is added up in it: the distance
of two numbers of a 16-bit dtype. Of float32, products and sums may be computed in another order."""
_MAX_ERROR_FACTOR = 4
"""Accepted largest error, as a fraction of the largest number, in multiples of the mean one."""


class CudnnConv2d(nn.Module):
    """relu(conv(x) + residual), the residual optional; on CUDA and for inference only.

    name:   name of the convolution in the network
    source: the convolution, whose weights are shared
    """

    def __init__(self, name: str, source: nn.Conv2d) -> None:
        super().__init__()
        self.name = name
        self.weight, self.bias = source.weight, source.bias
        self._layout: Any = (source.stride, source.padding, source.dilation, source.groups)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: (N, C, H, W); residual: of the result's shape."""
        setting = (self.bias, *self._layout)
        result: torch.Tensor
        if residual is None:
            result = torch.cudnn_convolution_relu(x, self.weight, *setting)
        else:
            result = torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, *setting)
        return result

    def run_unfused(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution with its bias alone."""
        result: torch.Tensor = F.conv2d(x, self.weight, self.bias, *self._layout)
        return result


class FusionError(Exception):
    """The numbers of a fused network differ from those of the network."""


def fuse_on_cuda(
    network: nn.Module, side: int, *, keep: nn.Module, batch_sizes: Iterable[int]
) -> nn.Module:
    """Fuse the convolutions of a network; returns it unchanged if that is not possible.

    network:     in eval mode, on a GPU, of one floating dtype and channels last; it is not changed
    side:        height and width of the input, in pixels
    keep:        a layer that is not replaced
    batch_sizes: sizes to compare the results for; cuDNN chooses its kernels by the size
    Raises torch.OutOfMemoryError, or torch.AcceleratorError for a device that has failed.
    """
    try:
        graph = insert_cuda_convolutions(network, side, keep=keep)
        if graph is None:
            return network
        for size in batch_sizes:
            _verify(graph, network, _make_sample(network, size, side))
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, FusionError) as error:
        log.emit("note", f"bias, addition and ReLU run as separate kernels: {first_line(error)}")
        return network
    return graph


def insert_cuda_convolutions(
    network: nn.Module, side: int, *, keep: nn.Module
) -> fx.GraphModule | None:
    """A copy of a network, with its weights shared and its convolutions fused; None if none can."""
    if not any(_has_kernel(each) for each in find_fusable_convolutions(network)):
        return None
    traced = trace_network(network)
    if traced is None:
        return None
    graph = fx.GraphModule(traced, copy.deepcopy(traced.graph))
    if hasattr(traced, "class_heads"):
        graph.class_heads = traced.class_heads
    replaced = replace_convolutions(
        graph,
        _make_sample(network, 2, side),
        keep=keep,
        activations=_ACTIVATIONS,
        residual_activations=_ACTIVATIONS,
        build=_build_layer,
    )
    return graph if replaced else None


def _build_layer(site: FusionSite) -> tuple[CudnnConv2d, tuple[()]] | None:
    """The fused layer of a site that ends in ReLU, which cuDNN's kernels always apply."""
    if site.activation is None or not _has_kernel(site.convolution):
        return None
    return CudnnConv2d(site.name, site.convolution), ()


def _has_kernel(convolution: nn.Conv2d) -> bool:
    """Whether a convolution is fused; torch does not run all grouped ones by cuDNN."""
    return max(convolution.kernel_size) <= MAX_KERNEL_SIZE and convolution.groups == 1


def _make_sample(network: nn.Module, size: int, side: int) -> torch.Tensor:
    """A batch of normalized noise."""
    weight = find_fusable_convolutions(network)[0].weight
    generator = torch.Generator(weight.device).manual_seed(0)
    noise = torch.randn(
        (size, 3, side, side), dtype=weight.dtype, device=weight.device, generator=generator
    )
    return noise.to(memory_format=torch.channels_last)


@torch.inference_mode()
def _verify(graph: fx.GraphModule, network: nn.Module, sample: torch.Tensor) -> None:
    """Raise FusionError if the fused network, or one of its layers, has other results."""
    expected = network(sample)
    found = _LayerComparison(graph).run(sample)
    _compare("the network", found, expected, expected.abs())


class _LayerComparison(fx.Interpreter):
    """Runs a graph; compares each fused layer with the separate steps, whose results it uses."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, CudnnConv2d):
            return super().call_module(target, args, kwargs)
        x, *residual = args
        total = module.run_unfused(x)
        size = total.abs()
        for tensor in residual:
            total, size = total + tensor, size + tensor.abs()
        expected = F.relu(total)
        _fill_free_memory(expected)
        _compare(f"layer {module.name}", module(*args), expected, size)
        return expected


def _fill_free_memory(like: torch.Tensor) -> None:
    """Leave NaN in the memory that the next tensor of a size is likely to get.

    torch passes the uninitialized result to cuDNN as a residual with the factor 0: a kernel that
    multiplies it would pass the comparison by chance.
    """
    filled = [torch.full_like(like, float("nan")) for _ in range(2)]
    del filled


def _compare(name: str, found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> None:
    """Raise FusionError if results differ by more than rounding.

    size: magnitude of the numbers that were added up, of the shape of the results
    """
    limit = _ERRORS[expected.dtype]
    rows = [*range(len(expected))][:COMPARED_ROWS] + [*range(len(expected))][-COMPARED_ROWS:]
    error = (found[rows].float() - expected[rows].float()).abs()
    scale = size[rows].float()
    least = torch.finfo(torch.float32).tiny
    mean = float(error.mean() / scale.mean().clamp_min(least))
    largest = float(error.max() / scale.max().clamp_min(least))
    # written such that NaN is an error
    if not (mean <= limit and largest <= _MAX_ERROR_FACTOR * limit):
        raise FusionError(f"{name} differs by {mean:.1%} on average and {largest:.1%} at most")
