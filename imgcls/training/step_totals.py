"""Sums over the training steps of one worker, which never make the host wait for a step's result.

A copy to a GPU in every step would make the host wait until its kernels are done, and the next step
would start late. Counts and times are kept on the host; only the loss and the number of correct
predictions stay on the device.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

MAX_STEPS_AHEAD = 2
"""Steps by which the host may be ahead of a GPU: each holds a batch in pinned memory."""


def _build_event() -> Any:
    return torch.cuda.Event(enable_timing=True)


class StepTimer:
    """Divides the time of steps into waiting for images with an idle device, and the rest.

    A host that is ahead of its GPU waits for images while the GPU computes: only the time between
    the end of a step and the start of the next one on the GPU counts, and of that no more than the
    host waited.

    wait_s: seconds of waiting, of the steps that have started on the device
    """

    def __init__(self, device: torch.device, build_event: Callable[[], Any] = _build_event) -> None:
        self._build_event = build_event if device.type == "cuda" else None
        self._end: Any = None
        self._pending: collections.deque[tuple[float, Any, Any]] = collections.deque()
        self.wait_s = 0.0

    def start(self, waited: float) -> None:
        """Record the start of a step, for whose images the host waited some seconds."""
        if self._build_event is None:
            self.wait_s += waited
            return
        start = self._build_event()
        start.record()
        self._pending.append((waited, self._end, start))

    def stop(self) -> None:
        """Record the end of a step; waits while the host is more than MAX_STEPS_AHEAD ahead."""
        if self._build_event is None:
            return
        self._end = self._build_event()
        self._end.record()
        while len(self._pending) > MAX_STEPS_AHEAD:
            self._add_oldest()

    def finish(self) -> None:
        """Wait for all steps."""
        while self._pending:
            self._add_oldest()
        if self._end is not None:
            self._end.synchronize()

    def _add_oldest(self) -> None:
        waited, before, start = self._pending.popleft()
        start.synchronize()
        idle = waited if before is None else before.elapsed_time(start) / 1000
        self.wait_s += min(waited, idle)


class StepTotals:
    """Sums of an epoch's steps on one worker, in the order of the fields of `EpochTotals`.

    scores: (2,) float64 on the device: summed loss, number of correct predictions
    timer:  to be started and stopped by each step
    """

    def __init__(self, device: torch.device, earlier: Sequence[float] = ()) -> None:
        """earlier: the sums of the steps before a resume"""
        values = [*earlier] or [0.0] * 6
        self.scores = torch.tensor(values[:2], dtype=torch.float64, device=device)
        self.timer = StepTimer(device)
        self._rows, self._wait_s, self._compute_s, self._failed = values[2:]
        self._started = time.perf_counter()

    def add_images(self, rows: int, failed: int) -> None:
        """Add the images of a step: those of its batch, and those left out of it."""
        self._rows += rows
        self._failed += failed

    def to_tensor(self) -> torch.Tensor:
        """(6,) float64 on the device, after all steps have ended there."""
        self.timer.finish()
        wait = self.timer.wait_s
        compute = time.perf_counter() - self._started - wait
        rest = (self._rows, self._wait_s + wait, self._compute_s + compute, self._failed)
        on_device = torch.tensor(rest, dtype=torch.float64, device=self.scores.device)
        return torch.cat([self.scores, on_device])
