"""Storage check of `imgcls doctor`: what a run does in its output folder, in a separate folder.

The driver writes, reads and lists files and creates one exclusively, as the lease of a run does;
the nodes then use the same folder. It is removed in the end, with the folders above it that the
check has made.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from imgcls.cluster.node_checks import compute_skew
from imgcls.cluster.node_report import StorageTask
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import StorageError

_CONTENT = b"imgcls doctor"
_WRITTEN = "driver"
_EXCLUSIVE = "exclusive"


@dataclass(frozen=True)
class StorageCheck:
    """Result of the driver's steps.

    fault:   which step failed and why; None if all succeeded
    seconds: time that the steps took
    skew_s:  least difference between the store's clock and this machine's; None if unknown
    task:    for the nodes; None after a fault
    """

    fault: str | None
    seconds: float
    skew_s: float | None
    task: StorageTask | None


@contextlib.contextmanager
def open_storage_check(url: str, settings: StorageConfig) -> Iterator[StorageCheck]:
    """Check a folder, and keep the files for the nodes until the end of the block."""
    folder = filesystem.join(url, f"_doctor-{uuid.uuid4().hex[:8]}")
    missing = _find_missing_folder(url)
    try:
        yield _run_steps(folder, settings)
    finally:
        with contextlib.suppress(StorageError):
            filesystem.remove(folder)
        if missing is not None:
            _remove_empty_folders(url, missing)


def _run_steps(folder: str, settings: StorageConfig) -> StorageCheck:
    started, began = time.monotonic(), time.time()
    step, skew = "write", None
    try:
        file = filesystem.join(folder, _WRITTEN)
        filesystem.write(file, _CONTENT)
        ended = time.time()
        step = "read"
        if filesystem.read(file) != _CONTENT:
            raise StorageError(f"{file}: has other bytes than were written")
        step = "list"
        skew = _measure_skew(folder, began, ended)
        step = "create only if absent"
        _check_exclusive(filesystem.join(folder, _EXCLUSIVE))
        step = "delete"
        filesystem.remove(filesystem.join(folder, _EXCLUSIVE))
    except StorageError as error:
        return StorageCheck(f"{step}: {error}", time.monotonic() - started, skew, None)
    values = settings.model_dump(include=set(StorageConfig.model_fields))
    task = StorageTask(folder=folder, settings=values, name=_WRITTEN, content=_CONTENT)
    return StorageCheck(None, time.monotonic() - started, skew, task)


def _check_exclusive(file: str) -> None:
    if not filesystem.create(file, _CONTENT):
        raise StorageError(f"{file}: refused as if it existed")
    if filesystem.create(file, _CONTENT + b", again"):
        raise StorageError(
            f"{file}: the store ignores If-None-Match, so two drivers could write at once"
        )


def _measure_skew(folder: str, began: float, ended: float) -> float | None:
    """Skew of the store's clock, by a modification time; those of object stores are in seconds."""
    files = [
        file
        for page in filesystem.iter_pages(folder, deep=True)
        for file in page.files
        if file.path.endswith(_WRITTEN)
    ]
    if not files:
        raise StorageError(f"{folder}: the listing lacks a file that was just written")
    if files[0].mtime is None:
        return None
    return compute_skew(files[0].mtime.timestamp(), began, ended, resolution=1)


def _find_missing_folder(url: str) -> str | None:
    """The topmost of the local folders that a file in `url` would create."""
    if not filesystem.is_local(url):
        return None
    missing = None
    while not os.path.lexists(url):
        missing, url = url, os.path.dirname(url)
    return missing


def _remove_empty_folders(url: str, topmost: str) -> None:
    """Remove `url` and the empty folders above it, up to `topmost`."""
    with contextlib.suppress(OSError):  # another program has written there, or nothing was made
        os.rmdir(url)
        while url != topmost:
            url = os.path.dirname(url)
            os.rmdir(url)
