"""Adapters: those of peft, merged into plain weights that compute the same."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.training.config import FinetuneConfig, LoraConfig
from imgcls.training.optim.lora import add_adapters, is_adapter, merge_adapters
from imgcls.training.optim.strategy import find_trainable, plan_param_groups

pytestmark = pytest.mark.skipif(not find_spec("peft"), reason="needs peft")

NAME, OPTIONS = "timm:vit_tiny_patch16_224", {"img_size": 32, "depth": 2}
CONFIG = LoraConfig(rank=4, alpha=6)


def build() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build_network(zoo.resolve_architecture(NAME, OPTIONS), 3).eval()


def randomize(network: nn.Module) -> None:
    """Values for the factors that begin at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.1)


def test_adapters_change_nothing_at_first_and_merged_weights_compute_the_same() -> None:
    network, plain = build(), build()
    images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = plain(images)
        add_adapters(network, CONFIG, seed=0)
        torch.testing.assert_close(network(images), expected)
        randomize(network)
        changed = network(images)
        assert (changed - expected).abs().max() > 0.01
        merged = merge_adapters(network.state_dict(), CONFIG)
        assert merged.keys() == plain.state_dict().keys()
        plain.load_state_dict(merged)
        torch.testing.assert_close(plain(images), changed, rtol=1e-4, atol=1e-5)
        # peft merges to the same weights
        theirs: Any = copy.deepcopy(network)
        for module in theirs.modules():
            if hasattr(module, "base_layer"):
                module.merge()
        layer = theirs.get_submodule("blocks.0.attn.qkv").base_layer
        torch.testing.assert_close(layer.weight, merged["blocks.0.attn.qkv.weight"])


def test_the_adapters_and_the_head_are_trained() -> None:
    network = build()
    add_adapters(network, CONFIG, seed=0)
    trainable = find_trainable(network, "lora", FinetuneConfig(), 1)
    adapters = {name for name, _ in network.named_parameters() if is_adapter(name)}
    # four linear layers in each of two blocks, two factors each
    assert len(adapters) == 16
    assert trainable == adapters | {"head.weight", "head.bias"}
    groups = plan_param_groups(network, "lora", FinetuneConfig())
    assert {name for group in groups for name in group.names} == trainable
    assert not groups[0].has_weight_decay
    sizes = dict(network.named_parameters())
    shapes = {tuple(sizes[name].shape) for name in adapters if "blocks.0.mlp.fc1" in name}
    assert shapes == {(CONFIG.rank, 192), (768, CONFIG.rank)}


def test_the_seed_repeats_the_adapters() -> None:
    first, second, other = build(), build(), build()
    for network, seed in ((first, 0), (second, 0), (other, 1)):
        add_adapters(network, CONFIG, seed=seed)
    pairs = zip(first.named_parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, two) for (_, one), two in pairs)
    pairs = zip(first.named_parameters(), other.parameters(), strict=True)
    assert any(not torch.equal(one, two) for (name, one), two in pairs if is_adapter(name))


def test_a_network_without_linear_layers_is_refused() -> None:
    network = zoo.build_network(zoo.resolve_architecture("resnet18"), 3)
    with pytest.raises(BundleError, match="ResNet has no linear layer below its head"):
        add_adapters(network, CONFIG, seed=0)
