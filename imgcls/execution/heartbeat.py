"""Who is at which chunk, noted in Ray's key-value store: what has killed a worker is known by it.

A worker notes what it begins, and strikes it out when that is durable. A note that is there already
is of a worker that died at the chunk, or was lost with its machine. When a chunk has cost more
workers than allowed, its rows are tried one at a time, each noted first: a row that two workers die
at is `crashed`, and the chunk is done without it. (Two, for a worker may be killed a moment late.)
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from imgcls.cluster import ray_internals
from imgcls.errors import RunFailed
from imgcls.execution.messages import ChunkTask, RunSpec

_WORKERS_PREFIX = "workers-of-"
HEARTBEAT_SECONDS = 1.0
"""So often a worker tells at most that it goes on."""
SYSTEMIC_CRASH_ROWS = 4
"""When so many rows kill their workers, from the first on, it is not the images."""
CRASHES_TO_CONFIRM = 2
"""Workers that must die at an image alone for it to be `crashed`."""
MAX_UNEXPLAINED_CRASHES = 3
"""So often a worker may die without an image that explains it."""
_REMEDY = "find out why in Ray's logs on its machine (a signal, no memory left), then resume"
MAX_WORKER_STARTS = 3
"""So often a worker may die before it has its model."""
CRASHED_MESSAGE = (
    "the worker died or hung each time it came to this image, also with no other beside it"
)


@dataclass(frozen=True)
class AttemptRecord:
    """What a worker is at.

    what:    as people read it
    deaths:  workers that this has cost so far
    beats:   grows while it goes on
    row:     the row that is tried alone, counted from the first of the chunk; None before that
    tries:   workers that have died at that row
    crashed: rows that killed both workers that tried them alone
    """

    description: str
    worker: str
    node: str
    pid: int
    crashes: int = 0
    heartbeats: int = 0
    row: int | None = None
    row_crashes: int = 0
    crashed: tuple[int, ...] = ()


def read_attempts(session: str) -> dict[str, AttemptRecord]:
    """All that is being worked on, by key."""
    found = {}
    for text in ray_internals.list_kv(f"{session}/"):
        note = _read_record(text)
        if note is not None:
            found[text] = note
    return found


def register_worker(session: str) -> None:
    """Tell where this worker is: it is to be found also when it hangs and is at no chunk."""
    context = ray.get_runtime_context()
    place = json.dumps([context.get_node_id(), os.getpid()])
    # a restarted actor takes the place of the one that died
    key = f"{_WORKERS_PREFIX}{session}/{context.get_actor_id()}"
    ray_internals.put_kv(key, place)


def list_workers(session: str) -> list[tuple[str, int]]:
    """Node and process of each worker."""
    found: list[Any] = [
        ray_internals.get_kv(key) for key in ray_internals.list_kv(f"{_WORKERS_PREFIX}{session}/")
    ]
    return [tuple(json.loads(place)) for place in found if place is not None]


def clear_session(session: str) -> None:
    """Strike out all that is noted of a session that has ended."""
    for prefix in (f"{session}/", f"{_WORKERS_PREFIX}{session}/"):
        ray_internals.delete_kv(prefix, prefix=True)


class Attempt:
    """One worker's pass over a piece of work; ended when that is durable.

    deaths: workers that it has cost before
    """

    @classmethod
    def for_chunk(cls, spec: RunSpec, work: ChunkTask, stage: str) -> Attempt:
        """At a stage of a chunk."""
        rows = spec.plan.rows_of(work.chunk)
        what = f"chunk {work.chunk} (rows {rows.start:,} to {rows.stop - 1:,})"
        return cls(spec.session, f"{stage}-{work.chunk}", what, spec.crash_retries)

    def __init__(self, session: str, name: str, what: str, retries: int = 0) -> None:
        self._key = f"{session}/{name}"
        self._retries = retries
        before = _read_record(self._key)
        context = ray.get_runtime_context()
        self._note = AttemptRecord(
            description=what,
            worker=f"{socket.gethostname()}/{os.getpid()}",
            node=context.get_node_id(),
            pid=os.getpid(),
        )
        self._from, self._tries = 0, 0
        if before is not None:
            crashed = before.crashed
            if before.row is not None:
                self._from, self._tries = before.row, before.row_crashes + 1
                if self._tries == CRASHES_TO_CONFIRM:
                    crashed = (*crashed, before.row)
            self._note = replace(
                self._note,
                crashes=before.crashes + 1,
                heartbeats=before.heartbeats + 1,
                row=before.row,
                row_crashes=self._tries,
                crashed=crashed,
            )
        self._write()

    @property
    def crashes(self) -> int:
        return self._note.crashes

    @property
    def crashed_rows(self) -> dict[int, str]:
        """What to say of the rows that are to be left out."""
        return dict.fromkeys(self._note.crashed, CRASHED_MESSAGE)

    def heartbeat(self) -> None:
        """Tell that it goes on; cheap enough for every row."""
        if time.monotonic() - self._told >= HEARTBEAT_SECONDS:
            self._note = replace(self._note, heartbeats=self._note.heartbeats + 1)
            self._write()

    def check_crashes(self) -> None:
        """Raise RunFailed when it has cost more workers than its images explain."""
        note = self._note
        if (
            note.crashes - CRASHES_TO_CONFIRM * len(note.crashed)
            > self._retries + MAX_UNEXPLAINED_CRASHES
        ):
            raise RunFailed(
                f"{note.description}: {note.crashes} workers died at it, although each of its "
                "images alone "
                f"is survived; {_REMEDY}"
            )
        if len(note.crashed) >= SYSTEMIC_CRASH_ROWS and note.crashed == tuple(
            range(len(note.crashed))
        ):
            raise RunFailed(
                f"{note.description}: {note.crashes} workers died at it, most of them at a "
                "single image, "
                f"whichever it was, so it is not the images; {_REMEDY}"
            )

    def iter_suspect_rows(self, rows: int) -> Iterator[int]:
        """The rows that must be tried alone, if any, each noted before it is yielded.

        Raises RunFailed when it is not the images that workers die of.
        """
        if self.crashes <= self._retries:
            return
        self.check_crashes()
        for row in range(self._from, rows):
            if row in self._note.crashed:
                continue
            tries = self._tries if row == self._from else 0
            self._note = replace(
                self._note, row=row, row_crashes=tries, heartbeats=self._note.heartbeats + 1
            )
            self._write()
            yield row
        self._note = replace(self._note, row=None, row_crashes=0)
        self._write()

    def complete(self) -> None:
        """It is durable."""
        ray_internals.delete_kv(self._key)

    def _write(self) -> None:
        self._told = time.monotonic()
        value = json.dumps(asdict(self._note))
        ray_internals.put_kv(self._key, value)


def _read_record(key: str) -> AttemptRecord | None:
    value = ray_internals.get_kv(key)
    if value is None:
        return None
    fields = json.loads(value)
    return AttemptRecord(**{**fields, "crashed": tuple(fields["crashed"])})
