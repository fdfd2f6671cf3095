"""Parameter groups: a network's layers from input to output, and learning rates by depth.

`split_layers` works for any classifier of torchvision or timm. Its order also defines the order of
unfreezing. Parameter names are those of `named_parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from imgcls.models import zoo

DOMINANT_FRACTION = 2 / 3
"""A block with more than this fraction of the weighted modules is split into its children."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate.

    lr_scale:         factor of optim.lr
    has_weight_decay: true for matrices and filters, false for norms and biases
    """

    names: tuple[str, ...]
    lr_scale: float
    has_weight_decay: bool


def split_layers(network: nn.Module) -> list[list[str]]:
    """Parameter names by layer, input first; the last layer is the head (with auxiliary heads).

    A layer is a child of the network, or of the child that contains most of its layers
    (`features`, `encoder.layers`). A child without matrices or filters, such as a norm, belongs to
    the layer before it.
    """
    heads = zoo.list_head_names(network)
    blocks = _find_blocks(network, "")
    parameters = dict(network.named_parameters())
    found: dict[str, list[str]] = {}
    head: list[str] = []
    for name in parameters:
        owner = name.rpartition(".")[0]
        if owner in heads or _is_auxiliary(owner):
            head.append(name)
            continue
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        # a parameter of the network itself, such as a class token, belongs to the first layer
        found.setdefault(blocks[0] if block is None else block, []).append(name)
    split: list[list[str]] = []
    for block in blocks:
        names = found.get(block, [])
        if split and not any(_has_weight_decay(name, parameters[name]) for name in names):
            split[-1] += names
        elif names:
            split.append(names)
    return [*split, head]


def build_param_groups(
    network: nn.Module, *, backbone_scale: float = 1.0, layer_decay: float = 1.0
) -> list[ParamGroup]:
    """Parameter groups with discriminative learning rates.

    backbone_scale: learning rate of the layers below the head, as a fraction of the head's
    layer_decay:    factor from each layer below the head to the next lower one
    Source of both: Howard & Ruder 2018; Clark et al. 2020 (ELECTRA).
    """
    parameters = dict(network.named_parameters())
    split = split_layers(network)
    groups = []
    for depth, names in enumerate(split):
        below = len(split) - 1 - depth
        scale = 1.0 if below == 0 else backbone_scale * layer_decay ** (below - 1)
        for decayed in (True, False):
            chosen = tuple(n for n in names if _has_weight_decay(n, parameters[n]) == decayed)
            if chosen:
                groups.append(ParamGroup(chosen, scale, decayed))
    return groups


def _has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """True for matrices and filters; not for norms, biases, tokens, position tables and scales."""
    return name.endswith("weight") and parameter.dim() > 1


def _find_blocks(module: nn.Module, prefix: str) -> list[str]:
    total = _count_weighted(module)
    names = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        inner = [each for each in child.children() if _count_weighted(each)]
        if _count_weighted(child) > DOMINANT_FRACTION * total and len(inner) > 1:
            names += _find_blocks(child, f"{path}.")
        else:
            names.append(path)
    return names


def _count_weighted(module: nn.Module) -> int:
    """Number of modules with parameters of their own."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def _is_auxiliary(owner: str) -> bool:
    return owner.partition(".")[0].lower().startswith("aux")
