"""Local files: bounded reads of regular files, durable writes and exclusive creation.

A read never blocks on a FIFO, a device or a socket, and takes no more memory than allowed. Of
several processes exactly one creates a file, also on file systems without hard links.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import uuid

from imgcls.data.storage.readahead import BodyBuffer, ReadAllowance, too_large_error
from imgcls.errors import StorageError

_UNKNOWN_SIZE_STEP = 1 << 20
_SPECIAL_FILES = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}
_NO_LINK_ERRNOS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})
"""Errors of link(2) on file systems without hard links: SMB, exFAT, FUSE object stores."""


def read_local_file(path: str, allowance: ReadAllowance) -> bytes:
    """Read a regular file.

    Raises StorageTooLarge for more bytes than allowed (before reading, where the size is known),
    StorageError when the path is no regular file, OSError, and BudgetFull.
    """
    found = os.stat(path)  # first, because opening a FIFO or a device has side effects
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if kind in _SPECIAL_FILES:
        raise StorageError(f"{path}: is {_SPECIAL_FILES[kind]}, not a regular file")
    if allowance.is_exceeded_by(found.st_size):
        raise too_large_error(path, allowance.max_bytes, found.st_size)
    allowance.reserve(found.st_size)
    # non-blocking, in case a FIFO has replaced the file meanwhile
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        data = os.read(file, found.st_size + 1)
        more = os.read(file, _UNKNOWN_SIZE_STEP)
        if not more:
            return data
        # it has grown, or its size is unknown, as in /proc
        with BodyBuffer(path, allowance, None) as body:
            body.append(data)
            while more:
                body.append(more)
                more = os.read(file, _UNKNOWN_SIZE_STEP)
            return body.join()
    finally:
        os.close(file)


def create_local_file(path: str, data: bytes) -> bool:
    """Write a file only if there is none; returns whether this call created it, durably.

    The finished file gets its name by a hard link. Without hard links, the name is created with
    O_CREAT | O_EXCL, which is as exclusive, and the finished file then replaces the empty one:
    others see it empty or complete, and a writer that is killed in between leaves it empty.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = temporary_name(path)
    try:
        write_durably(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINK_ERRNOS:
                raise
            return _create_exclusively(path, temporary)
        return True
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _create_exclusively(path: str, finished: str) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except FileExistsError:
        return False
    try:
        os.replace(finished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return True


def has_hard_links(folder: str) -> bool:
    """Whether files in a folder can have a second name; creates and removes a probe file."""
    probe, other = (temporary_name(os.path.join(folder, "probe")) for _ in range(2))
    try:
        write_durably(probe, b"")
        os.link(probe, other)
    except OSError as error:
        if error.errno in _NO_LINK_ERRNOS:
            return False
        raise
    finally:
        for path in (probe, other):
            with contextlib.suppress(OSError):
                os.unlink(path)
    return True


def write_durably(path: str, data: bytes) -> None:
    """Write a file, and return when it is on the disk (fsync), not only in memory."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


_TEMPORARY_NAME = re.compile(r"\.(.*)\.[0-9a-f]{12}\.tmp", re.DOTALL)


def temporary_name(path: str) -> str:
    """Name of a temporary file in the folder of `path`, for data that is not complete yet."""
    folder, name = os.path.split(path)
    # names are limited to 255 bytes; cut without splitting a multi-byte character
    stem = os.fsencode(name)[:100].decode("utf-8", "ignore")
    return os.path.join(folder, f".{stem}.{uuid.uuid4().hex[:12]}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file name is one of `temporary_name`; files of other programs are not touched."""
    return parse_temporary(name) is not None


def parse_temporary(name: str) -> str | None:
    """Name (its first 100 bytes) for which `temporary_name` built this one; None for others."""
    found = _TEMPORARY_NAME.fullmatch(name)
    return found[1] if found else None
