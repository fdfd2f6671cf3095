"""Lease on an output folder: one driver at a time, and a restarted one takes over.

Holders are numbered. A holder creates `_lease/NNNNNN.json` exclusively and renews it every few
seconds; the highest number owns the output. A successor needs only create-if-absent, so of two
drivers one wins. Clocks of two machines are never compared: another driver watches whether the
record changes, and takes over after a whole term without a renewal.
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

from imgcls import log
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import bind_settings
from imgcls.errors import OutputError, OutputLocked, RunFailed, StorageError, StorageMissing

LEASE_FOLDER = "_lease"
DEFAULT_TERM_S = 30.0
_RENEWALS_PER_TERM = 5
"""Renewals per term."""


@dataclass(frozen=True)
class _Process:
    """Identity of a process: kernel and PID namespace, PID, start time."""

    machine: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> _Process:
        return cls(_get_machine_id(), os.getpid(), _get_start_time(os.getpid()) or "")

    def is_dead(self) -> bool | None:
        """Whether a process of this machine is dead; None for one on another machine."""
        if self.machine != _get_machine_id():
            return None
        return _get_start_time(self.pid) != self.started


class Lease:
    """The right to write to an output folder, renewed by a thread until it is released."""

    def __init__(self, output: str, number: int, term: float) -> None:
        self._folder = filesystem.join(output, LEASE_FOLDER)
        self._number = number
        self._term = term
        self._owner = uuid.uuid4().hex
        self._renewals = 0
        self._last_renewal = time.monotonic()
        self._last_listing = float("-inf")
        self._lost_reason: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=bind_settings(self._renew_until_stopped), name="lease", daemon=True
        )

    @classmethod
    def acquire(cls, output: str, term: float = DEFAULT_TERM_S) -> Lease:
        """Acquire the lease; wait up to one term for a holder that may be dead.

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
                check_create_is_exclusive(record)
                lease._thread.start()
                return lease

    def check(self, max_age_s: float = 0.0) -> None:
        """Raise RunFailed unless this driver still owns the output; call it before publishing.

        max_age_s: accept an earlier check of this age, in seconds, because each is a listing
        """
        now = time.monotonic()
        if self._lost_reason is None and now - self._last_renewal > self._term:
            self._lost_reason = f"it could not be renewed for {self._term:.0f} s"
        if self._lost_reason is None and now - self._last_listing >= max_age_s:
            if _find_latest(self._folder) > self._number:
                self._lost_reason = "another driver has taken over"
            self._last_listing = now
        if self._lost_reason is not None:
            raise RunFailed(
                f"the lease on the output was lost: {self._lost_reason}; no results were lost, "
                "rerun the same command when the other run has ended"
            )

    def release(self) -> None:
        """Release the lease; the next driver does not wait."""
        self._stop.set()
        self._thread.join(timeout=5)
        if self._lost_reason is not None:
            return
        with contextlib.suppress(StorageError):
            for name in filesystem.list_names(self._folder):
                if _parse_number(name) <= self._number:
                    filesystem.remove(filesystem.join(self._folder, name))
        if filesystem.is_local(self._folder):
            with contextlib.suppress(OSError):
                filesystem.remove_temporary_files(
                    self._folder, older_than=10, is_abandoned=self._is_of_earlier_holder
                )
                os.rmdir(filesystem.local_path(self._folder))

    def _is_of_earlier_holder(self, name: str) -> bool:
        return 0 < _parse_number(name) < self._number

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._term / _RENEWALS_PER_TERM):
            try:
                if _find_latest(self._folder) != self._number:
                    self._lost_reason = "another driver has taken over"
                    return
                self._renewals += 1
                filesystem.write(_get_record_url(self._folder, self._number), self._build_record())
                self._last_renewal = time.monotonic()
            except StorageError:
                continue  # `check` measures the time since the last success

    def _build_record(self) -> bytes:
        process = _Process.current()
        return json.dumps(
            {
                "owner": self._owner,
                "beats": self._renewals,
                "host": socket.gethostname(),
                "machine": process.machine,
                "pid": process.pid,
                "started": process.started,
                "term": self._term,
            }
        ).encode()


@dataclass(frozen=True)
class LeaseHolder:
    """The driver that holds a lease: host, process id, whether it is alive."""

    host: str
    pid: int
    is_alive: bool


def find_holder(output: str) -> LeaseHolder | None:
    """The driver that holds an output; takes seconds when it runs on another machine."""
    folder = filesystem.join(output, LEASE_FOLDER)
    number = _find_latest(folder)
    first = _read_record(folder, number) if number else None
    if not first:
        return None
    dead = _Process(first["machine"], first["pid"], first["started"]).is_dead()
    if dead is None:
        term = first.get("term", DEFAULT_TERM_S)
        dead = _stops_renewing(folder, number, first, 2 * term / _RENEWALS_PER_TERM)
    return LeaseHolder(first["host"], first["pid"], not dead)


def check_create_is_exclusive(
    record: str, writers: str = "two drivers", option: str = "--output"
) -> None:
    """Raise OutputError for a store that overwrites instead of creating exclusively.

    record:  a file that exists
    writers: processes that could write at once, for the message
    option:  command-line option to name in the message
    """
    if not filesystem.is_local(record) and filesystem.create(record, b"{}"):
        filesystem.remove(record)
        raise OutputError(
            f"{filesystem.parent(record)}: the store ignores If-None-Match, so {writers} could "
            f"write at once; pass another {option}, on a store that supports it or on a disk"
        )


def _wait_until_free(folder: str, number: int, term: float) -> bool:
    """Whether the holder is gone: at once on this machine, else after a term without renewals."""
    first = _read_record(folder, number)
    if first is None:
        return True
    if not first:
        return _stops_renewing(folder, number, first, term)
    dead = _Process(first["machine"], first["pid"], first["started"]).is_dead()
    if dead is not None:
        return dead
    log.emit(
        "lease",
        f"waiting up to {term:.0f} s to see whether {first['host']}, which locked this output, "
        "is alive",
    )
    return _stops_renewing(folder, number, first, term)


def _stops_renewing(folder: str, number: int, first: dict[str, Any], seconds: float) -> bool:
    """Whether a holder releases its lease, or does not renew it for `seconds`."""
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
    who = f"{record['host']} (pid {record['pid']})" if record else "another driver"
    return (
        f"output {output} is locked by {who}. Wait for it to finish, stop it, or pass another "
        "--output"
    )


def _read_record(folder: str, number: int) -> dict[str, Any] | None:
    """A holder's record; {} while it is being created, or when its driver was killed at that."""
    url = _get_record_url(folder, number)
    try:
        record: dict[str, Any] = json.loads(filesystem.read(url) or b"{}")
        return record
    except StorageMissing:
        return None
    except ValueError as error:
        raise OutputError(
            f"{url}: is damaged ({error}); remove it when no other driver is running"
        ) from error


def _find_latest(folder: str) -> int:
    return max((_parse_number(name) for name in filesystem.list_names(folder)), default=0)


def _parse_number(name: str) -> int:
    stem = name.partition(".")[0]
    return int(stem) if stem.isdigit() else 0


def _get_record_url(folder: str, number: int) -> str:
    return filesystem.join(folder, f"{number:06d}.json")


def _get_machine_id() -> str:
    """Identity of the running kernel and PID namespace, which differs between containers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{boot.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode()}"


def _get_start_time(pid: int) -> str | None:
    """Start time of a process, in kernel ticks; None when it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
