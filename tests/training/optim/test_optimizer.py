"""The rate at every step is a function of the step; the average follows its formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from imgcls.training.config import OptimConfig
from imgcls.training.optim.optimizer import (
    ModelEma,
    build_optimizer,
    compute_lr_factor,
    copy_optimizer_state,
    copy_state_dict,
    set_learning_rates,
)
from imgcls.training.optim.param_groups import ParamGroup, build_param_groups


def factors(steps: int, **settings: Any) -> list[float]:
    config = OptimConfig(**settings)
    return [compute_lr_factor(config, step, steps) for step in range(steps)]


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


# ------------------------------------------------------------------ schedules


def test_the_cosine_rises_to_its_peak_and_falls_to_nothing() -> None:
    found = factors(100, schedule="cosine", warmup=0.1)
    assert found[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert found[10] == 1.0 == max(found)
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[55] == pytest.approx(0.5)  # half way down
    assert 0 < found[99] < 1e-3


def test_the_cosine_is_that_of_torch_after_the_warm_up() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=90)
    for found in factors(100, schedule="cosine", warmup=0.1)[10:]:
        assert found == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-9)
        theirs.step()
        schedule.step()


def test_constant_stays_where_the_warm_up_has_led() -> None:
    assert factors(10, schedule="constant", warmup=0.2) == pytest.approx([1 / 3, 2 / 3] + [1] * 8)
    assert factors(4, schedule="constant", warmup=0.0) == [1.0] * 4


def test_steps_drop_the_rate_where_they_were_asked_to() -> None:
    found = factors(10, schedule="step", warmup=0.0, step_every=0.3, step_factor=0.1)
    assert found == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 3 + [0.001])
    # 0.7 * 10 is a little more than 7 in floating point, and 0.1 * 3 than 0.3
    assert factors(10, schedule="step", warmup=0.0, step_every=0.7)[6:8] == pytest.approx([1, 0.1])
    drops = factors(30, schedule="step", warmup=0.0, step_every=0.1, step_factor=0.5)
    assert drops == pytest.approx([0.5 ** (step // 3) for step in range(30)])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.5])
def test_one_cycle_follows_the_rates_and_momenta_of_torch(kind: str, warmup: float) -> None:
    steps, peak = 1000, 0.7
    config = OptimConfig(name=kind, lr=peak, schedule="one_cycle", warmup=warmup)
    mine = build_optimizer(small(), [ParamGroup(("0.weight",), 1.0, True)], config, batch_size=8)
    parameter = [nn.Parameter(torch.zeros(1))]
    theirs: torch.optim.Optimizer = (
        torch.optim.SGD(parameter, lr=peak, momentum=0.9)
        if kind == "sgd"
        else torch.optim.AdamW(parameter, lr=peak)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        theirs, peak, total_steps=steps, pct_start=warmup, div_factor=25, final_div_factor=400
    )

    def momentum(optimizer: torch.optim.Optimizer) -> float:
        group = optimizer.param_groups[0]
        return group["betas"][0] if kind == "adamw" else group["momentum"]

    set_learning_rates(mine, config, 0, steps)
    assert mine.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
    for step in range(steps):
        set_learning_rates(mine, config, step, steps)
        # torch counts the peak from the end of a step: they are a fraction of a step apart
        expected = theirs.param_groups[0]["lr"]
        assert mine.param_groups[0]["lr"] == pytest.approx(expected, abs=0.012 * peak)
        assert momentum(mine) == pytest.approx(momentum(theirs), abs=0.002)
        theirs.step()
        if step < steps - 1:
            schedule.step()
    assert mine.param_groups[0]["lr"] == pytest.approx(1e-4 * peak)
    if kind == "adamw":
        assert mine.param_groups[0]["betas"][1] == 0.999


@given(
    st.sampled_from(["cosine", "one_cycle", "step", "constant"]),
    st.floats(0, 1),
    st.integers(1, 60),
)
def test_no_step_is_above_the_peak_or_without_a_rate(
    schedule: str, warmup: float, steps: int
) -> None:
    found = factors(steps, schedule=schedule, warmup=warmup)
    assert max(found) <= 1
    assert min(found) > 0


def test_groups_keep_their_proportions_through_the_schedule() -> None:
    config = OptimConfig(lr=0.5, schedule="cosine")
    made = build_optimizer(
        small(),
        [ParamGroup(("0.weight",), 0.1, True), ParamGroup(("3.weight",), 1.0, True)],
        config,
        batch_size=8,
    )
    for step in (0, 30, 70, 99):
        set_learning_rates(made, config, step, 100)
        low, high = (group["lr"] for group in made.param_groups)
        assert high == pytest.approx(0.5 * compute_lr_factor(config, step, 100))
        assert low == pytest.approx(0.1 * high)


def test_the_linear_scaling_rule_raises_the_peak_with_the_batch() -> None:
    assert OptimConfig(lr=0.1).compute_peak_lr(1024) == 0.1
    config = OptimConfig(lr=0.1, scale_lr_from=256)
    assert config.compute_peak_lr(1024) == pytest.approx(0.4)
    made = build_optimizer(small(), [ParamGroup(("0.weight",), 0.5, True)], config, batch_size=64)
    assert made.param_groups[0]["peak"] == pytest.approx(0.1 / 4 / 2)


# ------------------------------------------------------------------ the optimizer


def test_biases_and_normalization_have_no_weight_decay() -> None:
    network = small()
    made = build_optimizer(
        network, build_param_groups(network), OptimConfig(lr=1e-3, weight_decay=0.5), batch_size=8
    )
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in network.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "3.weight": 0.5,
        "3.bias": 0.0,
    }


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_moves_by_nesterovs_rule(momentum: float) -> None:
    network = nn.Linear(1, 1, bias=False)
    before = network.weight.item()
    config = OptimConfig(name="sgd", lr=0.1, momentum=momentum, weight_decay=0.0)
    made = build_optimizer(network, [ParamGroup(("weight",), 1.0, True)], config, batch_size=1)
    for _ in range(2):
        network.weight.grad = torch.ones(1, 1)
        made.step()
    # velocities 1 and 1 + m; each step looks ahead by one more of them
    first, second = 1 + momentum, 1 + momentum * (1 + momentum)
    assert before - network.weight.item() == pytest.approx(0.1 * (first + second), abs=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_saved_state_is_a_copy_that_later_steps_leave_alone(kind: str) -> None:
    network = small()
    made = build_optimizer(
        network, build_param_groups(network), OptimConfig(name=kind, lr=1e-3), batch_size=8
    )

    def step() -> None:
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        made.step()

    step()
    weights, moments = copy_state_dict(network), copy_optimizer_state(made)
    kept = copy.deepcopy((weights, moments))
    step()
    torch.testing.assert_close((weights, moments["state"]), (kept[0], kept[1]["state"]))
    assert not torch.equal(weights["0.weight"], network.state_dict()["0.weight"])
    assert moments["state"]
    assert not torch.equal(
        next(iter(moments["state"].values()))["momentum_buffer" if kind == "sgd" else "exp_avg"],
        next(iter(made.state_dict()["state"].values()))[
            "momentum_buffer" if kind == "sgd" else "exp_avg"
        ],
    )


def test_saved_weights_are_contiguous_whatever_their_memory_format() -> None:
    network = small().to(memory_format=torch.channels_last)
    assert all(value.is_contiguous() for value in copy_state_dict(network).values())


# ------------------------------------------------------------------ the averaged weights


def test_the_average_follows_its_formula_buffers_included() -> None:
    torch.manual_seed(0)
    network = small()
    average = ModelEma(network, 0.8)
    expected = {key: value.double() for key, value in copy_state_dict(network).items()}
    for step in range(60):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        network(torch.randn(4, 3, 3, 3))  # moves the running statistics and their counter
        average.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value.double()
    found = average.network.state_dict()
    assert {"1.running_mean", "1.running_var"} <= set(found)
    for key, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-4, atol=1e-5)
    assert found["1.num_batches_tracked"] == 60
    assert not any(parameter.requires_grad for parameter in average.network.parameters())


def test_the_average_of_few_steps_does_not_hold_on_to_where_it_began() -> None:
    network = nn.Linear(2, 2)
    average = ModelEma(network, 0.999)
    with torch.no_grad():
        network.weight.fill_(7.0)
    for step in range(20):
        average.update(step)
    assert average.network.weight.mean().item() == pytest.approx(7.0, abs=0.1)


def test_the_average_of_few_steps_from_fitted_weights_stays_near_them() -> None:
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.fill_(1.0)
    average = ModelEma(network, 0.99, is_fitted=True)
    with torch.no_grad():
        network.weight.fill_(0.0)
    shares = []
    for step in range(300):
        average.update(step)
        shares.append(average.network.weight.mean().item())
    assert shares[29] == pytest.approx(0.99**30, abs=1e-5)
    assert shares[299] < 0.05
