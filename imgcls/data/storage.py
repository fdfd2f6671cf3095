"""One way to read and write files, local or on any fsspec store.

Owns typed errors, retries with jittered backoff, atomic writes and create-if-absent. Local paths
take the short way through the operating system; every other URL goes through fsspec. What the
bytes mean is left to the callers.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob as local_glob
import os
import random
import re
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, TypeVar, cast

from imgcls.errors import (
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageMissing,
    StorageUnavailable,
)

T = TypeVar("T")

ATTEMPTS = 5
BACKOFF_SECONDS = 0.2

_PASSING_CODES = frozenset(
    "SlowDown RequestTimeout RequestTimeTooSkewed InternalError ServiceUnavailable Throttling "
    "ThrottlingException TooManyRequests 500 502 503 504 429 "
    # two at once on one name: whoever tries again finds it there
    "ConditionalRequestConflict OperationAborted".split()
)
_FORBIDDEN_CODES = frozenset(
    "AccessDenied 403 Forbidden InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken".split()
)
_MISSING_CODES = frozenset("NoSuchKey NoSuchBucket 404 NotFound".split())
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
    fs, path = _store(url)
    return bool(_attempt(url, lambda: fs.exists(path)))


def is_folder(url: str) -> bool:
    if is_local(url):
        return os.path.isdir(local_path(url))
    fs, path = _store(url)
    return bool(_attempt(url, lambda: fs.isdir(path)))


def size(url: str) -> int:
    """Bytes in the file; raises StorageMissing."""
    if is_local(url):
        return int(_attempt(url, lambda: os.stat(local_path(url)).st_size))
    fs, path = _store(url)
    return int(_attempt(url, lambda: fs.info(path)["size"]))


def read(url: str) -> bytes:
    """The whole file.

    Raises StorageMissing, StorageForbidden, StorageUnavailable (after retries) or StorageError.
    """
    if is_local(url):
        return _attempt(url, lambda: _read_local(local_path(url)))
    fs, path = _store(url)
    return bytes(_attempt(url, lambda: fs.cat_file(path)))


def read_ahead(urls: Iterable[str | None], in_flight: int = 16) -> Iterator[bytes | StorageError]:
    """Each file's bytes or its error, in order, with `in_flight` reads under way.

    A None stands for a row without a path and comes back as StorageMissing.
    """
    waiting: deque[Future[bytes | StorageError]] = deque()
    with ThreadPoolExecutor(in_flight, thread_name_prefix="fetch") as pool:
        try:
            for url in urls:
                waiting.append(pool.submit(_read_or_error, url))
                if len(waiting) >= in_flight:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def open_read(url: str) -> IO[bytes]:
    """A seekable binary stream."""
    if is_local(url):
        return cast(IO[bytes], _attempt(url, lambda: open(local_path(url), "rb")))
    fs, path = _store(url)
    return cast(IO[bytes], _attempt(url, lambda: fs.open(path, "rb")))


def write(url: str, data: bytes) -> None:
    """Write a whole file atomically: readers see all of it or none, also after a kill."""
    if is_local(url):
        with open_write(url) as stream:
            stream.write(data)
        return
    fs, path = _store(url)
    _attempt(url, lambda: fs.pipe_file(path, data))


def create(url: str, data: bytes) -> bool:
    """Write a file only if there is none: True if this call made it, atomically among rivals."""
    if is_local(url):
        path = local_path(url)
        temporary = _temporary(path)
        try:
            with translated(url):
                os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                _write_durably(temporary, data)
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
                    return True
            return False
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    fs, path = _store(url)
    try:
        _attempt(url, lambda: fs.pipe_file(path, data, mode="create"))
        return True
    except StorageError as error:
        if isinstance(error.__cause__, FileExistsError):
            return False
        if _code(error.__cause__) in ("PreconditionFailed", "412"):
            return False
        raise


@contextlib.contextmanager
def open_write(url: str) -> Iterator[IO[bytes]]:
    """A stream whose file appears whole on a clean exit, and not at all otherwise."""
    if not is_local(url):
        fs, path = _store(url)
        stream = _attempt(url, lambda: fs.open(path, "wb"))
        try:
            with translated(url):
                yield stream
        except BaseException:
            with contextlib.suppress(Exception):
                stream.discard()
            with contextlib.suppress(AttributeError):
                stream.closed = True  # or the collector would close it, which is to write it
            raise
        _attempt(url, stream.close)
        return
    path = local_path(url)
    temporary = _temporary(path)
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
                return sorted(e.name for e in entries if e.is_file() and not _is_temporary(e.name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _typed(folder, error) from error
    fs, path = _store(folder)
    try:
        found = _attempt(folder, lambda: fs.ls(path, detail=True))
    except StorageMissing:
        return []
    return sorted(f["name"].rsplit("/", 1)[-1] for f in found if f["type"] == "file")


def find(pattern: str) -> list[str]:
    """Sorted files that match a glob such as `nightly/*.parquet` or `s3://b/x/**/*.jpg`."""
    if is_local(pattern):
        found = local_glob.glob(local_path(pattern), recursive=True)
        return sorted(f for f in found if os.path.isfile(f))
    fs, path = _store(pattern)
    matches = _attempt(pattern, lambda: fs.glob(path, detail=True))
    return sorted(fs.unstrip_protocol(f) for f, info in matches.items() if info["type"] == "file")


def walk(folder: str) -> Iterator[str]:
    """Files below a folder as paths relative to it, '/'-separated, in sorted order, streamed.

    Hidden files and folders are passed over; links are followed, but not back up.
    """
    if is_local(folder):
        yield from _walk_local(local_path(folder), "")
        return
    fs, path = _store(folder)
    prefix = path.rstrip("/") + "/"
    below = [found[len(prefix) :].split("/") for found in _attempt(folder, lambda: fs.find(path))]
    for parts in sorted(below):
        if not any(part.startswith(".") for part in parts):
            yield "/".join(parts)


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
    fs, path = _store(url)
    with contextlib.suppress(StorageMissing):
        if _MAGIC.search(path):  # fsspec would take the name for a pattern, and remove others too
            for file in _attempt(url, lambda: fs.find(path)):
                _attempt(url, functools.partial(fs.rm_file, file))
        else:
            _attempt(url, lambda: fs.rm(path, recursive=True))


def sweep(folder: str, older_than: float = 0.0) -> None:
    """Remove what killed writers left in a local folder; stores keep nothing of a broken write.

    older_than: seconds; younger leftovers may belong to a writer at work
    """
    if not is_local(folder):
        return
    with contextlib.suppress(FileNotFoundError), os.scandir(local_path(folder)) as entries:
        for entry in entries:
            if _is_temporary(entry.name) and time.time() - entry.stat().st_mtime >= older_than:
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
        raise _typed(url, error) from error


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
            entries = sorted((e.name, e.is_dir()) for e in scan if not e.name.startswith("."))
    for name, is_dir in entries:
        relative = f"{prefix}/{name}" if prefix else name
        if is_dir:
            yield from _walk_local(root, relative, above | {identity})
        else:
            yield relative


def _read_local(path: str) -> bytes:
    with open(path, "rb", buffering=0) as stream:
        return stream.readall()


def _read_or_error(url: str | None) -> bytes | StorageError:
    if url is None:
        return StorageMissing("the path is null")
    try:
        return read(url)
    except StorageError as error:
        return error


def _write_durably(path: str, data: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _temporary(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name[:100]}.{uuid.uuid4().hex[:12]}.tmp")


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


@functools.cache
def _file_system(protocol: str) -> Any:
    import fsspec

    # a cached listing would hide what other processes have written since
    return fsspec.filesystem(protocol, use_listings_cache=False)


def _store(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in its terms."""
    protocol = url.partition(":")[0]
    try:
        fs = _file_system(protocol)
        return fs, fs._strip_protocol(url)
    except Exception as error:  # whatever a driver raises that is not installed or not configured
        raise StorageError(
            f"{_short(url)}: no file system for {protocol}:// ({_reason(error)})"
        ) from error


def _attempt(url: str, call: Callable[[], T]) -> T:
    """Call, translating errors; passing faults are tried again with jittered backoff."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            typed = _typed(url, error)
            if not isinstance(typed, StorageUnavailable) or attempt == ATTEMPTS:
                raise typed from error
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _typed(url: str, error: Exception) -> StorageError:
    """The StorageError that says what a raw error means for `url`."""
    place = _short(url)
    code = _code(error)
    if isinstance(error, StorageError):
        return error
    if isinstance(error, FileNotFoundError) or code in _MISSING_CODES:
        what = "bucket" if code == "NoSuchBucket" else "file"
        return StorageMissing(f"{place}: no such {what}")
    refused = isinstance(error, PermissionError) or code in _FORBIDDEN_CODES
    if refused or type(error).__name__.endswith("CredentialsError"):
        return StorageForbidden(f"{place}: access is refused ({_reason(error)})")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{place}: no space left; free some")
    if isinstance(error, IsADirectoryError):
        return StorageError(f"{place}: is a folder, not a file")
    if code in _PASSING_CODES or _is_passing(error):
        return StorageUnavailable(f"{place}: the store did not answer ({_reason(error)})")
    return StorageError(f"{place}: {_reason(error)}")


def _code(error: BaseException | None) -> str:
    """The store's own code for an error, also below what s3fs made of it."""
    for each in (error, getattr(error, "__cause__", None)):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "status", ""))


def _is_passing(error: Exception) -> bool:
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ESTALE, errno.EIO, errno.EMFILE):
        return True
    if isinstance(error, ValueError) or type(error).__name__ == "ParamValidationError":
        return False
    module = type(error).__module__.partition(".")[0]
    return module in ("aiohttp", "botocore", "aiobotocore", "urllib3") and not _code(error)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None)
    if text is None and isinstance(error, OSError):
        text = _code(error)  # a store may give a code and no words
    return " ".join((text or str(error) or type(error).__name__).split())[:300]


def _short(url: str) -> str:
    return url if len(url) <= 300 else f"{url[:120]}...({len(url)} characters)"
