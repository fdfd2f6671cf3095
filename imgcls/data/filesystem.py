"""One way to read and write files, local or on a store.

Local paths take the short way through the operating system; every other URL goes to `stores`. Both
give typed errors, try again what will pass, write atomically and create only where there is
nothing. What the bytes mean is left to the callers.
"""

from __future__ import annotations

import contextlib
import datetime
import glob as local_glob
import itertools
import os
import re
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TypeVar, cast

from imgcls.data import disk, object_store, storage_errors, store_listing
from imgcls.data.formats import is_hidden
from imgcls.data.object_store import File, Page
from imgcls.data.readahead import Allowance, Budget, NoRoom
from imgcls.errors import StorageCredentials, StorageError, StorageMissing

T = TypeVar("T")

MAX_BYTES = 100_000_000
"""Largest image file that is read, unless another limit is set."""
READ_AHEAD_BYTES = 256_000_000
"""Bytes of images that one `read_ahead` holds at most, in addition to the next file."""

_DISK_SECONDS = 5.0
_MAGIC = re.compile(r"[*?\[]")


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine (`file://` included)."""
    return url.startswith("file://") or not is_url(url)


def is_url(text: str) -> bool:
    """Whether `text` names a store, as in `s3://bucket/key` or `data:image/png;base64,...`."""
    scheme, separator, _ = text.partition("://")
    return (bool(separator) and scheme.replace("+", "").isalnum()) or text.startswith("data:")


def local_path(url: str) -> str:
    return url.removeprefix("file://")


def join(folder: str, *names: str) -> str:
    """Names below a folder, local or remote; never unquoted, never normalised."""
    if is_local(folder):
        return os.path.join(local_path(folder), *names)
    return "/".join([folder.rstrip("/"), *names])


def parent(url: str) -> str:
    if is_local(url):
        return os.path.dirname(os.path.abspath(local_path(url)))
    return url.rstrip("/").rpartition("/")[0]


def absolute(url: str) -> str:
    """The same place from any working directory."""
    return os.path.abspath(local_path(url)) if is_local(url) else url


def exists(url: str) -> bool:
    if is_local(url):
        return os.path.lexists(local_path(url))
    return bool(object_store.ask(url, "exists", needs=storage_errors.GET))


def is_folder(url: str) -> bool:
    if is_local(url):
        return os.path.isdir(local_path(url))
    return bool(object_store.ask(url, "isdir", needs=storage_errors.LIST))


def size(url: str) -> int:
    """Bytes in the file; raises StorageMissing."""
    if is_local(url):
        return _locally(url, lambda: os.stat(local_path(url)).st_size)
    return int(object_store.ask(url, "info", needs=storage_errors.GET)["size"])


def read(url: str) -> bytes:
    """The whole of a file of our own, however large: a bundle, a manifest, a record.

    Raises StorageMissing, StorageForbidden, StorageUnavailable (after retries) or StorageError.
    """
    if is_local(url):
        return _locally(url, lambda: _read_local(local_path(url)))
    return object_store.get(url)


def read_image(url: str, max_bytes: int = MAX_BYTES) -> bytes:
    """A user's file, read no further than `max_bytes`.

    Raises as `read` does, StorageTooLarge for a larger file, and StorageError for what is no
    regular file, such as a FIFO or a device.
    """
    return _read_within(url, Allowance(max_bytes))


def read_ahead(
    urls: Iterable[str | None], in_flight: int = 16, max_bytes: int = MAX_BYTES
) -> Iterator[bytes | StorageError]:
    """Each image file's bytes or its error, in order, with `in_flight` reads under way.

    max_bytes: of one file; a larger one comes back as StorageTooLarge

    Whatever the files are, it holds at most READ_AHEAD_BYTES + 2 * max_bytes: those that wait, the
    next one, and the one that is put together from its pieces.
    A None stands for a row without a path and comes back as StorageMissing. Raises
    StorageCredentials, which is no file's own error.
    """
    waiting: deque[Future[bytes]] = deque()
    budget = Budget(READ_AHEAD_BYTES)

    def delivered(left: int) -> Iterator[bytes | StorageError]:
        while len(waiting) > left:
            yield _outcome(waiting.popleft())
            budget.release_oldest()

    with ThreadPoolExecutor(in_flight, thread_name_prefix="fetch") as pool:
        try:
            for number, url in enumerate(urls):
                waiting.append(_begun(url, pool, Allowance(max_bytes, budget, number)))
                yield from delivered(in_flight - 1)
            yield from delivered(0)
        finally:
            for future in waiting:
                future.cancel()
            budget.close()


def open_read(url: str) -> IO[bytes]:
    """A seekable binary stream."""
    if is_local(url):
        return _locally(url, lambda: cast(IO[bytes], open(local_path(url), "rb")))
    return object_store.reading(url)


def write(url: str, data: bytes) -> None:
    """Write a whole file atomically: readers see all of it or none, also after a kill."""
    if is_local(url):
        with open_write(url) as stream:
            stream.write(data)
        return
    object_store.put(url, data)


def create(url: str, data: bytes) -> bool:
    """Write a file only if there is none: True if this call made it, atomically among rivals."""
    if is_local(url):
        with translated(url):
            return disk.create(local_path(url), data)
    return object_store.create(url, data)


@contextlib.contextmanager
def open_write(url: str) -> Iterator[IO[bytes]]:
    """A stream whose file appears whole on a clean exit, and not at all otherwise."""
    if not is_local(url):
        with translated(url), object_store.writing(url) as stream:
            yield stream
        return
    path = local_path(url)
    temporary = disk.temporary_name(path)
    try:
        with translated(url):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def names(folder: str) -> list[str]:
    """Sorted names of the files right in a folder; empty when there is no such folder."""
    if is_local(folder):
        try:
            with os.scandir(local_path(folder)) as entries:
                files = (_text(e.name) for e in entries if e.is_file())
                return sorted(name for name in files if not disk.is_temporary(name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_errors.typed(folder, error) from error
    return sorted(file.path.rpartition("/")[2] for file in _listed(folder, deep=False))


def find(pattern: str) -> list[str]:
    """Sorted files that match a glob such as `nightly/*.parquet` or `s3://b/x/**/*.jpg`."""
    if is_local(pattern):
        found = local_glob.glob(local_path(pattern), recursive=True)
        return sorted(_text(f) for f in found if os.path.isfile(f))
    matches = object_store.ask(pattern, "glob", needs=storage_errors.LIST, long=True, detail=True)
    files = (path for path, info in matches.items() if info["type"] == "file")
    return sorted(object_store.url_of(pattern, path) for path in files)


def walk(folder: str) -> Iterator[str]:
    """Files below a folder as paths relative to it, '/'-separated, in sorted order, streamed.

    Hidden files and folders, and those of the system such as lost+found, are passed over; links are
    followed, but not back up.
    """
    if is_local(folder):
        yield from map(_text, _walk_local(local_path(folder), ""))
        return
    prefix = folder.rstrip("/") + "/"
    below = (file.path.removeprefix(prefix).split("/") for file in _listed(folder, deep=True))
    for parts in sorted(below):
        if not any(is_hidden(part) for part in parts):
            yield "/".join(parts)


def _listed(folder: str, *, deep: bool) -> Iterator[File]:
    """The files of a store's folder, of which there are none if there is no such folder."""
    with contextlib.suppress(StorageMissing):
        for page in store_listing.pages(folder, deep=deep):
            yield from page.files


def pages(url: str, *, deep: bool) -> Iterator[Page]:
    """What lies in a folder, some thousand at a time: files and folders, or, if `deep`, all files.

    Hidden folders are left out. Raises StorageMissing for a folder that no disk has; to a store it
    is an empty one.
    """
    if not is_local(url):
        yield from store_listing.pages(url, deep=deep)
        return
    root = local_path(url)
    names: Iterator[str]
    if deep:
        names = _walk_local(root, "")
    else:
        with translated(url), os.scandir(root) as entries:
            found = sorted((e.name, e.is_dir()) for e in entries if not is_hidden(e.name))
        yield Page([join(root, name) for name, is_dir in found if is_dir], [])
        names = (name for name, is_dir in found if not is_dir)
    while chunk := [_local_file(join(root, name)) for name in itertools.islice(names, 1000)]:
        yield Page([], chunk)


def _local_file(path: str) -> File:
    try:
        found = os.stat(path)
    except OSError:
        return File(_text(path), None, None, None)  # a dead link is a row, and fails as a row
    mtime = datetime.datetime.fromtimestamp(found.st_mtime_ns // 1000 / 1e6, datetime.UTC)
    return File(_text(path), found.st_size, mtime, None)


def remove(url: str) -> None:
    """Remove a file or a whole folder; nothing happens when it is not there."""
    if is_local(url):
        path = local_path(url)
        with contextlib.suppress(StorageMissing), translated(url):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        return
    _, path = object_store.store(url)
    with contextlib.suppress(StorageMissing):
        if _MAGIC.search(path):  # fsspec would take the name for a pattern, and remove others too
            for file in object_store.ask(url, "find", needs=storage_errors.LIST, long=True):
                object_store.ask(
                    object_store.url_of(url, file), "rm_file", needs=storage_errors.DELETE
                )
        else:
            object_store.ask(url, "rm", needs=storage_errors.DELETE, long=True, recursive=True)


def sweep(folder: str, older_than: float = 0.0) -> None:
    """Remove what killed writers left in a local folder; stores keep nothing of a broken write.

    older_than: seconds; younger leftovers may belong to a writer at work
    """
    if not is_local(folder):
        return
    with contextlib.suppress(FileNotFoundError), os.scandir(local_path(folder)) as entries:
        for entry in entries:
            if disk.is_temporary(entry.name) and time.time() - entry.stat().st_mtime >= older_than:
                os.unlink(entry.path)


def check_writable(folder: str) -> None:
    """Write and remove a probe file; raises the StorageError that the first output would meet."""
    probe = join(folder, f"_probe-{uuid.uuid4().hex[:8]}")
    write(probe, b"imgcls")
    remove(probe)


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Within it, an OSError becomes the StorageError that says what it means for `url`."""
    try:
        yield
    except OSError as error:
        raise storage_errors.typed(url, error) from error


def _walk_local(
    root: str, prefix: str, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    folder = os.path.join(root, prefix)
    with translated(folder):
        here = os.stat(folder)
        identity = (here.st_dev, here.st_ino)
        if identity in above:
            return  # a link back to where we came from
        with os.scandir(folder) as scan:
            entries = sorted((e.name, e.is_dir()) for e in scan if not is_hidden(e.name))
    for name, is_dir in entries:
        relative = f"{prefix}/{name}" if prefix else name
        if is_dir:
            yield from _walk_local(root, relative, above | {identity})
        else:
            yield relative


def _read_local(path: str) -> bytes:
    with open(path, "rb", buffering=0) as stream:
        return stream.readall()


def _read_within(url: str, allowance: Allowance) -> bytes:
    """Read a file as far as is allowed, waiting where other reads hold what it takes."""
    while True:
        try:
            if is_local(url):
                return _locally(url, lambda: disk.read(local_path(url), allowance))
            return object_store.get(url, allowance)
        except NoRoom as full:
            allowance.admission(full.total).result()


def _text(name: str) -> str:
    """A name as text: bytes that are not UTF-8, which no table can hold, become U+FFFD.

    Such a file is a row, and fails as a row: it is not found by that name.
    """
    return name if name.isprintable() else os.fsencode(name).decode("utf-8", "replace")


def _locally(url: str, call: Callable[[], T]) -> T:
    """As `stores.attempt`, but a disk that does not answer soon will not."""
    return object_store.attempt(url, call, seconds=_DISK_SECONDS)


def _begun(url: str | None, pool: ThreadPoolExecutor, allowance: Allowance) -> Future[bytes]:
    """A read under way: by the store's own loop where it can, else in a thread."""
    try:
        if url is None:
            raise StorageMissing("the path is null")
        asked = None if is_local(url) else object_store.start_get(url, allowance)
    except StorageError as error:
        failed: Future[bytes] = Future()
        failed.set_exception(error)
        return failed
    return pool.submit(_read_within, url, allowance) if asked is None else asked


def _outcome(reading: Future[bytes]) -> bytes | StorageError:
    try:
        return reading.result()
    except StorageCredentials:
        raise
    except StorageError as error:
        return error
