"""Find the convolutions of a traced network with the steps after them; replace them by fused ones.

Used by `fuse_cpu` and `fuse_cuda`, which own the fused layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx, nn

from imgcls.data.decoding.lazy_torchvision import torchvision
from imgcls.models.timm_layers import fix_padding

_ADDITIONS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class FusionSite:
    """A convolution, and the steps after it whose result nothing else reads.

    name:          of the convolution in the network
    convolution:   the layer
    input_shape:   (N, C, H, W) in the sample that was run
    has_residual:  whether a tensor of its result's shape is added to its result
    frees_residual: whether neither that tensor nor a view of its memory is read afterwards, nor by
        the convolution itself
    activation:    class or function of the step after that, if it is among those asked for
    """

    name: str
    convolution: nn.Conv2d
    input_shape: tuple[int, ...]
    has_residual: bool
    frees_residual: bool
    activation: Any


BuildFn = Callable[[FusionSite], tuple[nn.Module, tuple[Any, ...]] | None]
"""Build the layer for a site, which is called with the input, the residual if there is one, and the
returned constants; None leaves the site as it is."""


def find_fusable_convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that can be fused by their own settings."""
    return [module for module in network.modules() if _is_fusable(module)]


def replace_convolutions(
    graph: fx.GraphModule,
    sample: torch.Tensor,
    *,
    keep: nn.Module,
    activations: Container[Any],
    residual_activations: Container[Any],
    build: BuildFn,
) -> int:
    """Replace convolutions and the steps after them in a graph; returns the number replaced.

    sample: an input, which is run to learn the shapes; of two images, so that a tensor that is
        added to each of them, such as a position embedding, is not taken for a residual
    keep:   a layer that is not replaced
    activations, residual_activations: classes and functions that can be fused, without and with the
        addition of a residual
    """
    shapes = _ShapeRecorder(graph)
    with torch.inference_mode():
        shapes.run(sample)
    fix_padding(graph, shapes.shapes)
    _remove_training_layers(graph)
    replacer = _Replacer(graph, shapes.shapes, (activations, residual_activations))
    for number, node in enumerate(list(graph.graph.nodes)):
        module = replacer.modules[str(node.target)] if node.op == "call_module" else None
        if module is not None and module is not keep and _is_fusable(module):
            replacer.replace(node, f"fused_{number}", build)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return len(replacer.made)


class _Replacer:
    """Replaces one convolution after the other; knows the shapes and the order of all steps."""

    def __init__(
        self,
        graph: fx.GraphModule,
        shapes: dict[fx.Node, tuple[int, ...]],
        activations: tuple[Container[Any], Container[Any]],
    ) -> None:
        self._graph = graph
        self._shapes = shapes
        self._activations = activations
        self.modules: dict[str, Any] = dict(graph.named_modules())
        self._order = {node: place for place, node in enumerate(graph.graph.nodes)}
        self.made: set[fx.Node] = set()

    def replace(self, node: fx.Node, name: str, build: BuildFn) -> None:
        """Replace a convolution by the layer that is built for it, if one is."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        last, residual = node, self._find_residual(node)
        if residual is not None:
            (last,) = node.users
        # a convolution may not overwrite its own input
        frees_residual = (
            residual is not None and residual is not source and self._is_last_use(residual, last)
        )
        activation = None
        if len(last.users) == 1:
            (follower,) = last.users
            kind = get_node_kind(follower, self.modules)
            if kind in self._activations[residual is not None]:
                activation, last = kind, follower
        site = FusionSite(
            str(node.target),
            self.modules[str(node.target)],
            self._shapes[source],
            residual is not None,
            frees_residual,
            activation,
        )
        built = build(site)
        if built is None:
            return
        module, constants = built
        self._graph.add_module(name, module)
        self.modules[name] = module
        inputs = (source,) if residual is None else (source, residual)
        with self._graph.graph.inserting_after(last):
            made = self._graph.graph.call_module(name, (*inputs, *constants))
        self.made.add(made)
        self._order[made], self._shapes[made] = self._order[last], self._shapes[last]
        last.replace_all_uses_with(made)
        while last is not node:
            before = next(each for each in last.all_input_nodes if each is not residual)
            self._graph.graph.erase_node(last)
            last = before
        self._graph.graph.erase_node(node)

    def _find_residual(self, node: fx.Node) -> fx.Node | None:
        """The tensor added to a convolution's result, of its shape, if that is its only use."""
        if len(node.users) != 1:
            return None
        (follower,) = node.users
        if (
            follower.op != "call_function"
            or follower.target not in _ADDITIONS
            or len(follower.args) != 2
            or follower.kwargs
        ):
            return None
        others = [each for each in follower.args if each is not node]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        return others[0] if self._shapes.get(others[0]) == self._shapes[node] else None

    def _is_last_use(self, residual: fx.Node, at: fx.Node) -> bool:
        """Whether neither a tensor nor a view of its memory is read after the step `at`."""
        users = [user for user in residual.users if user is not at]
        return self._allocates(residual) and all(
            self._order[user] < self._order[at] and self._allocates(user) for user in users
        )

    def _allocates(self, node: fx.Node) -> bool:
        """Whether a step returns memory of its own."""
        return node in self.made or get_node_kind(node, self.modules) in (nn.Conv2d, nn.MaxPool2d)


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


def _is_fusable(module: nn.Module) -> TypeGuard[nn.Conv2d]:
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
