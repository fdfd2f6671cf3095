"""Fold batch norms into the weights of the preceding convolutions, to save a step per forward.

Source of the formula: Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, 2018, section 3.2.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from imgcls.models.timm_layers import is_norm_act, is_same_padded, split_norm_acts


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold the batch norms of a network; returns it unchanged if it has none.

    network: in eval mode and float32, in which the weights are multiplied
    A network whose forward pass torch.fx cannot trace is returned unchanged.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    traced = trace_network(network)
    if traced is None:
        return network
    modules = dict(traced.named_modules())
    split = {f"{name}.norm" for name, module in network.named_modules() if is_norm_act(module)}
    for node in list(traced.graph.nodes):
        convolution = _find_foldable_convolution(node, modules)
        if convolution is None:
            continue
        fused = fuse_conv_bn_eval(modules[convolution.target], modules[node.target])
        if node.target in split:
            # another name: int8 ranges of earlier versions are by the convolution's, and were
            # measured before the activation
            convolution.target = node.target
        traced.set_submodule(str(convolution.target), fused)
        node.replace_all_uses_with(convolution)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def trace_network(network: nn.Module) -> fx.GraphModule | None:
    """The torch.fx graph of a network; None if the steps depend on the input.

    May be called while other threads run or trace other networks.
    """
    if isinstance(network, fx.GraphModule):
        return network
    try:
        with _TRACING:
            graph = _Tracer().trace(network)
        traced = fx.GraphModule(network, graph)
        if hasattr(network, "class_heads"):
            traced.class_heads = network.class_heads
        split_norm_acts(traced)
        return traced
    except Exception:  # noqa: BLE001  any error of its code when its input is a proxy
        return None


_TRACING = threading.Lock()
"""Held while torch.fx replaces `Module.__call__`, for all threads of the process."""


class _Tracer(fx.Tracer):
    """Tracer of one thread's calls; subclasses of layers, such as timm's Linear, are leaves."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record a call, or run it if it is of another thread, which the tracer sees too."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        is_layer = isinstance(module, (nn.Linear, nn.Conv2d)) or is_norm_act(module)
        return is_layer or super().is_leaf_module(module, name)


def _find_foldable_convolution(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The convolution to fold a batch norm into: it runs once and has no other user."""
    if node.op != "call_module" or type(modules[str(node.target)]) is not nn.BatchNorm2d:
        return None
    (source,) = node.args
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
        return None
    runs = [each for each in node.graph.nodes if each.target == source.target]
    convolution = modules[str(source.target)]
    is_plain = type(convolution) is nn.Conv2d or is_same_padded(convolution)
    return source if is_plain and len(runs) == 1 else None
