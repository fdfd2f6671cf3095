"""GPU time of forward passes that two threads submit, with simulated events."""

from __future__ import annotations

import contextlib

import pytest
import torch

from imgcls.data.cuda import CudaTimer

TIMES: list[float] = []


class Event:
    """An event that takes the next of TIMES, in milliseconds, when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: None) -> None:
        self.at = TIMES.pop(0)

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_the_time_of_overlapping_passes_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    TIMES[:] = [1000, 1500, 3000, 4000, 9000, 10000]
    gpu = torch.device("cuda")
    first, second = CudaTimer(gpu), CudaTimer(gpu)  # of two threads
    first.stop()
    second.stop(first)
    third = CudaTimer(gpu)  # after 5 s in which the GPU had nothing to do
    third.stop(second)
    found = [timer.elapsed_seconds() for timer in (third, first, second)]
    assert found == [1.0, 2.0, 1.0]
