"""Fusing convolutions with what follows them changes how fast a network is, not its outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

from imgcls.models import zoo
from imgcls.models.fold_batchnorm import fold_batch_norms
from imgcls.models.fuse_cpu import FusedConv2d, fuse_convolutions, has_onednn_kernels
from tests.models.test_fold_batchnorm import NETWORKS

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN here"
)


def batch_of(count: int, side: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, side, side).to(memory_format=torch.channels_last)


@needs_onednn
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_a_fused_network_has_the_same_outputs(name: str) -> None:
    torch.manual_seed(0)
    architecture = zoo.resolve_architecture(name)
    network = zoo.build_network(architecture, 7).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    where, head = zoo.find_head(network)
    if name.startswith("vit"):
        nn.init.normal_(head.weight)  # nothing but zeros as it is built
    side = zoo.get_default_preprocess(architecture).crop
    batch = batch_of(3, side)
    expected = network(batch)
    plain = fold_batch_norms(network).to(memory_format=torch.channels_last)
    before = sum(isinstance(module, nn.Conv2d) for module in plain.modules())
    made = fuse_convolutions(plain, side, keep=zoo.find_head(plain)[1])
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(made(batch), expected, atol=2e-5 * scale, rtol=1e-3)
    torch.testing.assert_close(made(batch[:1]), expected[:1], atol=2e-5 * scale, rtol=1e-3)
    assert zoo.find_head(made)[0] == where
    left = sum(isinstance(module, nn.Conv2d) for module in made.modules())
    assert left == isinstance(head, nn.Conv2d)
    assert sum(isinstance(module, FusedConv2d) for module in made.modules()) == before - left


@pytest.mark.skipif(
    not has_onednn_kernels(torch.bfloat16), reason="no bf16 convolutions for this CPU"
)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
@torch.inference_mode()
def test_in_bf16_it_is_no_further_from_fp32_than_step_by_step(name: str) -> None:
    torch.manual_seed(0)
    network = fold_batch_norms(zoo.build_network(zoo.resolve_architecture(name), 7).eval())
    batch = batch_of(8, 224)
    exact = network(batch)
    rounded = copy.deepcopy(network).to(torch.bfloat16).to(memory_format=torch.channels_last)
    stepwise = rounded(batch.bfloat16()).float()
    made = fuse_convolutions(rounded, 224, keep=zoo.find_head(rounded)[1])
    found = made(batch.bfloat16()).float()
    assert not any(isinstance(module, nn.Conv2d) for module in made.modules())
    assert float((found - exact).abs().mean()) <= 1.1 * float((stepwise - exact).abs().mean())


@needs_onednn
@torch.inference_mode()
def test_a_residual_that_is_read_again_keeps_its_memory() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.one(x)
            total = self.two(first) + first
            means = torch.cat([total.mean((2, 3)), first.mean((2, 3))], 1)
            out: torch.Tensor = self.head(means)
            return out

    torch.manual_seed(0)
    network = Twice().eval()
    batch = batch_of(2, 16)
    expected = network(batch)
    made = fuse_convolutions(network, 16, keep=network.head)
    torch.testing.assert_close(made(batch), expected)
    assert isinstance(made, fx.GraphModule)
    sums = [node.args for node in made.graph.nodes if len(node.args) == 3]
    assert [args[2] for args in sums] == [False]


class Sum(nn.Module):
    """A convolution, what is added to its result, and an activation."""

    def __init__(self, kind: str, activation: nn.Module) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.three = nn.Conv2d(16, 16, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, 16, 16, 16))
        self.head = nn.Linear(16, 2)
        self.kind, self.activation = kind, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.one(x)
        added = self.position if self.kind == "position" else first
        if self.kind == "strided":
            added = torch.tanh(first).transpose(2, 3)
        second = self.two(first if self.kind == "input" else torch.tanh(first))
        total = self.activation(added + second)
        out: torch.Tensor = self.head(self.three(total).mean((2, 3)))
        return out


SUMS = [
    *(("residual", activation) for activation in (nn.ReLU6(), nn.Hardswish(), nn.Sigmoid())),
    *((kind, nn.ReLU()) for kind in ("input", "position", "strided")),
    ("input", nn.SiLU()),
]


@needs_onednn
@pytest.mark.parametrize(("kind", "activation"), SUMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_sum_with_a_convolution_is_that_of_the_steps(
    kind: str, activation: nn.Module, dtype: torch.dtype
) -> None:
    if not has_onednn_kernels(dtype):
        pytest.skip("no bf16 convolutions for this CPU")
    torch.manual_seed(0)
    network = Sum(kind, activation).eval()
    batch = batch_of(5, 16)
    expected = network(batch)
    network = network.to(dtype).to(memory_format=torch.channels_last)
    made = fuse_convolutions(network, 16, keep=network.head)
    assert sum(isinstance(module, FusedConv2d) for module in made.modules()) == 3
    close = {"atol": 0.01, "rtol": 0.0} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(made(batch.to(dtype)).float(), expected, **close)


@needs_onednn
@torch.inference_mode()
def test_a_scaled_addition_is_not_fused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = torch.add(self.convolution(x), x, alpha=2)
            out: torch.Tensor = self.head(total.mean((2, 3)))
            return out

    torch.manual_seed(0)
    network = Scaled().eval()
    batch = batch_of(2, 16)
    expected = network(batch)
    made = fuse_convolutions(network, 16, keep=network.head)
    assert any(isinstance(module, FusedConv2d) for module in made.modules())
    torch.testing.assert_close(made(batch), expected)


@torch.inference_mode()
def test_a_network_that_cannot_be_followed_is_left_alone() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.convolution(x) if float(x.sum()) > 0 else x
            out: torch.Tensor = self.head(y.mean((2, 3)))
            return out

    network = Restless().eval()
    assert fuse_convolutions(network, 8, keep=network.head) is network
