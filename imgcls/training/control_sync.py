"""Agreement of the workers on stopping and saving, by an all-reduce about once a second.

Workers step in lockstep, so that none can stop or save alone. At a step whose number all workers
know they all-reduce the driver's stop request, a preemption notice, a loss that is not finite, and
the time since the last save.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

SYNC_INTERVAL_S = 1.0
"""Target time between two agreements; a signal takes effect within about this time and a step."""

# `ray.train` exports the names of Train V2 where it runs, but those of V1 where it is type-checked
_ray_train: Any = ray.train


@dataclass(frozen=True)
class ControlDecision:
    """What to do next, the same on all workers.

    should_stop: save and stop
    should_save: save and continue
    is_finite:   whether the loss of every worker is finite
    """

    should_stop: bool
    should_save: bool
    is_finite: bool


class ControlSync:
    """Counts steps until the next agreement; the interval in steps adapts to their duration."""

    def __init__(self, channel: Any, device: torch.device, *, save_interval_s: float) -> None:
        self._device, self._save_interval_s = device, save_interval_s
        self._stop_request = channel.wait_for_stop.remote()
        self._interval, self._steps = 1, 0
        self._last_sync = self._last_save = time.monotonic()
        self._was_preempted = False

    def step(self, finite: torch.Tensor | bool = True) -> ControlDecision | None:
        """Count a step; every worker calls it after each step. None between the agreements.

        finite: whether this worker's loss is finite; a tensor is read only at an agreement
        """
        self._steps += 1
        if self._steps < self._interval:
            return None
        self._steps = 0
        now = time.monotonic()
        # Ray synchronizes the workers in this call, so that all see the notice in the same step
        preempted = _ray_train.get_preemption_info() is not None
        flags = torch.tensor(
            [
                float(self._is_stop_requested()),
                float(not bool(finite)),
                now - self._last_sync,
                now - self._last_save,
            ],
            dtype=torch.float64,
            device=self._device,
        )
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, not_finite, elapsed, unsaved = flags.tolist()
        fitting = int(self._interval * SYNC_INTERVAL_S / max(elapsed, 1e-3))
        self._interval = max(1, min(2 * self._interval, fitting))
        self._last_sync = time.monotonic()
        should_save = unsaved > self._save_interval_s or (preempted and not self._was_preempted)
        self._was_preempted = preempted
        return ControlDecision(
            should_stop=stop > 0, should_save=should_save, is_finite=not_finite == 0
        )

    def _is_stop_requested(self) -> bool:
        if not ray.wait([self._stop_request], timeout=0)[0]:
            return False
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._stop_request)
            return True
        return False  # the channel's actor is gone, which is not a request

    def mark_saved(self) -> None:
        """Restart the save interval; every worker calls it when the state is saved."""
        self._last_save = time.monotonic()
