"""What an epoch is told as, which of them is better, and the board between workers and driver."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import ray

from imgcls.training.epoch_metrics import EpochMetrics, format_probe_note, open_driver_channel


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


def test_an_epoch_is_told_in_one_line() -> None:
    told = replace(epoch(1, 0.94, 0.2111), wait_seconds=1.0, compute_seconds=3.0)
    assert told.format_line(10) == (
        "epoch  1/10  train loss 0.400 acc  90.0 %  val loss 0.211 acc  94.0 %  lr 1.0e-03"
        "  1,234 images/s (waiting 25%)  4.1 s"
    )
    assert "(waiting 0%)" in epoch().format_line(10), "no time at all is no division by zero"


def test_the_probe_is_told_in_line_with_the_epochs() -> None:
    probe = replace(epoch(0, 0.94, 0.2111), phase="probe", lr=math.nan)
    line = probe.format_line(10)
    assert line.index("train loss") == epoch(1).format_line(10).index("train loss")
    assert line.startswith("probe ")
    assert line.endswith("acc  94.0 %  4.1 s")
    assert "nan" not in line
    assert (probe.name, epoch(3).name) == ("the probe", "epoch 3")


def test_lines_and_epochs_reach_the_driver_in_order_and_all_of_them(
    local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[EpochMetrics] = []
    with open_driver_channel(3, told.append) as board:
        for post in ("training: 2 on cpu", epoch(1), epoch(2), epoch(3), "the last words"):
            ray.get(board.post.remote(post))
    assert told == [epoch(1), epoch(2), epoch(3)]
    assert capsys.readouterr().out.splitlines() == [
        "training: 2 on cpu", *(epoch(number).format_line(3) for number in (1, 2, 3)), "the "
        "last words",
    ]  # fmt: skip


def test_workers_hear_of_the_wish_to_stop_once_it_is_told(local_ray: None) -> None:
    with open_driver_channel(3, lambda epoch: None) as board:
        stopping = board.stopping.remote()
        assert ray.wait([stopping], timeout=0.2)[0] == []
        board.stop.remote()
        assert ray.wait([stopping], timeout=10)[0] == [stopping]


def test_the_first_failure_is_the_one_that_is_told(local_ray: None) -> None:
    with open_driver_channel(3, lambda epoch: None) as board:
        assert ray.get(board.failure.remote()) is None
        ray.get(board.fail.remote("out of memory"))
        ray.get(board.fail.remote("connection closed by peer"))
        assert ray.get(board.failure.remote()) == "out of memory"


def test_a_board_that_is_gone_holds_up_nothing(local_ray: None) -> None:
    began = time.monotonic()
    with open_driver_channel(3, lambda epoch: None) as board:
        ray.kill(board)
    assert time.monotonic() - began < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "epoch lines"]


def made(number: int, loss: float, accuracy: float) -> EpochMetrics:
    phase: Any = "train" if number else "probe"
    return EpochMetrics(number, 0.4, 0.9, loss, accuracy, 1e-3, 1.0, 1.0, 100, 10, phase=phase)


@pytest.mark.parametrize(
    ("epochs", "best", "told"),
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
def test_a_training_that_ends_below_its_probe_says_so_and_what_to_do(
    epochs: list[tuple[float, float]], best: int, told: str | None
) -> None:
    history = [made(number, *numbers) for number, numbers in enumerate(epochs)]
    note = format_probe_note(history, history[best], lr=3e-4)
    if told is None:
        assert note is None
    else:
        assert note is not None
        assert told in note
        assert "lower optim.lr (0.0003)" in note
        assert "--strategy probe" in note


def test_without_a_probe_there_is_nothing_to_be_worse_than() -> None:
    history = [made(1, 0.1, 1.0), made(2, 0.5, 0.9)]
    assert format_probe_note(history, history[0], lr=3e-4) is None
