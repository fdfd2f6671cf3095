"""When a run has come to its end."""

from __future__ import annotations

import math

import pytest

from imgcls.training.config import EarlyStoppingConfig
from imgcls.training.epoch_metrics import EpochMetrics
from imgcls.training.trainer import is_stalled


def history(losses: list[float], accuracies: list[float] | None = None) -> tuple[EpochMetrics, ...]:
    pairs = zip(losses, accuracies or [0.5] * len(losses), strict=True)
    return tuple(
        EpochMetrics(number, 0.4, 0.9, loss, accuracy, 1e-3, 1.0, 1.0, 100, 10, 0.5)
        for number, (loss, accuracy) in enumerate(pairs, start=1)
    )


@pytest.mark.parametrize(
    ("losses", "stalled"),
    [
        ([], False),
        ([1.0], False),
        ([1.0, 1.1], False),
        ([1.0, 1.1, 1.2], True),
        ([1.0, 1.0, 1.0], True),
        ([1.0, 1.1, 0.9], False),
        ([1.0, 1.1, 0.9, 1.0, 0.95], True),
        ([3.0, 2.0, 1.0], False),
        ([1.0, math.nan, math.nan], True),
    ],
)
def test_it_is_over_when_as_many_epochs_as_the_patience_improved_nothing(
    losses: list[float], stalled: bool
) -> None:
    assert is_stalled(history(losses), EarlyStoppingConfig(patience=2), "val_loss") == stalled
    assert not is_stalled(history(losses), EarlyStoppingConfig(), "val_loss"), (
        "without a patience it never is"
    )


def test_improvements_that_are_too_small_do_not_count() -> None:
    falling = history([1.0, 0.99, 0.98, 0.97])
    assert not is_stalled(falling, EarlyStoppingConfig(patience=3), "val_loss")
    assert is_stalled(falling, EarlyStoppingConfig(patience=3, min_delta=0.1), "val_loss")
    # small ones add up
    assert not is_stalled(falling, EarlyStoppingConfig(patience=3, min_delta=0.025), "val_loss")


def test_an_accuracy_improves_upwards() -> None:
    rising = history([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
    assert not is_stalled(rising, EarlyStoppingConfig(patience=2), "val_accuracy")
    assert is_stalled(rising, EarlyStoppingConfig(patience=2), "val_loss")
