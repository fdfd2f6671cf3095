"""A network's layers from input to output, and the parameter groups that a strategy makes of them.

Owns the generic cut of any torchvision classifier into an ordered list of layers, and from it the
learning rates by depth and the order of unfreezing. Names are those of `named_parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from imgcls.models import zoo

DOMINANT_FRACTION = 2 / 3
"""A block with more than this share of the weighted modules is itself a sequence of layers."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate.

    lr_scale: share of optim.lr
    decayed:  whether weight decay applies: to matrices and filters, not to norms and biases
    """

    names: tuple[str, ...]
    lr_scale: float
    has_weight_decay: bool


def split_layers(network: nn.Module) -> list[list[str]]:
    """Parameter names by layer, input first; the last layer is the head (with auxiliary heads).

    A layer is a child of the network, or of the child that holds nearly all of its layers
    (`features`, `encoder.layers`). One without matrices or filters, such as a norm, belongs to the
    layer before it.
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
        # a parameter of the network itself, such as a class token, moves with the input
        found.setdefault(blocks[0] if block is None else block, []).append(name)
    cut: list[list[str]] = []
    for block in blocks:
        names = found.get(block, [])
        if cut and not any(_has_weight_decay(name, parameters[name]) for name in names):
            cut[-1] += names
        elif names:
            cut.append(names)
    return [*cut, head]


def build_param_groups(
    network: nn.Module, *, backbone_scale: float = 1.0, layer_decay: float = 1.0
) -> list[ParamGroup]:
    """Parameter groups with discriminative learning rates.

    backbone_scale: rate of the layers below the head, as a share of the head's
    layer_decay:    each layer below that moves this much slower than the one above it
    Source of both: Howard & Ruder 2018; Clark et al. 2020 (ELECTRA).
    """
    parameters = dict(network.named_parameters())
    cut = split_layers(network)
    made = []
    for depth, names in enumerate(cut):
        below = len(cut) - 1 - depth
        scale = 1.0 if below == 0 else backbone_scale * layer_decay ** (below - 1)
        for decayed in (True, False):
            chosen = tuple(n for n in names if _has_weight_decay(n, parameters[n]) == decayed)
            if chosen:
                made.append(ParamGroup(chosen, scale, decayed))
    return made


def _has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and filters; not norms, biases, class tokens, position tables or layer scales."""
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
    """Modules with parameters of their own."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def _is_auxiliary(owner: str) -> bool:
    return owner.partition(".")[0].lower().startswith("aux")
