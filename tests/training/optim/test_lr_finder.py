"""The rate grows from step to step until the loss blows up; the steepest fall is found again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from imgcls.training.optim.lr_finder import LR_RANGE, MAX_STEPS, LrFinder, find_steepest_lr
from imgcls.training.plots import smooth_curve


def optimizer() -> torch.optim.Optimizer:
    """Two groups, the second of which moves a tenth as fast."""
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": peak, "peak": peak} for peak in (2.0, 0.2)
    ]
    return torch.optim.SGD(groups)


def test_the_rate_grows_by_the_same_factor_up_to_the_end_of_the_range() -> None:
    made = optimizer()
    test = LrFinder(made)
    rates = []
    while not test.is_over:
        test.set_lr()
        fast, slow = (group["lr"] for group in made.param_groups)
        assert slow == pytest.approx(fast / 10)
        rates.append(fast)
        test.record(1.0)
    assert len(rates) == MAX_STEPS
    assert (rates[0], rates[-1]) == pytest.approx(LR_RANGE)
    np.testing.assert_allclose(np.diff(np.log(rates)), math.log(1e6) / (MAX_STEPS - 1))
    assert [rate for rate, _ in test.curve] == pytest.approx(rates)


def test_it_is_over_when_the_loss_blows_up() -> None:
    test = LrFinder(optimizer())
    for step in range(MAX_STEPS):
        test.record(1.0 if step < 60 else 2.0 ** (step - 60))
        if test.is_over:
            break
    assert 60 < len(test.curve) < 70


def test_a_single_bad_batch_does_not_end_it() -> None:
    test = LrFinder(optimizer())
    for step in range(50):
        test.record(10.0 if step == 30 else 1.0)
        assert not test.is_over
    assert len(test.curve) == 50


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_it_and_is_not_drawn(loss: float) -> None:
    test = LrFinder(optimizer())
    test.record(1.0)
    test.record(loss)
    assert test.is_over
    assert [loss for _, loss in test.curve] == [1.0]


def test_the_steepest_fall_is_found_under_noise_and_before_the_rise() -> None:
    lrs = np.geomspace(*LR_RANGE, 150)
    decades = np.log10(lrs)
    rng = np.random.default_rng(0)
    losses = 2.3 - 1.5 / (1 + np.exp(-6 * (decades + 3))) + 0.02 * rng.standard_normal(150)
    losses += np.exp(5 * (decades + 1))  # blows up near 0.1, steeper than it ever fell
    assert math.log10(find_steepest_lr(lrs.tolist(), smooth_curve(losses))) == pytest.approx(
        -3, abs=0.3
    )


def test_a_loss_that_only_rises_suggests_the_lowest_rate() -> None:
    lrs = np.geomspace(1e-6, 1e-3, 20)
    assert find_steepest_lr(lrs.tolist(), np.linspace(1, 5, 20)) <= lrs[1]
