"""A file of which only parts are read: local, or an object by range requests.

All parts come from the content that the file had when it was opened: a file that is replaced
meanwhile is read to the end on a disk, and is an error in a store.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Protocol

from imgcls.data.storage import filesystem, object_store
from imgcls.data.storage.error_details import shorten_url
from imgcls.data.storage.storage_errors import translate_error
from imgcls.data.storage.storage_settings import bind_settings
from imgcls.data.storage.store import GET
from imgcls.errors import StorageChanged, StorageMissing


class RangeFile(Protocol):
    """An opened file whose parts may be read from several threads at the same time.

    url:     as it was opened
    size:    in bytes
    version: text that differs when the content does: time and size of a file, ETag of an object;
             None where the store has none
    """

    @property
    def url(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def version(self) -> str | None: ...

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`, all of them.

        Raises StorageMissing when the content has changed since the file was opened, and
        StorageError when it cannot be read.
        """


def open_ranges(url: str) -> RangeFile:
    """Open a file for reading parts of it; raises StorageError."""
    return _LocalRanges(url) if filesystem.is_local(url) else _ObjectRanges(url)


def get_local_version(url: str) -> str:
    """The version of a file on a disk now, see `RangeFile`; raises StorageError."""
    with _translate_path_errors(url):
        return _format_version(os.stat(filesystem.local_path(url)))


@contextlib.contextmanager
def _translate_path_errors(url: str) -> Iterator[None]:
    """Errors of the operating system, and those of a path that no file can have."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise translate_error(url, error) from error


class _LocalRanges:
    def __init__(self, url: str) -> None:
        self.url = url
        with _translate_path_errors(url):
            self._file = os.open(filesystem.local_path(url), os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self._file)
        self.size = found.st_size
        self.version = _format_version(found)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, start: int, end: int) -> bytes:
        with filesystem.translate_os_errors(self.url):
            data = os.pread(self._file, end - start, start)
            while len(data) < end - start:
                more = os.pread(self._file, end - start - len(data), start + len(data))
                if not more:
                    raise OSError(errno.EIO, "the file ends before its last byte")
                data += more
            changed = _format_version(os.fstat(self._file)) != self.version
        if changed:
            raise changed_error(self.url)
        return data


class _ObjectRanges:
    def __init__(self, url: str) -> None:
        self.url = url
        info = object_store.call_store(url, "info", needs=GET)
        self.size = object_store.require_size(url, info)
        self.version = _find_etag(info)
        # the file may be used by threads in which no settings apply
        self._read = bind_settings(object_store.get_range, url, version=self.version)

    def read(self, start: int, end: int) -> bytes:
        try:
            return self._read(start, end)
        except StorageChanged as error:
            raise changed_error(self.url) from error


def changed_error(url: str) -> StorageMissing:
    """The error of a file that has been replaced while it was in use."""
    return StorageMissing(
        f"{shorten_url(url)}: has changed since it was opened; what was planned from it may be "
        "gone. Start over with --overwrite"
    )


def _format_version(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


def _find_etag(info: dict[str, object]) -> str | None:
    # the ETag that GCS sends is not one that its reads compare
    found = info.get("generation") or info.get("ETag") or info.get("etag")
    return str(found).strip('"') if found else None
