"""Convolutions in int8 on CPUs with native int8 instructions: about twice as fast as bf16.

Activations are uint8, 255 steps of a range that `int8_calibration` measured; weights are int8 with
a scale per output channel. Everything else keeps its floating dtype, except the pooling and the
concatenation of quantized tensors.
Source of the scheme: Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, 2018, section 2.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from imgcls.models.fuse_cpu import FusedConv2d, insert_fused_convolutions, pack_convolutions
from imgcls.models.fusion import get_node_kind

ValueRange = tuple[float, float]
ValueRanges = dict[str, dict[str, ValueRange]]
"""(minimum, maximum) by convolution and by tensor: `input`, `residual` or `output`."""

_CONCATENATIONS = (torch.cat, torch.concat)
_INT8_ACTIVATIONS = ("none", "relu", "hardtanh", "hardswish", "swish")
"""Activations that oneDNN fuses into an int8 convolution."""
_LEVELS = 255


def quantize_network(
    network: nn.Module, side: int, *, keep: nn.Module, ranges: ValueRanges
) -> nn.Module:
    """Replace convolutions by int8 ones where their ranges are known, by fused ones elsewhere.

    network, side, keep: as for `fuse_cpu.fuse_convolutions`
    Raises ValueError if no convolution of the network has a range.
    """
    graph = insert_fused_convolutions(network, side, keep=keep)
    names = {each.name for each in _list_fused_convolutions(graph)} if graph is not None else set()
    if graph is None or not names & set(ranges):
        raise ValueError("the ranges were measured on another network")
    dtype: torch.dtype = next(network.parameters()).dtype
    modules = dict(graph.named_modules())
    chosen = {
        node: modules[str(node.target)]
        for node in graph.graph.nodes
        if get_node_kind(node, modules) is FusedConv2d
        and _is_quantizable(modules[str(node.target)], ranges)
    }
    _GraphRewriter(graph, modules, chosen, ranges, dtype).run()
    pack_convolutions(graph)
    return graph


class QuantizedConv2d(nn.Module):
    """act(conv(x) + residual) of uint8 tensors; the result is uint8 or of a floating dtype.

    x, residual, result: (scale, zero point) of each; None for a result that is not quantized
    """

    def __init__(
        self,
        source: FusedConv2d,
        x: tuple[float, int],
        residual: tuple[float, int] | None,
        result: tuple[float, int] | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        convolution = source.source
        assert convolution is not None
        weight = convolution.weight.detach().float()
        self._scales = weight.abs().amax((1, 2, 3)).clamp_min(1e-12) / 127
        rounded = (weight / self._scales[:, None, None, None]).round().clamp(-127, 127)
        self._layout = padding, stride, dilation = source.layout
        self._groups = convolution.groups
        self._weight = torch.ops.onednn.qconv_prepack(
            rounded.to(torch.int8), self._scales, *x, stride, padding, dilation, self._groups,
            source.input_size,
        )  # fmt: skip
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        bias = convolution.bias
        self._bias = None if bias is None else bias.detach().float()
        self._x = x
        self._residual = residual or (1.0, 0)
        self._result = result or (1.0, 0)
        self._dtype = torch.uint8 if result is not None else dtype
        self._activation, self._scalars = source.activation, source.scalars

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, in_place: bool = False
    ) -> torch.Tensor:
        """x: (N, C, H, W) uint8; residual: of the result's shape; `in_place` overwrites it."""
        padding, stride, dilation = self._layout
        setting = (x, *self._x, self._weight, self._scales, self._zeros)
        shape = (self._bias, stride, padding, dilation, self._groups, *self._result, self._dtype)
        done: torch.Tensor
        if residual is None:
            done = torch.ops.onednn.qconv2d_pointwise(
                *setting, *shape, self._activation, self._scalars, ""
            )
            return done
        if not in_place:
            residual = residual.clone(memory_format=torch.channels_last)
        done = torch.ops.onednn.qconv2d_pointwise.binary(
            *setting, residual, *shape, *self._residual,
            "sum", 1.0, self._activation, self._scalars, "",
        )  # fmt: skip
        return done


class Quantize(nn.Module):
    """Floating tensor to uint8."""

    def __init__(self, scale: float, zero: int) -> None:
        super().__init__()
        self._scale, self._zero = scale, zero

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = x.float().mul(1 / self._scale).add_(self._zero).round_()
        return steps.clamp_(0, _LEVELS).to(torch.uint8)


class QuantizedMaxPool2d(nn.Module):
    """Max pooling over squares of uint8, channels-last tensors, on which torch's own fails."""

    def __init__(self, source: nn.MaxPool2d) -> None:
        super().__init__()
        sizes = (source.kernel_size, source.stride, source.padding, source.dilation)
        self._kernel, self._stride, self._padding, self._dilation = (
            _unwrap_size(each) for each in sizes
        )
        self._ceil = source.ceil_mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, C, H, W) uint8."""
        (rows, below), (columns, right) = (self._count_windows(length) for length in x.shape[2:])
        if self._padding or below or right:
            sides = (0, 0, self._padding, right, self._padding, below)
            x = F.pad(x.permute(0, 2, 3, 1), sides).permute(0, 3, 1, 2)
        taps = range(0, self._kernel * self._dilation, self._dilation)
        down, across = ((count - 1) * self._stride + 1 for count in (rows, columns))
        x = _compute_elementwise_max([x[:, :, tap : tap + down : self._stride] for tap in taps])
        return _compute_elementwise_max(
            [x[:, :, :, tap : tap + across : self._stride] for tap in taps]
        )

    def _count_windows(self, length: int) -> tuple[int, int]:
        """Number of windows along a length, and the padding that they need at its end."""
        reach = self._dilation * (self._kernel - 1) + 1
        over = length + 2 * self._padding - reach
        count = over // self._stride + 1
        # as in torch, a window that would start in the padding at the end is dropped
        if self._ceil and over % self._stride and count * self._stride < length + self._padding:
            count += 1
        return count, max(0, (count - 1) * self._stride + reach - self._padding - length)


def _unwrap_size(size: int | tuple[int, ...]) -> int:
    if isinstance(size, int):
        return size
    (one,) = set(size)
    return one


def _compute_elementwise_max(windows: list[torch.Tensor]) -> torch.Tensor:
    most = windows[0].clone(memory_format=torch.channels_last)
    for window in windows[1:]:
        torch.maximum(most, window, out=most)
    return most


class Dequantize(nn.Module):
    """uint8 tensor to a floating dtype."""

    def __init__(self, scale: float, zero: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._scale, self._zero, self._dtype = scale, zero, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().sub_(self._zero).mul_(self._scale).to(self._dtype)


class _GraphRewriter:
    """Replaces fused convolutions by quantized ones and inserts the dtype changes between them."""

    def __init__(
        self,
        graph: fx.GraphModule,
        modules: dict[str, Any],
        chosen: dict[fx.Node, Any],
        ranges: ValueRanges,
        dtype: torch.dtype,
    ) -> None:
        self._graph = graph
        self._modules = modules
        self._chosen = chosen
        self._ranges = ranges
        self._dtype = dtype
        self._steps: dict[fx.Node, tuple[float, int]] = {}
        """(scale, zero point) of each uint8 node."""
        self._made: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(self) -> None:
        nodes = list(self._graph.graph.nodes)
        carried = self._find_uint8_nodes(nodes)
        self._assign_scales(nodes, carried)
        for node in nodes:
            if node in self._chosen:
                self._replace(node, node in carried)
            elif get_node_kind(node, self._modules) is nn.MaxPool2d and node in carried:
                pool = QuantizedMaxPool2d(self._modules[str(node.target)])
                node.target = self._add_module(f"{node.name}_int8", pool)
            elif node not in carried:
                for each in list(node.all_input_nodes):
                    if each in self._steps:
                        node.replace_input_with(each, self._get_float(each))
        self._graph.delete_all_unused_submodules()
        self._graph.recompile()

    def _find_uint8_nodes(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """Nodes with a uint8 result: those that can have one and have a user that takes one."""
        able: set[fx.Node] = set()
        for node in nodes:
            alone = all(len(each.users) == 1 for each in node.all_input_nodes)
            kind = get_node_kind(node, self._modules)
            if node in self._chosen or (
                (kind is nn.MaxPool2d or (kind in _CONCATENATIONS and alone))
                and all(each in able for each in node.all_input_nodes)
            ):
                able.add(node)
        carried: set[fx.Node] = set()
        for node in reversed(nodes):
            if node in able and any(
                user in carried or (user in self._chosen and user.args[0] is node)
                for user in node.users
            ):
                carried.add(node)
        return carried

    def _assign_scales(self, nodes: list[fx.Node], carried: set[fx.Node]) -> None:
        ranges: dict[fx.Node, ValueRange] = {}
        for node in nodes:
            if node not in carried:
                continue
            if node in self._chosen:
                ranges[node] = self._ranges[self._chosen[node].name]["output"]
            else:
                given = [ranges[each] for each in node.all_input_nodes]
                ranges[node] = (min(low for low, _ in given), max(high for _, high in given))
        for node in reversed(list(ranges)):  # inputs of a concatenation share its scale
            if node not in self._chosen:
                for each in node.all_input_nodes:
                    ranges[each] = ranges[node]
        self._steps = {node: _compute_quantization(range_) for node, range_ in ranges.items()}

    def _replace(self, node: fx.Node, carried: bool) -> None:
        convolution = self._chosen[node]
        seen = self._ranges[convolution.name]
        taken: Any = node.args
        inputs: list[Any] = [self._get_quantized(taken[0], seen["input"])]
        residual = None
        if len(taken) == 3:
            _, given, in_place = taken
            if carried:
                tensor = self._get_quantized(given, seen["residual"])
                residual = self._steps[tensor]
            else:
                tensor = self._get_float(given) if given in self._steps else given
            inputs += [tensor, in_place and tensor is given]
        made = QuantizedConv2d(
            convolution,
            self._steps[inputs[0]],
            residual,
            self._steps.get(node),
            self._dtype,
        )
        node.target = self._add_module(f"{node.name}_int8", made)
        node.args = tuple(inputs)

    def _get_quantized(self, node: fx.Node, range_: ValueRange) -> fx.Node:
        if node in self._steps:
            return node
        if (node, "int8") not in self._made:
            steps = _compute_quantization(range_)
            made = self._insert_after(node, "int8", Quantize(*steps))
            self._steps[made] = steps
        return self._made[node, "int8"]

    def _get_float(self, node: fx.Node) -> fx.Node:
        if (node, "floating") not in self._made:
            self._insert_after(node, "floating", Dequantize(*self._steps[node], self._dtype))
        return self._made[node, "floating"]

    def _insert_after(self, node: fx.Node, what: str, module: nn.Module) -> fx.Node:
        name = self._add_module(f"{node.name}_{what}", module)
        with self._graph.graph.inserting_after(node):
            self._made[node, what] = self._graph.graph.call_module(name, (node,))
        return self._made[node, what]

    def _add_module(self, name: str, module: nn.Module) -> str:
        self._graph.add_module(name, module)
        return name


def _compute_quantization(range_: ValueRange) -> tuple[float, int]:
    """(scale, zero point) of a range, such that 0 is represented exactly."""
    low, high = min(range_[0], 0.0), max(range_[1], 0.0)
    scale = max(high - low, 1e-12) / _LEVELS
    return scale, round(-low / scale)


def _is_quantizable(convolution: FusedConv2d, ranges: ValueRanges) -> bool:
    """Whether oneDNN has an int8 kernel for a convolution, and its input exceeds one pixel."""
    return (
        convolution.name in ranges
        and convolution.activation in _INT8_ACTIVATIONS
        and convolution.input_size[2:] != [1, 1]
    )


def _list_fused_convolutions(graph: fx.GraphModule) -> list[FusedConv2d]:
    return [module for module in graph.modules() if isinstance(module, FusedConv2d)]
