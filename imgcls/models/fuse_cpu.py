"""Fused convolutions for CPUs: residual addition and activation in one oneDNN kernel.

oneDNN adds a residual and applies an activation while the result is in the cache; separate steps
are one more pass through memory each. Weights are packed once. The operators are those that
`torch.compile` chooses; here a torch.fx graph is rewritten in half a second, without a compiler.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from imgcls.data.lazy_torchvision import torchvision
from imgcls.models.fold_batchnorm import trace_network

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

_ADDITIONS = (operator.add, operator.iadd, torch.add)


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
    convolutions = [module for module in network.modules() if _is_fusable(module)]
    if not convolutions:
        return None
    weight: torch.Tensor = next(convolutions[0].parameters())
    graph = trace_network(network) if has_onednn_kernels(weight.dtype) else None
    if graph is None:
        return None
    sizes = _ShapeRecorder(graph)
    with torch.inference_mode():
        sizes.run(weight.new_zeros((1, 3, side, side)).to(memory_format=torch.channels_last))
    _remove_training_layers(graph)
    modules = dict(graph.named_modules())
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for number, node in enumerate(list(graph.graph.nodes)):
        module = modules[str(node.target)] if node.op == "call_module" else None
        if module is None or module is keep or not _is_fusable(module):
            continue
        last, residual = node, _find_residual(node, sizes.shapes)
        inputs: tuple[Any, ...] = (node.args[0],)
        if residual is not None:
            (last,) = node.users
            inputs = (*inputs, residual, _is_last_use(residual, last, modules, order))
        activation: tuple[str, tuple[float, ...]] = ("none", ())
        if len(last.users) == 1:
            (follower,) = last.users
            kind = get_node_kind(follower, modules)
            if kind in _ACTIVATIONS:
                activation, last = _ACTIVATIONS[kind], follower
        size = [NOMINAL_BATCH, *sizes.shapes[node.args[0]][1:]]
        name = f"fused_{number}"
        graph.add_module(name, FusedConv2d(str(node.target), module, size, *activation))
        modules[name] = graph.get_submodule(name)
        with graph.graph.inserting_after(last):
            made = graph.graph.call_module(name, inputs)
        order[made], sizes.shapes[made] = order[last], sizes.shapes[last]
        last.replace_all_uses_with(made)
        while last is not node:
            before = next(each for each in last.all_input_nodes if each is not residual)
            graph.graph.erase_node(last)
            last = before
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph once and records the shape of each step's tensor."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def _is_fusable(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _remove_training_layers(graph: fx.GraphModule) -> None:
    """Remove layers that act in training only: dropout and stochastic depth."""
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        kind = get_node_kind(node, modules)
        if kind in (nn.Dropout, nn.Identity, torchvision.ops.stochastic_depth):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def get_node_kind(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    """Class of a layer, function of a call, or None for other nodes."""
    if node.op == "call_module":
        return type(modules[str(node.target)])
    return node.target if node.op == "call_function" else None


def _find_residual(node: fx.Node, sizes: dict[fx.Node, tuple[int, ...]]) -> fx.Node | None:
    """The tensor added to a convolution's result, of its shape, if that is its only use."""
    if len(node.users) != 1:
        return None
    (follower,) = node.users
    if (
        follower.op != "call_function"
        or follower.target not in _ADDITIONS
        or len(follower.args) != 2
    ):
        return None
    others = [each for each in follower.args if each is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    return others[0] if sizes.get(others[0]) == sizes[node] else None


def _is_last_use(
    residual: fx.Node, at: fx.Node, modules: dict[str, nn.Module], order: dict[fx.Node, int]
) -> bool:
    """Whether neither a tensor nor a view of its memory is read after the step `at`."""
    allocating = (FusedConv2d, nn.Conv2d, nn.MaxPool2d)
    users = [user for user in residual.users if user is not at]
    return get_node_kind(residual, modules) in allocating and all(
        order[user] < order[at] and get_node_kind(user, modules) in allocating for user in users
    )
