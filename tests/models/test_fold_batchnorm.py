"""Folding batch norms changes how fast a network is, and not its outputs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from imgcls.models import zoo
from imgcls.models.fold_batchnorm import fold_batch_norms, trace_network

NETWORKS = [
    *("small_cnn", "resnet18", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small"),
    *("shufflenet_v2_x0_5", "efficientnet_b0", "regnet_y_400mf", "mnasnet0_5", "vgg11_bn"),
    *("googlenet", "inception_v3", "densenet121", "convnext_tiny", "vit_b_16", "squeezenet1_1"),
]


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_a_folded_network_has_the_same_outputs(name: str) -> None:
    torch.manual_seed(0)
    network = zoo.build_network(zoo.resolve_architecture(name), 7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.2, 0.2)
    network.eval()
    side = zoo.get_default_preprocess(zoo.resolve_architecture(name)).crop
    batch = torch.randn(3, 3, side, side)
    expected, before = network(batch), norms(network)
    head, layer = zoo.find_head(network)
    made = fold_batch_norms(network)
    found = made(batch)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=2e-5 * scale, rtol=1e-3)
    assert zoo.find_head(made)[0] == head
    assert type(zoo.find_head(made)[1]) is type(layer)
    torch.testing.assert_close(made(batch[:1]), found[:1], atol=2e-5 * scale, rtol=1e-3)
    if name in ("resnet18", "mobilenet_v3_small", "inception_v3", "small_cnn"):
        assert before > 0
        assert norms(made) == 0
    if before == 0:
        assert made is network


def test_a_network_that_cannot_be_followed_is_left_alone() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(x)) if float(x.sum()) > 0 else x

    network = Restless().eval()
    assert fold_batch_norms(network) is network


def test_other_threads_run_their_networks_while_one_is_traced() -> None:
    other = zoo.build_network(zoo.resolve_architecture("small_cnn", {"width": 4}), 3).eval()
    batch = torch.rand(2, 3, 32, 32)
    expected, found = other(batch), []

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found.append(pool.submit(other, batch).result())
            return self.layer(x)

    with ThreadPoolExecutor(1) as pool:
        assert trace_network(Traced()) is not None
    torch.testing.assert_close(found[0], expected)


def test_networks_are_traced_in_several_threads_at_a_time() -> None:
    original = nn.Module.__call__
    networks = [zoo.build_network(zoo.resolve_architecture("small_cnn"), 3) for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        traced = list(pool.map(trace_network, networks))
    assert nn.Module.__call__ is original
    calls = [[n.target for n in each.graph.nodes if n.op == "call_module"] for each in traced]  # type: ignore[union-attr]
    assert all(each == calls[0] and len(each) > 3 for each in calls)


def test_a_convolution_that_serves_two_keeps_its_norms() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 3, padding=1)
            self.one, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            both = self.convolution(x)
            twice: torch.Tensor = self.one(both) + self.other(self.convolution(both))
            return twice

    network = Shared().eval()
    network.one.running_mean.uniform_(-1, 1)
    batch = torch.randn(2, 3, 8, 8)
    made = fold_batch_norms(network)
    assert norms(made) == 2
    torch.testing.assert_close(made(batch), network(batch))
