"""The features that come with the logits, from any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imgcls.models import zoo
from imgcls.models.head import HeadNetwork


@pytest.mark.parametrize("name", ["small_cnn", "squeezenet1_1"])
@torch.inference_mode()
def test_logits_come_with_the_input_of_the_final_layer(name: str) -> None:
    architecture = zoo.resolve_architecture(name)
    network = zoo.build_network(architecture, 3).eval()
    batch = torch.randn(5, 3, 64, 64)
    caught: list[torch.Tensor] = []
    hook = zoo.find_head(network)[1].register_forward_pre_hook(
        lambda _, args: caught.append(args[0])
    )
    expected = network(batch)
    hook.remove()
    wrapped = HeadNetwork(network, in_fp32=False)
    logits, features = wrapped(batch)
    assert torch.equal(logits, expected)
    mean = caught[0].mean((2, 3)) if caught[0].dim() == 4 else caught[0]
    assert torch.equal(features, mean)
    assert features.shape == (5, wrapped.embedding_width)
    assert torch.equal(wrapped.network(batch), expected)
    assert not any(module._forward_pre_hooks for module in wrapped.modules())


@torch.inference_mode()
def test_in_bfloat16_the_final_layer_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    wrapped = HeadNetwork(network.to(torch.bfloat16), in_fp32=True)
    logits, features = wrapped(torch.randn(2, 3, 2, 2).to(torch.bfloat16))
    assert (logits.dtype, features.dtype) == (torch.float32, torch.float32)
    assert logits.shape == (2, 3)
