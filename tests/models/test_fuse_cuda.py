"""On GPUs, fusing convolutions changes how fast a network is, not its outputs.

Without a GPU, doubles of torch's two functions compute the same by separate steps.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from imgcls.models import fuse_cuda, zoo
from imgcls.models.classifier import Classifier
from imgcls.models.fold_batchnorm import fold_batch_norms
from imgcls.models.fuse_cuda import CudnnConv2d
from tests.models.test_classifier import bundle_of

SIDE = 64
SIZES = (1, 5)


class Cudnn:
    """The two functions of torch, on a CPU, rounding once as cuDNN does; counts their calls.

    damage: changes a result before the ReLU, as a faulty kernel would
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.damage: Callable[[torch.Tensor], torch.Tensor] = lambda total: total

    def convolution_relu(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *layout: Any
    ) -> torch.Tensor:
        self.calls["relu"] += 1
        total = F.conv2d(x.float(), weight.float(), bias.float(), *layout)
        return F.relu(self.damage(total)).to(x.dtype)

    def convolution_add_relu(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
        alpha: float,
        bias: torch.Tensor,
        *layout: Any,
    ) -> torch.Tensor:
        self.calls["add_relu"] += 1
        total = F.conv2d(x.float(), weight.float(), bias.float(), *layout) + alpha * residual
        return F.relu(self.damage(total)).to(x.dtype)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Cudnn:
    made = Cudnn()
    monkeypatch.setattr(torch, "cudnn_convolution_relu", made.convolution_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", made.convolution_add_relu)
    return made


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network with random weights and batch norms, as a bundle's is when it is fused."""
    torch.manual_seed(0)
    network = zoo.build_network(zoo.resolve_architecture(name), 7).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    folded = fold_batch_norms(network).to(device, dtype)
    return folded.to(memory_format=torch.channels_last)


def batch_like(network: nn.Module, count: int, side: int = SIDE) -> torch.Tensor:
    torch.manual_seed(1)
    weight = next(network.parameters())
    return torch.randn(count, 3, side, side).to(weight).to(memory_format=torch.channels_last)


def fuse(network: nn.Module, side: int = SIDE) -> nn.Module:
    keep = zoo.find_head(network)[1]
    return fuse_cuda.fuse_on_cuda(network, side, keep=keep, batch_sizes=SIZES)


@pytest.mark.parametrize(
    ("name", "relu", "add_relu"),
    [
        ("small_cnn", 6, 0),
        ("resnet18", 8, 8),  # neither the 7x7 stem nor the three projections
        ("resnext50_32x4d", 16, 16),  # the 3x3 convolutions are grouped
        ("squeezenet1_1", 25, 0),  # all but the head, which is a convolution
        ("densenet121", 58, 0),  # the first convolution of each block
    ],
)
@torch.inference_mode()
def test_a_fused_network_has_the_same_outputs(
    cudnn: Cudnn, caplog: pytest.LogCaptureFixture, name: str, relu: int, add_relu: int
) -> None:
    network = build(name)
    batch = batch_like(network, 3)
    expected, steps = network(batch), str(getattr(network, "graph", ""))
    head = zoo.find_head(network)
    made = fuse(network)
    assert caplog.messages == []
    cudnn.calls.clear()
    found = made(batch)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=2e-5 * scale, rtol=1e-3)
    assert cudnn.calls == Counter(relu=relu, add_relu=add_relu)
    assert zoo.find_head(made) == head
    # the network that was given is as it was
    assert torch.equal(network(batch), expected)
    assert str(getattr(network, "graph", "")) == steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_fewer_roundings_are_no_difference(
    cudnn: Cudnn, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    network = build("resnet18", dtype=dtype)
    made = fuse(network)
    assert caplog.messages == []
    assert sum(isinstance(module, CudnnConv2d) for module in made.modules()) == 16


def test_a_network_without_relu_stays_as_it_is(cudnn: Cudnn) -> None:
    network = build("mobilenet_v2")
    assert fuse(network) is network
    assert not cudnn.calls


class Steps(nn.Module):
    """Convolutions whose result is read twice, scaled, or not followed by ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.layers[0](x) + x)  # fused
        y = self.layers[1](x)
        x = F.relu(y) + y
        x = self.layers[2](x) + x
        x = F.relu(torch.add(self.layers[3](x), x, alpha=2))
        x = F.relu(self.layers[4](x) + x.mean((2, 3), keepdim=True))
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


@torch.inference_mode()
def test_only_steps_that_the_kernel_computes_are_fused(cudnn: Cudnn) -> None:
    torch.manual_seed(0)
    network = Steps().eval()
    batch = batch_like(network, 2)
    made = fuse_cuda.fuse_on_cuda(network, SIDE, keep=network.head, batch_sizes=SIZES)
    cudnn.calls.clear()
    torch.testing.assert_close(made(batch), network(batch))
    assert cudnn.calls == Counter(add_relu=1)


def test_results_are_compared_for_every_batch_size(cudnn: Cudnn) -> None:
    seen: list[int] = []

    def record(total: torch.Tensor) -> torch.Tensor:
        seen.append(len(total))
        return total

    cudnn.damage = record
    fuse(build("small_cnn"))
    assert Counter(seen) == {1: 6, 5: 6}


def add_bias(total: torch.Tensor) -> torch.Tensor:
    return total + 0.05


def spoil_last_image(total: torch.Tensor) -> torch.Tensor:
    total = total.clone()
    total[-1, :, -1] = 0
    return total


def turn_into_nan(total: torch.Tensor) -> torch.Tensor:
    return total * float("nan")


def refuse(total: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("GET was unable to find an engine\n to execute this computation")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (add_bias, "layer features.0.0 differs by "),
        (spoil_last_image, "layer features.0.0 differs by "),
        (turn_into_nan, "layer features.0.0 differs by nan% on average"),
        (refuse, "GET was unable to find an engine"),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_a_network_that_cudnn_computes_wrongly_stays_as_it_is(
    cudnn: Cudnn,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[torch.Tensor], torch.Tensor],
    reason: str,
    size: int,
) -> None:
    network = build("small_cnn")
    cudnn.damage = lambda total: damage(total) if len(total) == size else total
    with caplog.at_level(logging.WARNING, "imgcls"):
        assert fuse(network) is network
    (message,) = caplog.messages
    assert message.startswith(f"bias, addition and ReLU run as separate kernels: {reason}")


def test_a_mistake_in_the_graph_is_found(
    cudnn: Cudnn, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build("resnet18")
    insert = fuse_cuda.insert_cuda_convolutions

    def misplace(*args: Any, **options: Any) -> fx.GraphModule | None:
        graph = insert(*args, **options)
        assert graph is not None
        node = next(node for node in graph.graph.nodes if len(node.args) == 2)
        node.args = (node.args[0],)  # without its residual
        graph.recompile()
        return graph

    monkeypatch.setattr(fuse_cuda, "insert_cuda_convolutions", misplace)
    with caplog.at_level(logging.WARNING, "imgcls"):
        assert fuse(network) is network
    assert "the network differs by " in caplog.messages[0]


def test_a_gpu_without_memory_is_no_property_of_the_network(cudnn: Cudnn) -> None:
    def fail(total: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cudnn.damage = fail
    with pytest.raises(torch.OutOfMemoryError):
        fuse(build("small_cnn"))


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
def test_a_classifier_on_a_gpu_has_fused_layers(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", "resnet18")
    classifier = Classifier.load(str(bundle), device="cuda", batch_size=SIZES)
    layers = [
        module
        for module in classifier._engine._network.modules()
        if isinstance(module, CudnnConv2d)
    ]
    assert len(layers) == 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "squeezenet1_1"])
@torch.inference_mode()
def test_on_a_gpu_a_fused_network_is_as_close_to_fp64_as_step_by_step(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = build(name, "cuda", torch.float64)
    network = build(name, "cuda", dtype)
    batch = batch_like(network, 5, 224)
    expected, stepwise = exact(batch.double()), network(batch).double()
    made = fuse(network, 224)
    assert caplog.messages == []
    assert any(isinstance(module, CudnnConv2d) for module in made.modules())
    found = made(batch).double()
    if dtype == torch.float32:  # the order of summation decides
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, atol=2e-5 * scale, rtol=1e-3)
        return
    assert float((found - expected).abs().mean()) <= 1.1 * float((stepwise - expected).abs().mean())
