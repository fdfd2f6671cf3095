"""Find the layer whose output explains a network: its last feature map before pooling.

No layer is found by its name. One forward pass over random pixels shows which outputs are maps over
the image (channels first or last, or tokens of patches), and one backward pass on which of them the
final layer depends.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from imgcls.errors import NotExplainable
from imgcls.models import zoo

Layout = Literal["channels_first", "channels_last", "tokens"]
_IMAGES = 2
_MAX_PREFIX = 64
"""Maximum number of class, distillation and register tokens before those of the patches."""
_POOLING = ("AvgPool", "MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "SelectAdaptivePool")


@dataclass(frozen=True)
class TargetLayer:
    """A module's output that is a map over the image.

    name:   of the module in the network
    call:   index of its call in a forward pass; one ReLU may be called several times
    layout: channels_first (N, C, side, side), channels_last (N, side, side, C), or tokens
        (N, prefix + side * side, C)
    side:   height and width of the map
    prefix: number of tokens before those of the patches
    """

    name: str
    call: int
    layout: Layout
    side: int
    prefix: int = 0

    def to_map(self, output: torch.Tensor) -> torch.Tensor:
        """The output as (N, C, side, side)."""
        if self.layout == "channels_first":
            return output
        if self.layout == "tokens":
            output = output[:, self.prefix :].unflatten(1, (self.side, self.side))
        return output.permute(0, 3, 1, 2)

    @contextlib.contextmanager
    def keep_output(self, network: nn.Module) -> Iterator[list[torch.Tensor]]:
        """Collect the output within the block, as a leaf that gradients can be computed for.

        The list holds it after a forward pass. No graph is recorded for the layers before it.
        """
        kept: list[torch.Tensor] = []
        calls = 0

        def keep(module: nn.Module, inputs: Any, output: Any) -> torch.Tensor | None:
            nonlocal calls
            calls += 1
            if calls - 1 != self.call:
                return None
            kept.append(output.detach().requires_grad_())
            return kept[0].clone()  # the next layer may change it in place

        handle = network.get_submodule(self.name).register_forward_hook(keep)
        try:
            yield kept
        finally:
            handle.remove()


def find_target_layer(network: nn.Module, size: int) -> TargetLayer:
    """The last feature map of a network before pooling.

    network: in eval mode, in float32
    size:    side of its input in pixels
    Convolutional networks: the output of the last block, before the pooling layers at the end; the
    last one with more than one cell. Transformers: the last one with patches that the final layer
    depends on. With a class token this is the normalized input of the last attention.
    Raises NotExplainable if there is none, or if most layers come after it.
    """
    trace = _Trace(network)
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((_IMAGES, 3, size, size), generator=generator).to(device)
    with torch.enable_grad(), trace.record():
        network(pixels.requires_grad_())
        # of the features, not of logits, which are constant in a network without a trained head
        objective = sum(
            (each * torch.randn(each.shape, generator=generator).to(device)).sum()
            for each in trace.features
        )
    if isinstance(objective, torch.Tensor) and objective.requires_grad and trace.candidates:
        outputs = [each.output for each in trace.candidates]
        found = torch.autograd.grad(objective, outputs, allow_unused=True)
        for each, gradient in reversed(list(zip(trace.candidates, found, strict=True))):
            if gradient is not None and bool(each.layer.to_map(gradient).any()):
                if 2 * each.layers_before < trace.num_layers:
                    break
                return each.layer
    raise NotExplainable(
        f"{type(network).__name__}: has no feature map over the image that its final layer depends "
        "on, so its predictions cannot be explained; use another architecture"
    )


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A layer with its output, and the number of layers with parameters that ran until then."""

    layer: TargetLayer
    output: torch.Tensor
    layers_before: int


class _Trace:
    """Records the candidates for the target layer in one forward pass, in order.

    features:   inputs of the final layers
    num_layers: layers with parameters that ran before the final ones
    """

    def __init__(self, network: nn.Module) -> None:
        self.candidates: list[_Candidate] = []
        self.features: list[torch.Tensor] = []
        self._network = network
        self._heads = set(zoo.find_heads(network))
        self._calls: dict[str, int] = {}
        self._side = 0
        self._is_pooled = False
        self._prefix = _find_num_prefix_tokens(network)
        self.num_layers = 0

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record forward passes within the block."""
        handles = []
        for name, module in self._network.named_modules():
            if name not in self._heads and any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(self._count_layer))
            if name in self._heads:
                handles.append(module.register_forward_pre_hook(self._keep_features))
            elif name and not self._is_in_attention(name):
                handles.append(module.register_forward_hook(self._build_hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _is_in_attention(self, name: str) -> bool:
        """Whether a module is a part of an attention layer, where outputs are no features."""
        parents = name.split(".")[:-1]
        classes = (
            type(self._network.get_submodule(".".join(parents[: count + 1]))).__name__.lower()
            for count in range(len(parents))
        )
        # a ResidualAttentionBlock is a whole block
        return any(
            ("attention" in each or "attn" in each) and "block" not in each for each in classes
        )

    def _count_layer(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self.features:
            self.num_layers += 1

    def _keep_features(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.features.append(inputs[0])

    def _build_hook(self, name: str) -> Callable[[nn.Module, Any, Any], torch.Tensor | None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> torch.Tensor | None:
            call = self._calls[name] = self._calls.get(name, -1) + 1
            if not isinstance(output, torch.Tensor) or not output.requires_grad or self.features:
                return None
            layer = self._describe(name, call, module, output)
            if layer is None:
                return None
            if layer.layout != "tokens":
                self._side = layer.side
            if any(word in type(module).__name__ for word in _POOLING):
                self._is_pooled = True
            elif next(module.children(), None) is None and _has_parameters(module):
                self._is_pooled = False
            if not self._is_pooled:
                self.candidates.append(_Candidate(layer, output, self.num_layers))
            return output.clone()  # the next layer may change it in place

        return hook

    def _describe(
        self, name: str, call: int, module: nn.Module, output: torch.Tensor
    ) -> TargetLayer | None:
        """The layer, if its output is a map with more than one cell."""
        shape = tuple(output.shape)
        if shape[0] != _IMAGES:
            return None
        if len(shape) == 3:
            side, prefix = self._split_tokens(shape[1])
            is_block = _has_norm(module) or (side == self._side and _has_parameters(module))
            is_map = side > 1 and is_block
            return TargetLayer(name, call, "tokens", side, prefix) if is_map else None
        if len(shape) != 4:
            return None
        is_first, is_last = shape[2] == shape[3], shape[1] == shape[2]
        if not (is_first or is_last):
            return None
        side = shape[2]
        # maps become smaller; a matrix of attention is as large as the number of patches
        if side < 2 or (self._side and side > self._side):
            return None
        return TargetLayer(name, call, "channels_first" if is_first else "channels_last", side)

    def _split_tokens(self, count: int) -> tuple[int, int]:
        """Side of the grid of patches and number of tokens before them; 0 if it is no grid."""
        for prefix in (self._prefix, 0):
            side = math.isqrt(max(0, count - prefix))
            if side**2 == count - prefix:
                return side, prefix
        grid = self._side**2  # of the convolution that makes patches
        return (self._side, count - grid) if 0 <= count - grid <= _MAX_PREFIX else (0, 0)


def _find_num_prefix_tokens(network: nn.Module) -> int:
    """Number of tokens before those of the patches, where the network has it as an attribute."""
    for module in network.modules():
        number = getattr(module, "num_prefix_tokens", None)
        if isinstance(number, int):
            return number
    return 0


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _has_norm(module: nn.Module) -> bool:
    """Whether a module normalizes, or contains one that does: a block of a transformer."""
    return any("norm" in type(each).__name__.lower() for each in module.modules())
