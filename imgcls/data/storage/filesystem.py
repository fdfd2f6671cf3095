"""Files and folders by path or URL, with the same functions for disks and object stores.

Local paths are handled by the operating system, other URLs by `object_store`. Both raise
StorageErrors, retry transient errors, write atomically and create files exclusively.
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import IO, TypeVar, cast

from imgcls.data.formats import is_hidden_name
from imgcls.data.storage import disk, object_store, storage_errors
from imgcls.data.storage.readahead import ReadAllowance
from imgcls.data.storage.retries import retry
from imgcls.data.storage.store import DELETE, GET, LIST, FileInfo, ListingPage
from imgcls.errors import StorageMissing

T = TypeVar("T")

BLOCK_BYTES = 4 << 20
"""Size of a block of `iter_blocks`."""

_DISK_RETRY_S = 5.0
_GLOB_CHARACTERS = re.compile(r"[*?\[]")


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine (`file:///a` and Hadoop's `file:/a` included)."""
    return url.startswith("file:/") or not is_url(url)


def is_url(text: str) -> bool:
    """Whether `text` is a URL, as in `s3://bucket/key` or `data:image/png;base64,...`."""
    scheme, separator, _ = text.partition("://")
    has_scheme = bool(separator) and scheme.replace("+", "").isalnum()
    return has_scheme or text.startswith(("data:", "file:/"))


def local_path(url: str) -> str:
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return url.removeprefix("file:") if url.startswith("file:/") else url


def join(folder: str, *names: str) -> str:
    """Join names to a folder, local or remote, without unquoting or normalizing them."""
    if is_local(folder):
        return os.path.join(local_path(folder), *names)
    return "/".join([folder.rstrip("/"), *names])


def parent(url: str) -> str:
    if is_local(url):
        return os.path.dirname(os.path.abspath(local_path(url)))
    return url.rstrip("/").rpartition("/")[0]


def absolute(url: str) -> str:
    """An absolute path; a URL is returned unchanged."""
    return os.path.abspath(local_path(url)) if is_local(url) else url


def resolve_links(url: str) -> str:
    """An absolute path without symbolic links; a URL is returned unchanged."""
    return os.path.realpath(local_path(url)) if is_local(url) else url


def is_same(a: str, b: str) -> bool:
    """Whether two URLs name the same file or folder."""
    return resolve_links(a).rstrip("/") == resolve_links(b).rstrip("/")


def exists(url: str) -> bool:
    if is_local(url):
        return os.path.lexists(local_path(url))
    return bool(object_store.call_store(url, "exists", needs=GET))


def is_folder(url: str) -> bool:
    if is_local(url):
        return os.path.isdir(local_path(url))
    return bool(object_store.call_store(url, "isdir", needs=LIST))


def size(url: str) -> int:
    """Size of a file in bytes; raises StorageMissing, StorageError where a server names no size."""
    if is_local(url):
        return _retry_locally(url, lambda: os.stat(local_path(url)).st_size)
    return object_store.get_object_size(url)


def read(url: str) -> bytes:
    """Read a whole file of any size: a bundle, a manifest, a record.

    Raises StorageMissing, StorageForbidden, StorageUnavailable (after retries) or StorageError.
    """
    if is_local(url):
        return _retry_locally(url, lambda: _read_local(local_path(url)))
    return object_store.get_object(url)


def read_within(url: str, allowance: ReadAllowance) -> bytes:
    """Read a file within an allowance.

    Raises as `read` does, StorageTooLarge for a larger file, StorageError for a path that is no
    regular file, such as a FIFO or a device, and BudgetFull where other reads hold the bytes it
    needs.
    """
    if is_local(url):
        return _retry_locally(url, lambda: disk.read_local_file(local_path(url), allowance))
    return object_store.get_object(url, allowance)


def start_read(url: str, allowance: ReadAllowance) -> Future[bytes] | None:
    """Start reading a file on the event loop of its store; None where a thread must read it."""
    return None if is_local(url) else object_store.start_get_object(url, allowance)


def open_read(url: str) -> IO[bytes]:
    """A seekable binary stream."""
    if is_local(url):
        return _retry_locally(url, lambda: cast(IO[bytes], open(local_path(url), "rb")))
    return object_store.open_object(url)


def iter_blocks(url: str, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The bytes of a file of any size in order, block by block.

    The blocks of an object are read concurrently, because each request waits for its answer.
    """
    if not is_local(url):
        yield from object_store.iter_object_blocks(url, block_bytes)
        return
    with open_read(url) as stream:
        while block := stream.read(block_bytes):
            yield block


def write(url: str, data: bytes) -> None:
    """Write a whole file atomically: readers see all of it or nothing, also after a kill."""
    if is_local(url):
        with open_write(url) as stream:
            stream.write(data)
        return
    object_store.put_object(url, data)


def create(url: str, data: bytes) -> bool:
    """Write a file only if there is none, atomically; returns whether this call created it."""
    if is_local(url):
        with translate_os_errors(url):
            return disk.create_local_file(local_path(url), data)
    return object_store.create_object(url, data)


@contextlib.contextmanager
def open_write(url: str) -> Iterator[IO[bytes]]:
    """A stream to a file that appears complete on a clean exit, and not at all otherwise."""
    if not is_local(url):
        with translate_os_errors(url), object_store.open_upload(url) as stream:
            yield stream
        return
    path = local_path(url)
    temporary = disk.temporary_name(path)
    try:
        with translate_os_errors(url):
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


def list_names(folder: str) -> list[str]:
    """Sorted names of the files directly in a folder; empty when there is no such folder."""
    if is_local(folder):
        try:
            with os.scandir(local_path(folder)) as entries:
                files = (_decode_name(e.name) for e in entries if e.is_file())
                return sorted(name for name in files if not disk.is_temporary(name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_errors.translate_error(folder, error) from error
    return sorted(file.path.rpartition("/")[2] for file in _iter_store_files(folder, deep=False))


def glob(pattern: str) -> list[str]:
    """Sorted files that match a pattern such as `nightly/*.parquet` or `s3://b/x/**/*.jpg`."""
    if is_local(pattern):
        found = local_glob.glob(local_path(pattern), recursive=True)
        return sorted(_decode_name(f) for f in found if os.path.isfile(f))
    matches = object_store.call_store(pattern, "glob", needs=LIST, long=True, detail=True)
    files = (path for path, info in matches.items() if info["type"] == "file")
    return sorted(object_store.build_url(pattern, path) for path in files)


def walk(folder: str) -> Iterator[str]:
    """Iterate over all files below a folder: sorted paths relative to it, separated by '/'.

    Hidden files and folders, and system folders such as lost+found, are skipped. Links are
    followed, but not to a parent folder.
    """
    if is_local(folder):
        yield from map(_decode_name, _walk_local(local_path(folder), ""))
        return
    prefix = folder.rstrip("/") + "/"
    below = (
        file.path.removeprefix(prefix).split("/") for file in _iter_store_files(folder, deep=True)
    )
    for parts in sorted(below):
        if not any(is_hidden_name(part) for part in parts):
            yield "/".join(parts)


def _iter_store_files(folder: str, *, deep: bool) -> Iterator[FileInfo]:
    """The files in a store's folder; none when there is no such folder."""
    with contextlib.suppress(StorageMissing):
        for page in object_store.iter_store_pages(folder, deep=deep):
            yield from page.files


def iter_pages(url: str, *, deep: bool) -> Iterator[ListingPage]:
    """List a folder in pages of up to 1,000 entries.

    deep: list all files below the folder; otherwise its own files and folders

    Hidden folders are skipped. Raises StorageMissing for a missing local folder; in a store a
    missing folder is an empty one.
    """
    if not is_local(url):
        yield from object_store.iter_store_pages(url, deep=deep)
        return
    root = local_path(url)
    names: Iterator[str]
    if deep:
        names = _walk_local(root, "")
    else:
        with translate_os_errors(url), os.scandir(root) as entries:
            found = sorted((e.name, e.is_dir()) for e in entries if not is_hidden_name(e.name))
        yield ListingPage([join(root, name) for name, is_dir in found if is_dir], [])
        names = (name for name, is_dir in found if not is_dir)
    while chunk := [_stat_local(join(root, name)) for name in itertools.islice(names, 1000)]:
        yield ListingPage([], chunk)


def _stat_local(path: str) -> FileInfo:
    try:
        found = os.stat(path)
    except OSError:
        return FileInfo(
            _decode_name(path), None, None, None
        )  # a dead link becomes a row with an error
    mtime = datetime.datetime.fromtimestamp(found.st_mtime_ns // 1000 / 1e6, datetime.UTC)
    return FileInfo(_decode_name(path), found.st_size, mtime, None)


def remove(url: str) -> None:
    """Remove a file or a whole folder, if it exists."""
    if is_local(url):
        path = local_path(url)
        with contextlib.suppress(StorageMissing), translate_os_errors(url):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        return
    _, path = object_store.resolve_store(url)
    with contextlib.suppress(StorageMissing):
        if _GLOB_CHARACTERS.search(path):  # fsspec would expand the name as a pattern
            for file in object_store.call_store(url, "find", needs=LIST, long=True):
                object_store.call_store(object_store.build_url(url, file), "rm_file", needs=DELETE)
        else:
            object_store.call_store(url, "rm", needs=DELETE, long=True, recursive=True)


def remove_temporary_files(
    folder: str,
    older_than: float = 0.0,
    is_abandoned: Callable[[str], bool] = lambda name: False,
) -> None:
    """Remove temporary files of killed writers from a local folder; stores keep none.

    older_than:   minimum age in seconds; younger files may belong to a running writer
    is_abandoned: whether the file of a name has no running writer; removed at any age
    """
    if not is_local(folder):
        return
    with contextlib.suppress(FileNotFoundError), os.scandir(local_path(folder)) as entries:
        for entry in entries:
            name = disk.parse_temporary(entry.name)
            if name is None:
                continue
            if is_abandoned(name) or time.time() - entry.stat().st_mtime >= older_than:
                os.unlink(entry.path)


def check_writable(folder: str) -> None:
    """Write and remove a probe file; raises the StorageError that writing an output would raise."""
    probe = join(folder, f"_probe-{uuid.uuid4().hex[:8]}")
    write(probe, b"imgcls")
    remove(probe)


@contextlib.contextmanager
def translate_os_errors(url: str) -> Iterator[None]:
    """Within the block, an OSError becomes the StorageError that explains it for `url`."""
    try:
        yield
    except OSError as error:
        raise storage_errors.translate_error(url, error) from error


def _walk_local(
    root: str, prefix: str, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    folder = os.path.join(root, prefix)
    with translate_os_errors(folder):
        here = os.stat(folder)
        identity = (here.st_dev, here.st_ino)
        if identity in above:
            return  # a link to a parent folder
        with os.scandir(folder) as scan:
            entries = sorted((e.name, e.is_dir()) for e in scan if not is_hidden_name(e.name))
    for name, is_dir in entries:
        relative = f"{prefix}/{name}" if prefix else name
        if is_dir:
            yield from _walk_local(root, relative, above | {identity})
        else:
            yield relative


def _read_local(path: str) -> bytes:
    with open(path, "rb", buffering=0) as stream:
        return stream.readall()


def _decode_name(name: str) -> str:
    """A file name as text: bytes that are not UTF-8, which no table can hold, become U+FFFD.

    Such a file becomes a row with an error, because it is not found by that name.
    """
    return name if name.isprintable() else os.fsencode(name).decode("utf-8", "replace")


def _retry_locally(url: str, call: Callable[[], T]) -> T:
    """Retry for 5 s only: a disk that does not answer by then will not."""
    return retry(url, call, seconds=_DISK_RETRY_S)
