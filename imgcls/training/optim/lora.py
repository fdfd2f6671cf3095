"""Low-rank adapters (LoRA) for the linear layers of a network, by the package peft.

Source: Hu et al., ICLR 2022, "LoRA: low-rank adaptation of large language models".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from imgcls.data.optional_packages import import_package
from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.training.config import LoraConfig

_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
"""In peft's names of the original layer's parameters and of the two factors of its adapter."""


def add_adapters(network: nn.Module, config: LoraConfig, *, seed: int) -> None:
    """Add an adapter to every linear layer below the heads; their outputs stay as they are.

    Raises RequestError if peft is not installed, BundleError for a network without linear layers.
    """
    names = check_can_adapt(network)
    import peft

    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, network)


def check_can_adapt(network: nn.Module) -> list[str]:
    """The names of the linear layers that get adapters.

    Raises RequestError if peft is not installed, BundleError for a network without linear layers.
    """
    import_package("peft", "LoraConfig", "strategy lora", "lora")
    heads = zoo.list_head_names(network)
    # a subclass, such as that of torch's attention, may use its weight without calling the layer
    found = [
        name
        for name, module in network.named_modules()
        if type(module) is nn.Linear and name not in heads
    ]
    if not found:
        raise BundleError(
            f"strategy lora: {type(network).__name__} has no linear layer below its head; LoRA is "
            "for vision transformers. Pass --strategy probe_then_finetune."
        )
    return found


def is_adapter(parameter: str) -> bool:
    """Whether a parameter, by its name, is a factor of an adapter."""
    return parameter.endswith((_DOWN, _UP))


def merge_adapters(
    state: Mapping[str, torch.Tensor], config: LoraConfig
) -> dict[str, torch.Tensor]:
    """The weights of the network without adapters that computes the same."""
    merged = {key.replace(_BASE, "."): value for key, value in state.items() if not is_adapter(key)}
    for key, down in state.items():
        if key.endswith(_DOWN):
            layer = key.removesuffix(_DOWN)
            change = state[layer + _UP].float() @ down.float() * (config.alpha / config.rank)
            weight = merged[f"{layer}.weight"]
            merged[f"{layer}.weight"] = (weight.float() + change).to(weight.dtype)
    return merged
