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
from ray.experimental import internal_kv

from imgcls.errors import RunFailed
from imgcls.execution.messages import RunSpec, Work

NAMESPACE = "imgcls"
_WORKERS = "workers-of-"
BEAT_SECONDS = 1.0
"""So often a worker tells at most that it goes on."""
HOPELESS_ROWS = 4
"""When so many rows kill their workers, from the first on, it is not the images."""
TRIES_ALONE = 2
"""Workers that must die at an image alone for it to be `crashed`."""
TRIES = 3
"""So often a worker may die without an image that explains it."""
_LOOK = "find out why in Ray's logs on its machine (a signal, no memory left), then resume"
STARTS = 3
"""So often a worker may die before it has its model."""
CRASHED = "the worker died or hung each time it came to this image, also with no other beside it"


@dataclass(frozen=True)
class Note:
    """What a worker is at.

    what:    as people read it
    deaths:  workers that this has cost so far
    beats:   grows while it goes on
    row:     the row that is tried alone, counted from the first of the chunk; None before that
    tries:   workers that have died at that row
    crashed: rows that killed both workers that tried them alone
    """

    what: str
    worker: str
    node: str
    pid: int
    deaths: int = 0
    beats: int = 0
    row: int | None = None
    tries: int = 0
    crashed: tuple[int, ...] = ()


def notes(session: str) -> dict[str, Note]:
    """All that is being worked on, by key."""
    found = {}
    for text in _keys(f"{session}/"):
        note = _read(text)
        if note is not None:
            found[text] = note
    return found


def enlist(session: str) -> None:
    """Tell where this worker is: it is to be found also when it hangs and is at no chunk."""
    context = ray.get_runtime_context()
    place = json.dumps([context.get_node_id(), os.getpid()])
    # a restarted actor takes the place of the one that died
    key = f"{_WORKERS}{session}/{context.get_actor_id()}"
    internal_kv._internal_kv_put(key, place, namespace=NAMESPACE)


def enlisted(session: str) -> list[tuple[str, int]]:
    """Node and process of each worker."""
    found: list[Any] = [
        internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        for key in _keys(f"{_WORKERS}{session}/")
    ]
    return [tuple(json.loads(place)) for place in found if place is not None]


def forget(session: str) -> None:
    """Strike out all that is noted of a session that has ended."""
    for prefix in (f"{session}/", f"{_WORKERS}{session}/"):
        internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=NAMESPACE)


class Attempt:
    """One worker's pass over a piece of work; ended when that is durable.

    deaths: workers that it has cost before
    """

    @classmethod
    def at(cls, spec: RunSpec, work: Work, stage: str) -> Attempt:
        """At a stage of a chunk."""
        rows = spec.plan.rows_of(work.chunk)
        what = f"chunk {work.chunk} (rows {rows.start:,} to {rows.stop - 1:,})"
        return cls(spec.session, f"{stage}-{work.chunk}", what, spec.crash_retries)

    def __init__(self, session: str, name: str, what: str, retries: int = 0) -> None:
        self._key = f"{session}/{name}"
        self._retries = retries
        before = _read(self._key)
        context = ray.get_runtime_context()
        self._note = Note(
            what=what,
            worker=f"{socket.gethostname()}/{os.getpid()}",
            node=context.get_node_id(),
            pid=os.getpid(),
        )
        self._from, self._tries = 0, 0
        if before is not None:
            crashed = before.crashed
            if before.row is not None:
                self._from, self._tries = before.row, before.tries + 1
                if self._tries == TRIES_ALONE:
                    crashed = (*crashed, before.row)
            self._note = replace(
                self._note,
                deaths=before.deaths + 1,
                beats=before.beats + 1,
                row=before.row,
                tries=self._tries,
                crashed=crashed,
            )
        self._put()

    @property
    def deaths(self) -> int:
        return self._note.deaths

    @property
    def crashed(self) -> dict[int, str]:
        """What to say of the rows that are to be left out."""
        return dict.fromkeys(self._note.crashed, CRASHED)

    def beat(self) -> None:
        """Tell that it goes on; cheap enough for every row."""
        if time.monotonic() - self._told >= BEAT_SECONDS:
            self._note = replace(self._note, beats=self._note.beats + 1)
            self._put()

    def check(self) -> None:
        """Raise RunFailed when it has cost more workers than its images explain."""
        note = self._note
        if note.deaths - TRIES_ALONE * len(note.crashed) > self._retries + TRIES:
            raise RunFailed(
                f"{note.what}: {note.deaths} workers died at it, although each of its images alone "
                f"is survived; {_LOOK}"
            )
        if len(note.crashed) >= HOPELESS_ROWS and note.crashed == tuple(range(len(note.crashed))):
            raise RunFailed(
                f"{note.what}: {note.deaths} workers died at it, most of them at a single image, "
                f"whichever it was, so it is not the images; {_LOOK}"
            )

    def suspects(self, rows: int) -> Iterator[int]:
        """The rows that must be tried alone, if any, each noted before it is yielded.

        Raises RunFailed when it is not the images that workers die of.
        """
        if self.deaths <= self._retries:
            return
        self.check()
        for row in range(self._from, rows):
            if row in self._note.crashed:
                continue
            tries = self._tries if row == self._from else 0
            self._note = replace(self._note, row=row, tries=tries, beats=self._note.beats + 1)
            self._put()
            yield row
        self._note = replace(self._note, row=None, tries=0)
        self._put()

    def end(self) -> None:
        """It is durable."""
        internal_kv._internal_kv_del(self._key, namespace=NAMESPACE)

    def _put(self) -> None:
        self._told = time.monotonic()
        value = json.dumps(asdict(self._note))
        internal_kv._internal_kv_put(self._key, value, namespace=NAMESPACE)


def _keys(prefix: str) -> list[str]:
    return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)]


def _read(key: str) -> Note | None:
    value: Any = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
    if value is None:
        return None
    fields = json.loads(value)
    return Note(**{**fields, "crashed": tuple(fields["crashed"])})
