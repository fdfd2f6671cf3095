"""Layers of timm in a traced network, replaced by layers of torch that compute the same.

timm joins batch norms and activations in one layer, and pads as TensorFlow does in a subclass of
the convolution. Only torch's own layers can be folded and fused.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

from torch import fx, nn
from torch.nn import functional as F


def is_norm_act(module: nn.Module) -> bool:
    """Whether a layer is timm's batch norm with an activation."""
    return type(module) is _find_class("BatchNormAct2d")


def is_same_padded(module: nn.Module) -> bool:
    """Whether a layer is timm's convolution with TensorFlow's padding, of the size of its input."""
    return type(module) is _find_class("Conv2dSame")


def _find_class(name: str) -> type | None:
    """A class of timm's layers; None if no network of timm was built in this process."""
    return getattr(sys.modules.get("timm.layers"), name, None)


def split_norm_acts(graph: fx.GraphModule) -> None:
    """Replace each batch norm with an activation by a batch norm, and the activation.

    The layers share their parameters with the original network, which stays as it is.
    """
    modules: dict[str, Any] = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        source = modules[str(node.target)] if node.op == "call_module" else None
        if source is None or not is_norm_act(source):
            continue
        norm = nn.BatchNorm2d(
            source.num_features,
            eps=source.eps,
            affine=source.affine,
            track_running_stats=source.track_running_stats,
            device="meta",
        )
        state = source.state_dict()  # has the parameters of the activation too
        norm.load_state_dict({name: state[name] for name in norm.state_dict()}, assign=True)
        parts = OrderedDict(norm=norm.eval(), drop=source.drop, act=source.act)
        graph.set_submodule(str(node.target), nn.Sequential(parts))
        with graph.graph.inserting_after(node):
            drop = graph.graph.call_module(f"{node.target}.drop", (node,))
        with graph.graph.inserting_after(drop):
            act = graph.graph.call_module(f"{node.target}.act", (drop,))
        node.replace_all_uses_with(act, delete_user_cb=lambda user, drop=drop: user is not drop)
        node.target = f"{node.target}.norm"
    graph.recompile()


def fix_padding(graph: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
    """Replace each convolution with TensorFlow's padding by one that pads for inputs of one size.

    shapes: of the tensor of each step, (N, C, H, W); those of new steps are added
    An asymmetric padding becomes a step of its own.
    """
    modules: dict[str, Any] = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        source = modules[str(node.target)] if node.op == "call_module" else None
        if source is None or not is_same_padded(source):
            continue
        before = node.args[0]
        count, channels, height, width = shapes[before]
        left, right, top, bottom = sys.modules["timm.layers.padding"].pad_same_arg(
            [height, width], source.kernel_size, source.stride, source.dilation
        )
        is_symmetric = left == right and top == bottom
        if not is_symmetric:
            with graph.graph.inserting_before(node):
                padded = graph.graph.call_function(F.pad, (before, (left, right, top, bottom)))
            shapes[padded] = (count, channels, height + top + bottom, width + left + right)
            node.args = (padded,)
        convolution = _build_convolution(source, (top, left) if is_symmetric else (0, 0))
        graph.set_submodule(str(node.target), convolution)
    graph.recompile()


def _build_convolution(source: nn.Conv2d, padding: tuple[int, int]) -> nn.Conv2d:
    """A convolution of torch with the parameters of another."""
    made = nn.Conv2d(
        source.in_channels, source.out_channels, source.kernel_size,  # type: ignore[arg-type]
        source.stride, padding, source.dilation, source.groups,  # type: ignore[arg-type]
        bias=source.bias is not None, device="meta",
    )  # fmt: skip
    made.load_state_dict(source.state_dict(), assign=True)
    return made.eval()
