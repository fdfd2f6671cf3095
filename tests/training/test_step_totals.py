"""Sums over the steps of an epoch, and the division of their time, with a simulated GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from imgcls.training import step_totals
from imgcls.training.step_totals import MAX_STEPS_AHEAD, StepTimer, StepTotals


class Gpu:
    """A host's clock, and the time at which the GPU has done all that it was given."""

    def __init__(self) -> None:
        self.now = self.free_at = 0.0

    def build_event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = max(self.gpu.now, self.gpu.free_at)

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


@pytest.mark.parametrize(
    ("arrival", "compute", "expected"),
    [
        # the GPU is the limit: it is idle only before the first step
        (0.2, 1.0, 0.2),
        # the images are: of the second for which the host waits, the GPU computes for 0.3 s
        (1.0, 0.4, 1.0 + 9 * 0.7),
    ],
)
def test_waiting_is_the_time_in_which_the_gpu_has_nothing_to_do(
    arrival: float, compute: float, expected: float
) -> None:
    gpu = Gpu()
    timer = StepTimer(torch.device("cuda"), gpu.build_event)
    for _ in range(10):
        gpu.now += arrival
        timer.start(arrival)
        gpu.free_at = max(gpu.now, gpu.free_at) + compute
        gpu.now += 0.1  # the host submits the kernels
        timer.stop()
        assert gpu.free_at - gpu.now <= (MAX_STEPS_AHEAD + 1) * compute
    timer.finish()
    assert gpu.now >= gpu.free_at
    assert timer.wait_s == pytest.approx(expected)


def test_a_resumed_epoch_continues_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 107.0])
    monkeypatch.setattr(step_totals.time, "perf_counter", lambda: next(clock))
    totals = StepTotals(torch.device("cpu"), (1.5, 2.0, 30.0, 0.25, 0.5, 1.0))
    for waited, rows, failed in ((2.0, 8, 0), (1.0, 6, 2)):
        totals.timer.start(waited)
        totals.scores += torch.tensor([0.5, 3.0], dtype=torch.float64)
        totals.timer.stop()
        totals.add_images(rows, failed)
    assert totals.to_tensor().tolist() == [2.5, 8.0, 44.0, 3.25, 4.5, 3.0]


def test_counting_a_step_needs_no_operation_on_the_device() -> None:
    class Forbid(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, *_: Any) -> Any:
            raise AssertionError(f"{func} in a step")

    totals = StepTotals(torch.device("cpu"))
    with Forbid():
        totals.timer.start(1.0)
        totals.timer.stop()
        totals.add_images(8, 1)
    assert totals.to_tensor().tolist()[2:4] == [8.0, 1.0]
