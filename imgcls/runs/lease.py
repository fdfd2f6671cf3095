"""One owner per output: a lease that keeps a second driver out and lets a restarted one in.

Holders are numbered. A holder creates `_lease/NNNNNN.json`, if absent, and rewrites it every few
seconds; the highest number owns the output. A successor needs only create-if-absent, so two rivals
can never both win. Clocks are not compared across machines: a rival watches whether the record
changes, and takes over only when it has not for a whole term.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from imgcls.data import filesystem
from imgcls.data.storage_settings import bind_settings
from imgcls.errors import OutputError, OutputLocked, RunFailed, StorageError, StorageMissing
from imgcls.log import tell

LEASE_FOLDER = "_lease"
DEFAULT_TERM_SECONDS = 30.0
_RENEWALS_PER_TERM = 5
"""Renewals in a term."""


@dataclass(frozen=True)
class _Process:
    """A process, told apart from any other on the same kernel and in the same PID namespace."""

    machine: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> _Process:
        return cls(_get_machine_id(), os.getpid(), _get_start_time(os.getpid()) or "")

    def is_dead(self) -> bool | None:
        """True or False for a process of this machine, None for one that cannot be seen."""
        if self.machine != _get_machine_id():
            return None
        return _get_start_time(self.pid) != self.started


class Lease:
    """The right to publish in an output folder, kept alive by a thread until released."""

    def __init__(self, output: str, number: int, term: float) -> None:
        self._folder = filesystem.join(output, LEASE_FOLDER)
        self._number = number
        self._term = term
        self._owner = uuid.uuid4().hex
        self._beats = 0
        self._renewed = time.monotonic()
        self._lost: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=bind_settings(self._renew_until_stopped), name="lease", daemon=True
        )

    @classmethod
    def acquire(cls, output: str, term: float = DEFAULT_TERM_SECONDS) -> Lease:
        """Take the lease, waiting at most a term for a holder that may be dead.

        Raises OutputLocked when another driver holds it and is alive, StorageError when the folder
        cannot be written.
        """
        folder = filesystem.join(output, LEASE_FOLDER)
        while True:
            number = _find_latest(folder)
            if number and not _wait_until_free(folder, number, term):
                raise OutputLocked(_build_locked_message(output, _read_record(folder, number)))
            lease = cls(output, number + 1, term)
            record = _get_record_url(folder, number + 1)
            if filesystem.create(record, lease._build_record()):
                _check_create_is_exclusive(record)
                lease._thread.start()
                return lease

    def check(self) -> None:
        """Raise RunFailed unless this driver still owns the output; called before publishing."""
        if self._lost is None and time.monotonic() - self._renewed > self._term:
            self._lost = f"it could not be renewed for {self._term:.0f} s"
        if self._lost is None and _find_latest(self._folder) > self._number:
            self._lost = "another driver has taken over"
        if self._lost is not None:
            raise RunFailed(
                f"the lease on the output was lost: {self._lost}; nothing was harmed, run the same "
                "command again when the other run has ended"
            )

    def release(self) -> None:
        """Give the lease back; the next driver need not wait."""
        self._stop.set()
        self._thread.join(timeout=5)
        if self._lost is not None:
            return
        with contextlib.suppress(StorageError):
            for name in filesystem.list_names(self._folder):
                if _parse_number(name) <= self._number:
                    filesystem.remove(filesystem.join(self._folder, name))
        if filesystem.is_local(self._folder):
            with contextlib.suppress(OSError):
                filesystem.remove_temporary_files(self._folder, older_than=10)
                os.rmdir(filesystem.local_path(self._folder))

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._term / _RENEWALS_PER_TERM):
            try:
                if _find_latest(self._folder) != self._number:
                    self._lost = "another driver has taken over"
                    return
                self._beats += 1
                filesystem.write(_get_record_url(self._folder, self._number), self._build_record())
                self._renewed = time.monotonic()
            except StorageError:
                continue  # `check` judges by the time since the last success

    def _build_record(self) -> bytes:
        process = _Process.current()
        return json.dumps(
            {
                "owner": self._owner,
                "beats": self._beats,
                "host": socket.gethostname(),
                "machine": process.machine,
                "pid": process.pid,
                "started": process.started,
                "term": self._term,
            }
        ).encode()


@dataclass(frozen=True)
class LeaseHolder:
    """Who has the lease on an output, and whether it was heard of."""

    host: str
    pid: int
    is_alive: bool


def find_holder(output: str) -> LeaseHolder | None:
    """The driver that has an output: seen at once on its own machine, else heard within seconds."""
    folder = filesystem.join(output, LEASE_FOLDER)
    number = _find_latest(folder)
    first = _read_record(folder, number) if number else None
    if not first:
        return None
    dead = _Process(first["machine"], first["pid"], first["started"]).is_dead()
    if dead is None:
        term = first.get("term", DEFAULT_TERM_SECONDS)
        dead = _stops_renewing(folder, number, first, 2 * term / _RENEWALS_PER_TERM)
    return LeaseHolder(first["host"], first["pid"], not dead)


def _check_create_is_exclusive(record: str) -> None:
    """Raise OutputError for a store that overwrites where it was told to create."""
    if not filesystem.is_local(record) and filesystem.create(record, b"{}"):
        filesystem.remove(record)
        raise OutputError(
            f"{filesystem.parent(record)}: the store pays no heed to If-None-Match, so two drivers "
            "could not be kept apart; give an --output on a store that does, or on a disk"
        )


def _wait_until_free(folder: str, number: int, term: float) -> bool:
    """Whether the holder is gone: at once when it can be seen, else after a term of silence."""
    first = _read_record(folder, number)
    if first is None:
        return True
    if not first:
        return _stops_renewing(folder, number, first, term)
    dead = _Process(first["machine"], first["pid"], first["started"]).is_dead()
    if dead is not None:
        return dead
    tell("lease", f"waiting up to {term:.0f} s: {first['host']} held this output, is it alive?")
    return _stops_renewing(folder, number, first, term)


def _stops_renewing(folder: str, number: int, first: dict[str, Any], seconds: float) -> bool:
    """Whether a holder gives up its lease, or is not heard of for so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.5, seconds / 20))
        now = _read_record(folder, number)
        if now is None or _find_latest(folder) != number:
            return now is None
        if now != first:
            return False
    return True


def _build_locked_message(output: str, record: dict[str, Any] | None) -> str:
    who = f"{record['host']}, process {record['pid']}" if record else "another driver"
    return (
        f"output {output}: {who} is at work on it; wait for it to end, stop it, or give another "
        "--output"
    )


def _read_record(folder: str, number: int) -> dict[str, Any] | None:
    """A holder's record; {} for one that is being created, or was when its driver was killed."""
    url = _get_record_url(folder, number)
    try:
        record: dict[str, Any] = json.loads(filesystem.read(url) or b"{}")
        return record
    except StorageMissing:
        return None
    except ValueError as error:
        raise OutputError(
            f"{url}: is damaged ({error}); remove it when no other driver is at work"
        ) from error


def _find_latest(folder: str) -> int:
    return max((_parse_number(name) for name in filesystem.list_names(folder)), default=0)


def _parse_number(name: str) -> int:
    stem = name.partition(".")[0]
    return int(stem) if stem.isdigit() else 0


def _get_record_url(folder: str, number: int) -> str:
    return filesystem.join(folder, f"{number:06d}.json")


def _get_machine_id() -> str:
    """Names the running kernel and PID namespace, so that two containers are not confused."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{boot.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode()}"


def _get_start_time(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None when it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
