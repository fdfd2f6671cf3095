"""The driver's eye on its workers: one that hangs is ended, and whether any goes on is known.

Reads the notes of `attempts`. A worker counts as hanging when no image has been done for longer
than allowed; its process is ended on its own machine, Ray starts another, and what that finds in
the notes decides what becomes of the chunk.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imgcls.execution import heartbeat
from imgcls.execution.heartbeat import AttemptRecord

_CHECKS_PER_TIMEOUT = 4
"""So often in the time after which a worker hangs."""
_MAX_CHECK_SECONDS = 5.0
_KILL_TIMEOUT_S = 10.0
"""To wait at most until workers have ended."""


class Watchdog:
    """Over the workers of one pass.

    worker_timeout_s: without an image done, after which a worker is ended
    """

    def __init__(self, session: str, worker_timeout_s: float) -> None:
        self._session = session
        self._limit = worker_timeout_s
        self._every = min(_MAX_CHECK_SECONDS, worker_timeout_s / _CHECKS_PER_TIMEOUT)
        self._seen: dict[str, tuple[AttemptRecord, float]] = {}
        self._next = 0.0
        self._moved = time.monotonic()
        self._ending: set[tuple[str, int]] = set()

    def check(self) -> list[str]:
        """End what hangs; what to tell of it. Cheap when it is called more often than needed."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + self._every
        found = heartbeat.read_attempts(self._session)
        if found.keys() != self._seen.keys():
            self._moved = now
        told = []
        seen = {}
        for key, note in found.items():
            before = self._seen.get(key)
            if before is None or before[0] != note:
                self._moved = now
                seen[key] = (note, now)
                continue
            seen[key] = before
            hung = now - before[1]
            if hung > self._limit and (note.node, note.pid) not in self._ending:
                self._ending.add((note.node, note.pid))
                _kill_worker(note.node, note.pid)
                at = f", row {note.row} of them alone" if note.row is not None else ""
                told.append(
                    f"{note.description}{at}: no image done for {hung:.0f} s by worker "
                    f"{note.worker}; it "
                    "is ended, and another takes its place"
                )
        self._seen = seen
        return told

    @property
    def idle_seconds(self) -> float:
        """Since a worker was last seen to go on."""
        return time.monotonic() - self._moved

    def record_progress(self) -> None:
        """A chunk has come back: somebody goes on."""
        self._moved = time.monotonic()

    def kill_workers(self) -> None:
        """End those of a pass that was broken off, one that hangs and is at no chunk included.

        Ray takes seconds to see that one does not go of itself, and so long it holds its memory,
        a GPU's too, that the next one needs.
        """
        ended = [_kill_worker(node, pid) for node, pid in heartbeat.list_workers(self._session)]
        if ended:
            ray.wait(ended, num_returns=len(ended), timeout=_KILL_TIMEOUT_S)

    def close(self) -> None:
        """The pass has ended."""
        heartbeat.clear_session(self._session)


def _kill_worker(node: str, pid: int) -> ray.ObjectRef:
    """Kill a worker on its machine; where the machine is gone, so is the worker."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    kill: Any = ray.remote(num_cpus=0, max_retries=0)(_kill_process)
    return kill.options(scheduling_strategy=there).remote(pid)


def _kill_process(pid: int) -> None:
    command = Path(f"/proc/{pid}/cmdline")
    if command.exists() and command.read_bytes().startswith(b"ray::"):
        os.kill(pid, signal.SIGKILL)
