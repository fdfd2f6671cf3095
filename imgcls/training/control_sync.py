"""The moment, every second or so, at which all workers agree on what to do next.

Workers step in lockstep, so none can stop or save on its own. Each adds up, at a step that all
count to alike, what it has heard: the driver's wish to stop, a machine about to be taken away, a
loss that is no longer a number, the time since the last save.
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
"""How often workers agree; a signal is answered within about this time and a step."""

# `ray.train` exports the names of Train V2 where it runs, but those of V1 where it is type-checked
_ray_train: Any = ray.train


@dataclass(frozen=True)
class ControlDecision:
    """The same on all workers.

    stop:    save and end
    save:    save and go on
    finite:  whether every worker's loss still is
    """

    should_stop: bool
    should_save: bool
    is_finite: bool


class ControlSync:
    """Counts steps up to the next agreement."""

    def __init__(self, board: Any, device: torch.device, *, save_seconds: float) -> None:
        self._device, self._save_seconds = device, save_seconds
        self._told = board.stopping.remote()
        self._stride, self._steps = 1, 0
        self._last = self._saved = time.monotonic()
        self._preempted = False

    def step(self, finite: torch.Tensor | bool = True) -> ControlDecision | None:
        """Called after each step by every worker; None between the agreements.

        finite: whether this worker's loss is; a tensor is looked at only when it is time
        """
        self._steps += 1
        if self._steps < self._stride:
            return None
        self._steps = 0
        now = time.monotonic()
        stop = self._is_stop_requested()
        # a barrier of its own, so that all workers hear of it at the same beat
        preempted = _ray_train.get_preemption_info() is not None
        flags = torch.tensor(
            [
                float(stop),
                float(not bool(finite)),
                now - self._last,
                now - self._saved,
            ],
            dtype=torch.float64,
            device=self._device,
        )
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        told, broken, seconds, unsaved = flags.tolist()
        fitting = int(self._stride * SYNC_INTERVAL_S / max(seconds, 1e-3))
        self._stride = max(1, min(2 * self._stride, fitting))
        self._last = time.monotonic()
        save = unsaved > self._save_seconds or (preempted and not self._preempted)
        self._preempted = preempted
        return ControlDecision(should_stop=told > 0, should_save=save, is_finite=broken == 0)

    def _is_stop_requested(self) -> bool:
        if not ray.wait([self._told], timeout=0)[0]:
            return False
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._told)
            return True
        return False  # the board is gone, which is not the driver's wish

    def mark_saved(self) -> None:
        """A state was saved just now, by whichever worker saves."""
        self._saved = time.monotonic()
