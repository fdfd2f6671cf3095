"""Networks of timm are folded and fused as those of torch are, with the same outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from imgcls.models import zoo
from imgcls.models.fold_batchnorm import fold_batch_norms
from imgcls.models.fuse_cpu import FusedConv2d, fuse_convolutions
from tests.models.test_fuse_cpu import batch_of, needs_onednn

pytest.importorskip("timm")

NETWORKS = ["tf_mobilenetv3_small_minimal_100", "tf_efficientnet_lite0", "regnetx_002"]
"""With an activation in every batch norm; the first two pad as TensorFlow does."""


def build(name: str, classes: int = 7) -> nn.Module:
    torch.manual_seed(0)
    network = zoo.build_network(zoo.resolve_architecture(f"timm:{name}"), classes).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.2, 0.2)
    return network


@needs_onednn
@pytest.mark.parametrize("side", [64, 75])  # the paddings of 75 pixels are symmetric, mostly
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_every_convolution_is_fused_and_the_outputs_stay(name: str, side: int) -> None:
    network = build(name)
    original = copy.deepcopy(network)
    batch = batch_of(3, side)
    expected = network(batch)
    scale = float(expected.abs().max())
    assert scale > 0
    folded = fold_batch_norms(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(batch), expected, atol=2e-5 * scale, rtol=1e-3)

    folded = folded.to(memory_format=torch.channels_last)
    fused = fuse_convolutions(folded, side, keep=zoo.find_head(folded)[1])
    torch.testing.assert_close(fused(batch), expected, atol=2e-5 * scale, rtol=1e-3)
    torch.testing.assert_close(fused(batch[:1]), expected[:1], atol=2e-5 * scale, rtol=1e-3)
    layers = list(fused.modules())
    assert not any(isinstance(layer, (nn.Conv2d, nn.ReLU, nn.ReLU6)) for layer in layers)
    convolutions = [each for each in original.modules() if isinstance(each, nn.Conv2d)]
    assert sum(isinstance(layer, FusedConv2d) for layer in layers) == len(convolutions)

    # the network itself is as it was
    torch.testing.assert_close(network(batch), expected, atol=0, rtol=0)
    assert [name for name, _ in network.named_modules()] == [
        name for name, _ in original.named_modules()
    ]


@needs_onednn
@torch.inference_mode()
def test_ranges_from_before_an_activation_are_not_used_for_the_convolution_with_it() -> None:
    network = build("tf_mobilenetv3_small_minimal_100")
    before = {name for name, each in network.named_modules() if isinstance(each, nn.Conv2d)}
    folded = fold_batch_norms(network).to(memory_format=torch.channels_last)
    fused = fuse_convolutions(folded, 64, keep=zoo.find_head(folded)[1])
    after = {each.name for each in fused.modules() if isinstance(each, FusedConv2d)}
    assert len(after) == len(before)
    # without a batch norm, the head is the same convolution as before
    assert after & before <= {"conv_head"}


@pytest.mark.parametrize("affine", [True, False])
@torch.inference_mode()
def test_a_norm_is_split_with_and_without_weights_and_from_the_weights_of_its_activation(
    affine: bool,
) -> None:
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(4, affine=affine, act_layer=nn.PReLU)
    norm.running_mean.uniform_(-0.2, 0.2)
    norm.running_var.uniform_(0.5, 2)
    norm.act.weight.fill_(0.3)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()
    batch = batch_of(2, 8)
    expected = network(batch)
    folded = fold_batch_norms(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(batch), expected)
