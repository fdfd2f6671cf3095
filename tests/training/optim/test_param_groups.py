"""Any classifier is cut into layers, input first and head last, with no parameter left out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from imgcls.models import zoo
from imgcls.training.optim.param_groups import ParamGroup, build_param_groups, split_layers

FAMILIES = {
    "alexnet": 3, "convnext_tiny": 9, "densenet121": 9, "efficientnet_b0": 10,
    "efficientnet_v2_s": 9, "googlenet": 13, "inception_v3": 17, "maxvit_t": 7, "mnasnet0_5": 11,
    "mobilenet_v2": 20, "mobilenet_v3_small": 15, "regnet_y_400mf": 6, "resnet18": 6,
    "resnet101": 28, "shufflenet_v2_x0_5": 6, "small_cnn": 5, "squeezenet1_1": 10, "swin_t": 9,
    "swin_v2_t": 9, "vgg11_bn": 10, "vit_b_16": 14,
}  # fmt: skip
"""One of each, and how many layers it has."""


class Empty(TorchFunctionMode):
    """Networks as shapes: no memory is taken and nothing is filled in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@functools.cache
def shape_of(name: str) -> nn.Module:
    with Empty():
        return zoo.build_network(zoo.add_pretrained_options(zoo.resolve_architecture(name)), 7)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_in_one_layer_and_the_head_in_the_last(name: str) -> None:
    network = shape_of(name)
    cut = split_layers(network)
    assert sorted(n for layer in cut for n in layer) == sorted(
        n for n, _ in network.named_parameters()
    )
    assert all(cut), "no layer is empty"
    assert len(cut) == FAMILIES[name]
    head, _ = zoo.find_head(network)
    assert f"{head}.weight" in cut[-1]
    others = {n for n in cut[-1] if not n.startswith(f"{head}.")}
    assert all(n.lower().startswith("aux") for n in others)
    assert bool(others) == (name in ("inception_v3", "googlenet"))


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_come_in_the_order_in_which_images_pass_through(name: str) -> None:
    network = shape_of(name).eval()
    place = {n: depth for depth, layer in enumerate(split_layers(network)) for n in layer}
    visited: list[int] = []
    hooks = []
    for module_name, module in network.named_modules():
        own = [n for n, _ in module.named_parameters(module_name, recurse=False)]
        if own and module_name:
            at = place[own[0]]
            hooks.append(module.register_forward_pre_hook(lambda *_, at=at: visited.append(at)))
    tables = {
        n: torch.empty_like(t, device="meta")
        for n, t in (*network.named_parameters(), *network.named_buffers())
    }
    size = zoo.get_default_preprocess(zoo.resolve_architecture(name)).crop
    torch.func.functional_call(network, tables, torch.zeros(2, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    assert visited == sorted(visited)
    assert set(visited) == set(place.values())


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("resnet18", ["conv1.weight", "bn1.weight", "bn1.bias"], "layer1."),
        ("vit_b_16", ["class_token", "conv_proj.weight"], "encoder.layers.encoder_layer_0."),
        ("small_cnn", ["features.0.0.weight", "features.0.1.weight"], "features.1."),
        ("swin_t", ["features.0.0.weight", "features.0.2.weight"], "features.1."),
    ],
)
def test_what_belongs_to_the_input_moves_with_the_first_layer(
    name: str, first: list[str], second: str
) -> None:
    cut = split_layers(shape_of(name))
    assert set(first) <= set(cut[0])
    assert all(n.startswith(second) for n in cut[1])


def test_positions_and_last_norms_are_no_layers_of_their_own() -> None:
    cut = split_layers(shape_of("vit_b_16"))
    assert "encoder.pos_embedding" in cut[0]
    assert "encoder.ln.weight" in cut[-2]
    assert any(n.startswith("encoder.layers.encoder_layer_11.") for n in cut[-2])


# ------------------------------------------------------------------ parameter groups


def by_name(made: list[ParamGroup]) -> dict[str, ParamGroup]:
    return {name: group for group in made for name in group.names}


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "convnext_tiny", "swin_t", "swin_v2_t"])
def test_decay_pulls_on_matrices_and_filters_alone(name: str) -> None:
    network = shape_of(name)
    group = by_name(build_param_groups(network))
    norms = tuple(
        n for n, m in network.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)) and n
    )
    for parameter, _ in network.named_parameters():
        module, _, kind = parameter.rpartition(".")
        matrix = module not in norms and kind in ("weight", "in_proj_weight")
        assert group[parameter].has_weight_decay == matrix, parameter


@pytest.mark.parametrize(
    ("name", "free", "decayed"),
    [
        ("vit_b_16", "class_token", "conv_proj.weight"),
        ("vit_b_16", "encoder.pos_embedding",
         "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"),
        ("convnext_tiny", "features.1.0.layer_scale", "features.1.0.block.0.weight"),
        ("swin_t", "features.1.0.attn.relative_position_bias_table",
         "features.1.0.attn.qkv.weight"),
        ("swin_v2_t", "features.1.0.attn.logit_scale", "features.1.0.attn.cpb_mlp.0.weight"),
    ],
)  # fmt: skip
def test_tables_tokens_and_scales_are_free_of_decay(name: str, free: str, decayed: str) -> None:
    group = by_name(build_param_groups(shape_of(name)))
    assert not group[free].has_weight_decay
    assert group[decayed].has_weight_decay


def test_each_layer_moves_by_the_decay_less_than_the_one_above() -> None:
    network = shape_of("vit_b_16")
    group = by_name(build_param_groups(network, backbone_scale=0.5, layer_decay=0.8))
    for depth, names in enumerate(reversed(split_layers(network))):
        expected = 1.0 if depth == 0 else 0.5 * 0.8 ** (depth - 1)
        assert [group[n].lr_scale for n in names] == pytest.approx([expected] * len(names))
    assert sorted(
        n for g in build_param_groups(network, layer_decay=0.8) for n in g.names
    ) == sorted(n for n, _ in network.named_parameters())


def test_without_scales_everything_moves_alike() -> None:
    assert {group.lr_scale for group in build_param_groups(shape_of("resnet18"))} == {1.0}
