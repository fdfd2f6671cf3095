"""Heartbeats of workers in Ray's internal key-value store, and the watchdog that reads them.

A worker writes a record before it starts a chunk and removes it when the chunk's table is written.
A record that exists already belongs to a worker that crashed at the chunk, or was lost with its
node. When a chunk has cost more workers than allowed, its rows are processed one at a time, each
recorded first: a row at which two workers crash is `crashed`, and the chunk is finished without it.
(Two, because a worker may be killed a moment after it has finished a row.)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imgcls.cluster import ray_internals
from imgcls.errors import RunFailed
from imgcls.execution.messages import ChunkTask, RunSpec

_WORKERS_PREFIX = "workers-of-"
HEARTBEAT_S = 1.0
"""Minimum time between two heartbeats of a worker."""
SYSTEMIC_CRASH_ROWS = 4
"""If this many rows crash their workers, from the first row on, the images are not the cause."""
CRASHES_TO_CONFIRM = 2
"""Crashes at a row processed alone that make it `crashed`."""
MAX_UNEXPLAINED_CRASHES = 3
"""Maximum number of worker crashes at a chunk that none of its rows explains."""
_REMEDY = "find the cause in Ray's logs on its node (a signal, out of memory), then resume"
MAX_WORKER_STARTS = 3
"""Maximum number of crashes of one worker before it has loaded its model."""
CRASHED_MESSAGE = "the worker crashed or hung on this image, also when it was processed alone"

_CHECKS_PER_TIMEOUT = 4
_MAX_CHECK_S = 5.0
_KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class AttemptRecord:
    """What a worker is processing.

    description:  for the log
    crashes:      workers that crashed or were lost at this before
    heartbeats:   grows while the worker makes progress
    row:          the row that is processed alone, counted from the first of the chunk; else None
    row_crashes:  workers that crashed at that row
    crashed_rows: rows at which both workers crashed that processed them alone
    """

    description: str
    worker: str
    node: str
    pid: int
    crashes: int = 0
    heartbeats: int = 0
    row: int | None = None
    row_crashes: int = 0
    crashed_rows: tuple[int, ...] = ()


def read_attempts(session: str) -> dict[str, AttemptRecord]:
    """The records of all attempts in progress, by key."""
    found = {}
    for key in ray_internals.list_kv(f"{session}/"):
        record = _read_record(key)
        if record is not None:
            found[key] = record
    return found


def register_worker(session: str) -> None:
    """Store this worker's node and process, so that it can be killed while it has no chunk."""
    context = ray.get_runtime_context()
    location = json.dumps([context.get_node_id(), os.getpid()])
    # a restarted actor replaces the one that crashed
    key = f"{_WORKERS_PREFIX}{session}/{context.get_actor_id()}"
    ray_internals.put_kv(key, location)


def list_workers(session: str) -> list[tuple[str, int]]:
    """Node id and process id of each registered worker."""
    found = [
        ray_internals.get_kv(key) for key in ray_internals.list_kv(f"{_WORKERS_PREFIX}{session}/")
    ]
    return [tuple(json.loads(location)) for location in found if location is not None]


def clear_session(session: str) -> None:
    """Remove all records of a session that has ended."""
    for prefix in (f"{session}/", f"{_WORKERS_PREFIX}{session}/"):
        ray_internals.delete_kv(prefix, prefix=True)


class Attempt:
    """One worker's attempt at a piece of work; complete when its result is written."""

    @classmethod
    def for_chunk(cls, spec: RunSpec, task: ChunkTask, stage: str) -> Attempt:
        """An attempt at one stage of a chunk."""
        rows = spec.plan.rows_of(task.chunk)
        description = f"chunk {task.chunk} (rows {rows.start:,} to {rows.stop - 1:,})"
        return cls(spec.session, f"{stage}-{task.chunk}", description, spec.crash_retries)

    def __init__(self, session: str, name: str, description: str, retries: int = 0) -> None:
        self._key = f"{session}/{name}"
        self._retries = retries
        earlier = _read_record(self._key)
        self._record = AttemptRecord(
            description=description,
            worker=f"{socket.gethostname()}/{os.getpid()}",
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
        )
        self._first_row, self._row_crashes = 0, 0
        if earlier is not None:
            crashed_rows = earlier.crashed_rows
            if earlier.row is not None:
                self._first_row, self._row_crashes = earlier.row, earlier.row_crashes + 1
                if self._row_crashes == CRASHES_TO_CONFIRM:
                    crashed_rows = (*crashed_rows, earlier.row)
            self._record = replace(
                self._record,
                crashes=earlier.crashes + 1,
                heartbeats=earlier.heartbeats + 1,
                row=earlier.row,
                row_crashes=self._row_crashes,
                crashed_rows=crashed_rows,
            )
        self._write()

    @property
    def crashes(self) -> int:
        """Workers that crashed or were lost at this work before."""
        return self._record.crashes

    @property
    def crashed_rows(self) -> dict[int, str]:
        """Error message by row, of rows that are not to be processed again."""
        return dict.fromkeys(self._record.crashed_rows, CRASHED_MESSAGE)

    def heartbeat(self) -> None:
        """Show that the worker makes progress; cheap enough to call after every row."""
        if time.monotonic() - self._written_at >= HEARTBEAT_S:
            self._record = replace(self._record, heartbeats=self._record.heartbeats + 1)
            self._write()

    def check_crashes(self) -> None:
        """Raise RunFailed when more workers crashed than the images explain."""
        record = self._record
        explained = CRASHES_TO_CONFIRM * len(record.crashed_rows)
        if record.crashes - explained > self._retries + MAX_UNEXPLAINED_CRASHES:
            raise RunFailed(
                f"{record.description}: {record.crashes} workers crashed at it, although each of "
                f"its images could be processed alone; {_REMEDY}"
            )
        crashed = record.crashed_rows
        if len(crashed) >= SYSTEMIC_CRASH_ROWS and crashed == tuple(range(len(crashed))):
            raise RunFailed(
                f"{record.description}: {record.crashes} workers crashed at it, most of them while "
                "processing a single image, whichever it was, so the images are not the cause; "
                f"{_REMEDY}"
            )

    def iter_suspect_rows(self, rows: int) -> Iterator[int]:
        """The rows that must be processed alone, if any, each recorded before it is yielded.

        Raises RunFailed when the images are not the cause of the crashes.
        """
        if self.crashes <= self._retries:
            return
        self.check_crashes()
        for row in range(self._first_row, rows):
            if row in self._record.crashed_rows:
                continue
            self._record = replace(
                self._record,
                row=row,
                row_crashes=self._row_crashes if row == self._first_row else 0,
                heartbeats=self._record.heartbeats + 1,
            )
            self._write()
            yield row
        self._record = replace(self._record, row=None, row_crashes=0)
        self._write()

    def complete(self) -> None:
        """Remove the record: the result is written."""
        ray_internals.delete_kv(self._key)

    def _write(self) -> None:
        self._written_at = time.monotonic()
        value = json.dumps(asdict(self._record))
        ray_internals.put_kv(self._key, value)


def _read_record(key: str) -> AttemptRecord | None:
    value = ray_internals.get_kv(key)
    if value is None:
        return None
    fields = json.loads(value)
    return AttemptRecord(**{**fields, "crashed_rows": tuple(fields["crashed_rows"])})


class Watchdog:
    """Kills workers whose heartbeat is too old, and measures how long the pass has been idle.

    Ray restarts a worker that was killed; what the new one finds in the record decides how the
    chunk continues.

    timeout_s: maximum time without a heartbeat
    """

    def __init__(self, session: str, timeout_s: float) -> None:
        self._session = session
        self._timeout_s = timeout_s
        self._interval = min(_MAX_CHECK_S, timeout_s / _CHECKS_PER_TIMEOUT)
        self._seen: dict[str, tuple[AttemptRecord, float]] = {}
        self._next_check = 0.0
        self._last_progress = time.monotonic()
        self._killed: set[tuple[str, int]] = set()

    def check(self) -> list[str]:
        """Kill workers that hang; returns a log message for each. Cheap when called too often."""
        now = time.monotonic()
        if now < self._next_check:
            return []
        self._next_check = now + self._interval
        found = read_attempts(self._session)
        if found.keys() != self._seen.keys():
            self._last_progress = now
        messages = []
        seen = {}
        for key, record in found.items():
            before = self._seen.get(key)
            if before is None or before[0] != record:
                self._last_progress = now
                seen[key] = (record, now)
                continue
            seen[key] = before
            silent = now - before[1]
            if silent > self._timeout_s and (record.node, record.pid) not in self._killed:
                self._killed.add((record.node, record.pid))
                _kill_worker(record.node, record.pid)
                row = f", row {record.row} alone" if record.row is not None else ""
                messages.append(
                    f"{record.description}{row}: worker {record.worker} made no progress for "
                    f"{silent:.0f} s; killed, starting a replacement"
                )
        self._seen = seen
        return messages

    @property
    def idle_seconds(self) -> float:
        """Time since any worker was last seen to make progress."""
        return time.monotonic() - self._last_progress

    def record_progress(self) -> None:
        """Note that a chunk's result has arrived."""
        self._last_progress = time.monotonic()

    def kill_workers(self) -> None:
        """Kill all workers of a pass that was stopped, also one that hangs without a chunk.

        Ray takes seconds to notice that a worker does not exit by itself, and until then the worker
        holds memory, also of a GPU, that the next one needs.
        """
        kills = [_kill_worker(node, pid) for node, pid in list_workers(self._session)]
        if kills:
            ray.wait(kills, num_returns=len(kills), timeout=_KILL_TIMEOUT_S)

    def close(self) -> None:
        """Remove the records of the pass, which has ended."""
        clear_session(self._session)


def _kill_worker(node: str, pid: int) -> ray.ObjectRef[None]:
    """Kill a worker by a task on its node; where the node is gone, so is the worker."""
    on_node = NodeAffinitySchedulingStrategy(node, soft=False)
    kill: Any = ray.remote(num_cpus=0, max_retries=0)(_kill_process)
    killed: ray.ObjectRef[None] = kill.options(scheduling_strategy=on_node).remote(pid)
    return killed


def _kill_process(pid: int) -> None:
    command = Path(f"/proc/{pid}/cmdline")
    if command.exists() and command.read_bytes().startswith(b"ray::"):
        os.kill(pid, signal.SIGKILL)
