"""Depthwise convolutions of a bfloat16 training: float32 gradients, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imgcls.training.depthwise import use_float32_depthwise
from imgcls.training.train_step import WorkerContext
from tests.training.test_train_step import build_train_step, config

CHANNELS = 16


def build_layer(**changes: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    settings = {"kernel_size": 5, "padding": 2, "groups": CHANNELS, **changes}
    return nn.Conv2d(CHANNELS, CHANNELS, **settings)


def build_inputs() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, CHANNELS, 12, 12).bfloat16()


def run_in_bfloat16(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        outputs: torch.Tensor = layer(inputs)
    return outputs


@pytest.mark.parametrize("stride", [1, 2])
def test_outputs_and_gradients_are_those_of_float32(stride: int) -> None:
    layer, inputs = build_layer(stride=stride), build_inputs()
    weight = layer.weight.detach().clone().requires_grad_()
    exact_inputs = inputs.float().requires_grad_()
    expected = F.conv2d(exact_inputs, weight, layer.bias, stride, 2, groups=CHANNELS)
    gradient = torch.randn_like(expected).bfloat16()
    expected.backward(gradient.float())
    assert exact_inputs.grad is not None

    use_float32_depthwise(layer)
    inputs.requires_grad_()
    outputs = run_in_bfloat16(layer, inputs)
    outputs.backward(gradient)

    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, expected.bfloat16(), rtol=0, atol=0)
    assert layer.weight.grad is not None
    assert inputs.grad is not None
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=0, atol=0)
    torch.testing.assert_close(inputs.grad, exact_inputs.grad.bfloat16(), rtol=0, atol=0)


def test_forward_passes_without_gradients_stay_in_bfloat16() -> None:
    layer, inputs = build_layer(), build_inputs()
    frozen = copy.deepcopy(layer).requires_grad_(False)
    with torch.no_grad():
        before = run_in_bfloat16(layer, inputs)
        rounded = run_in_bfloat16(layer, inputs.float())
        exact = layer(inputs.float()).bfloat16()
    for each in (layer, frozen):
        use_float32_depthwise(each)
    with torch.no_grad():
        assert torch.equal(run_in_bfloat16(layer, inputs), before)
        # the dtype shows which way a float32 input took
        assert run_in_bfloat16(layer, inputs.float()).dtype == rounded.dtype == torch.bfloat16
    assert torch.equal(run_in_bfloat16(frozen, inputs), before)
    assert run_in_bfloat16(frozen, inputs.float()).dtype == torch.bfloat16
    assert run_in_bfloat16(layer, inputs.float()).dtype == torch.float32
    assert not torch.equal(before, exact), "both ways give the same: the test shows nothing"


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": 1},
        {"groups": 4},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1, "padding": 0},
    ],
    ids=["dense", "grouped", "3x3 without a stride", "1x1"],
)
def test_convolutions_with_fast_gradients_are_left_alone(changes: dict[str, Any]) -> None:
    layer = build_layer(**changes)
    use_float32_depthwise(layer)
    assert type(layer) is nn.Conv2d


def test_a_copy_computes_with_its_own_weights_and_the_state_dict_is_the_same() -> None:
    layer, inputs = build_layer(), build_inputs()
    keys = list(layer.state_dict())
    use_float32_depthwise(layer)
    assert list(layer.state_dict()) == keys
    average = copy.deepcopy(layer)
    before = run_in_bfloat16(average, inputs)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(run_in_bfloat16(average, inputs), before)


@pytest.mark.parametrize(("precision", "is_used"), [("fp32", False), ("bf16", True)])
def test_a_training_uses_them_in_bfloat16_only(precision: str, is_used: bool) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 1), build_layer(), nn.Flatten(), nn.Linear(CHANNELS * 8 * 8, 4)
    )
    context = WorkerContext(0, 1, torch.device("cpu"), precision)
    made = build_train_step(network, config(), context)
    outputs = run_in_bfloat16(made.network.get_submodule("1"), torch.ones(1, CHANNELS, 8, 8))
    assert outputs.dtype == (torch.float32 if is_used else torch.bfloat16)
