"""The line of an epoch in the log, the choice of the best epoch, and the note about it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from imgcls.training.epoch_metrics import EpochMetrics, format_selection_note


def epoch(number: int = 1, accuracy: float = 0.5, loss: float = 1.0) -> EpochMetrics:
    return EpochMetrics(number, 0.4, 0.9, loss, accuracy, 1e-3, 1234.4, 4.13, 100, 10, 0.5)


def test_accuracy_decides_which_epoch_is_best_and_loss_decides_ties() -> None:
    assert epoch().is_better_than(None, "val_accuracy")
    assert epoch(accuracy=0.6, loss=9.0).is_better_than(epoch(), "val_accuracy")
    assert epoch(loss=0.9).is_better_than(epoch(), "val_accuracy")
    assert not epoch(2).is_better_than(epoch(1), "val_accuracy"), "the first of equals stays"
    assert not epoch(accuracy=0.4, loss=0.1).is_better_than(epoch(), "val_accuracy")
    assert epoch(accuracy=0.4, loss=0.1).is_better_than(epoch(), "val_loss")
    assert not epoch(accuracy=0.6, loss=1.0).is_better_than(epoch(), "val_loss")
    assert epoch().is_better_than(None, "val_loss")


def test_an_epoch_is_logged_in_one_line() -> None:
    logged = replace(epoch(1, 0.94, 0.2111), wait_seconds=1.0, compute_seconds=3.0)
    assert logged.format_line(10) == (
        "epoch  1/10  train loss 0.400 acc  90.0 %  val loss 0.211 acc  94.0 %  lr 1.0e-03"
        "  1,234 images/s (waiting 25%)  4.1 s"
    )
    assert "(waiting 0%)" in epoch().format_line(10), "no time at all is no division by zero"


def test_the_line_of_the_probe_is_aligned_with_those_of_epochs() -> None:
    probe = replace(epoch(0, 0.94, 0.2111), phase="probe", lr=math.nan)
    line = probe.format_line(10)
    assert line.index("train loss") == epoch(1).format_line(10).index("train loss")
    assert line.startswith("probe ")
    assert line.endswith("acc  94.0 %  4.1 s")
    assert "nan" not in line
    assert (probe.name, epoch(3).name) == ("the probe", "epoch 3")


def build_epoch(number: int, loss: float, accuracy: float) -> EpochMetrics:
    phase: Any = "train" if number else "probe"
    return EpochMetrics(number, 0.4, 0.9, loss, accuracy, 1e-3, 1.0, 1.0, 100, 10, phase=phase)


@pytest.mark.parametrize(
    ("epochs", "best", "expected"),
    [
        (
            [(0.1, 1.0), (0.5, 0.9), (0.6, 0.83)],
            0,
            "no epoch was better than the probe; the bundle",
        ),
        ([(0.5, 1.0), (0.4, 0.83), (0.6, 0.9)], 1, "but a lower val acc (83.0%, the probe 100.0%)"),
        ([(0.5, 0.9), (0.4, 0.9)], 1, None),
        ([(0.5, 0.9)], 0, None),
    ],
)
def test_fine_tuning_that_does_not_improve_on_its_probe_gets_a_note_with_advice(
    epochs: list[tuple[float, float]], best: int, expected: str | None
) -> None:
    history = [build_epoch(number, *numbers) for number, numbers in enumerate(epochs)]
    note = format_selection_note(history, history[best], lr=3e-4)
    if expected is None:
        assert note is None
    else:
        assert note is not None
        assert expected in note
        assert "lower optim.lr (0.0003)" in note
        assert "--strategy probe" in note


@pytest.mark.parametrize(
    ("epochs", "best", "is_named"),
    [
        ([(0.1, 1.0), (0.5, 0.9)], 0, False),
        ([(2.3, 0.1), (4.5, 0.7)], 0, True),  # the first as untrained, one class for all images
        ([(2.3, 0.1), (4.5, 0.4)], 0, False),  # of 10 images, one and four
        ([(2.3, 0.0), (4.5, 0.3)], 0, False),
        ([(2.3, 0.1), (4.5, 0.7)], 1, False),
    ],
)
@pytest.mark.parametrize("first", [0, 1], ids=["probe", "epoch"])
def test_an_epoch_that_is_more_accurate_than_the_one_with_the_best_loss_is_named(
    epochs: list[tuple[float, float]], best: int, is_named: bool, first: int
) -> None:
    history = [build_epoch(first + number, *numbers) for number, numbers in enumerate(epochs)]
    note = format_selection_note(history, history[best], lr=3e-4)
    name = "epoch 1" if first else "the probe"
    if is_named:
        assert note == (
            f"{name} is kept for its val loss (2.300), but epoch {first + 1} has a higher val acc "
            f"(70.0%; {name} 10.0%); pass --best-by val_accuracy to keep the more accurate one"
        )
    elif first:
        assert note is None
    else:
        assert "higher val acc" not in (note or "")


def test_a_more_accurate_epoch_of_several_labels_is_not_named() -> None:
    history = [build_epoch(1, 2.3, 0.1), build_epoch(2, 4.5, 0.9)]
    history = [replace(each, val_mean_average_precision=0.5) for each in history]
    assert format_selection_note(history, history[0], lr=3e-4) is None
