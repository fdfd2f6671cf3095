"""Measure the activation ranges of a network on calibration images, for `models.int8`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from imgcls.data.decoding.decode import Pixels
from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.bundle import Bundle
from imgcls.models.fuse_cpu import FusedConv2d, insert_fused_convolutions, pack_convolutions
from imgcls.models.int8 import ValueRange, ValueRanges
from imgcls.models.normalize import Normalizer
from imgcls.models.precision import choose_float_dtype
from imgcls.models.torch_engine import load_network


def record_int8_ranges(bundle: Bundle, batches: Iterable[Pixels]) -> ValueRanges:
    """Activation ranges of all convolutions of a bundle's network.

    batches: (N, 3, crop, crop) uint8 RGB
    Raises BundleError if the network has no convolution, or outputs NaN or infinity.
    """
    device = torch.device("cpu")
    dtype = choose_float_dtype("auto", device)
    network = load_network(bundle, device, dtype)
    normalize = Normalizer(bundle.spec.preprocess, device)
    inputs = (normalize(batch).to(dtype) for batch in batches)
    side = bundle.spec.preprocess.crop
    try:
        return record_ranges(network, side, keep=zoo.find_head(network)[1], batches=inputs)
    except ValueError as error:
        raise BundleError(f"bundle {bundle.url}: int8: {error}") from error


def record_ranges(
    network: nn.Module, side: int, *, keep: nn.Module, batches: Iterable[torch.Tensor]
) -> ValueRanges:
    """Ranges of the inputs and outputs of each convolution: mean of the extremes over the batches.

    network, side, keep: as for `fuse_cpu.fuse_convolutions`; the network cannot be used afterwards
    batches: (N, 3, side, side), normalized
    Raises ValueError if the network has no convolution, or for NaN or infinity.
    """
    graph = insert_fused_convolutions(network, side, keep=keep)
    if graph is None:
        raise ValueError(
            "the network has no convolution that can be quantized in torch; use --engine openvino"
        )
    pack_convolutions(graph)
    recorder = _RangeRecorder(graph)
    with torch.inference_mode():
        for batch in batches:
            recorder.run(batch)
    return recorder.compute_ranges()


class _RangeRecorder(fx.Interpreter):
    """Runs a graph and records the extremes of the tensors around its convolutions."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self._modules = dict(graph.named_modules())
        self._extremes: dict[tuple[str, str], list[ValueRange]] = {}

    def run_node(self, n: fx.Node) -> Any:
        convolution = self._modules.get(str(n.target)) if n.op == "call_module" else None
        if not isinstance(convolution, FusedConv2d):
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        for kind, tensor in zip(("input", "residual"), args, strict=False):
            self._record(convolution.name, kind, tensor)
        result = super().run_node(n)
        self._record(convolution.name, "output", result)
        return result

    def _record(self, name: str, kind: str, tensor: torch.Tensor) -> None:
        low, high = torch.aminmax(tensor.float())
        self._extremes.setdefault((name, kind), []).append((float(low), float(high)))

    def compute_ranges(self) -> ValueRanges:
        """Mean minimum and maximum over the batches. Raises ValueError for NaN or infinity."""
        ranges: ValueRanges = {}
        for (name, kind), extremes in self._extremes.items():
            lows, highs = zip(*extremes, strict=True)
            low, high = sum(lows) / len(lows), sum(highs) / len(highs)
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"the values of {name!r} are NaN or infinite for some image")
            ranges.setdefault(name, {})[kind] = (low, high)
        return ranges
