"""Object stores behind one door: S3 by s3fs, and whatever else fsspec knows.

Owns how stores are reached, retries against a deadline, concurrent reads with an outcome for each
object, whole-object writes and create-if-absent. What it promises: an object arrives whole and as
it was stored or not at all, and is written by one request. Local files never come here.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import io
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from pydantic import PositiveFloat

from imgcls.config import Section
from imgcls.data.faults import GET, LIST, PUT, code_of, reason, short, typed
from imgcls.data.s3 import Reader
from imgcls.errors import StorageError, StorageMissing, StorageUnavailable

T = TypeVar("T")

_BUFFER_BYTES = 4 << 20
_ONE_PUT_BYTES = 1 << 30
_S3 = ("s3", "s3a")
_ATOMIC_CREATE = (*_S3, "gs", "gcs")
"""Stores whose driver creates an object only where there is none, atomically."""


class StorageConfig(Section):
    """How object stores are reached; credentials come by the store's own chain, never from here."""

    endpoint_url: str | None = None
    """Of an S3 store that is not AWS; AWS_ENDPOINT_URL when not given."""
    region: str | None = None
    """Of S3; by the usual chain when not given."""
    profile: str | None = None
    """The profile of ~/.aws to use."""
    anon: bool = False
    """Read public buckets without credentials."""
    requester_pays: bool = False
    """Agree to pay for requests to buckets that ask for it."""
    attempt_seconds: PositiveFloat = 15.0
    """A request that says nothing for so long is made again."""
    deadline_seconds: PositiveFloat = 60.0
    """What passing faults keep from succeeding for so long is given up."""


class _Process:
    settings = StorageConfig()


def use(settings: StorageConfig) -> None:
    """Reach stores this way, from now on and in this process."""
    _Process.settings = settings


def settings() -> StorageConfig:
    """How this process reaches stores; handed to the processes that it starts."""
    return _Process.settings


def carried(function: Callable[..., T], /, *given: Any, **named: Any) -> Callable[..., T]:
    """The function, with arguments, for another process, where it reaches stores as here."""
    here = settings()

    @functools.wraps(function)
    def call(*arguments: Any, **more: Any) -> T:
        use(here)
        return function(*given, *arguments, **named, **more)

    return call


def store(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in its terms.

    Raises StorageError when there is no driver for it.
    """
    protocol = protocol_of(url)
    try:
        fs = _file_system(protocol, settings())
        return fs, fs._strip_protocol(url)
    except Exception as error:  # whatever a driver raises that is not installed or not configured
        refused = typed(url, error)
        if type(refused) is not StorageError:
            raise refused from error
        raise StorageError(
            f"{short(url)}: no file system for {protocol}:// ({reason(error)})"
        ) from error


def protocol_of(url: str) -> str:
    return url.partition(":")[0]


def attempt(url: str, call: Callable[[], T], needs: str = "", seconds: float | None = None) -> T:
    """Call, translating errors; passing faults are tried again, backing off, until the deadline.

    needs:   the permission that it takes, to be named when it is refused
    seconds: a deadline of its own
    """
    pauses = _Pauses(seconds)
    while True:
        try:
            return call()
        except Exception as error:  # noqa: BLE001  raised again unless it will pass
            time.sleep(pauses.after(typed(url, error, needs), error))


def ask(url: str, method: str, *arguments: Any, needs: str, long: bool = False, **more: Any) -> Any:
    """Call a method of the URL's file system as `attempt` does, with the path before `arguments`.

    long: it may rightly take long, as listing a million objects does; else an answer that comes in
        a trickle is given up and asked for anew
    """
    fs, path = store(url)
    if not fs.async_impl:
        return attempt(url, lambda: getattr(fs, method)(path, *arguments, **more), needs)
    call = functools.partial(getattr(fs, f"_{method}"), path, *arguments, **more)
    asked = _attempted(url, call, needs, long=long)
    return asyncio.run_coroutine_threadsafe(asked, fs.loop).result()


def get(url: str) -> bytes:
    """A whole object."""
    asked = start_get(url)
    return bytes(ask(url, "cat_file", needs=GET)) if asked is None else asked.result()


def start_get(url: str) -> Future[bytes] | None:
    """Ask for an object and go on; None where the driver can only be waited for."""
    fs, path = store(url)
    if not fs.async_impl:
        return None
    protocol = protocol_of(url)
    if protocol in _S3:
        read = functools.partial(_reader(protocol, settings()).read, path, set())
    else:
        read = functools.partial(fs._cat_file, path)
    return asyncio.run_coroutine_threadsafe(_attempted(url, read, GET), fs.loop)


def put(url: str, data: bytes) -> None:
    """Write an object by one request, up to a gigabyte."""
    ask(url, "pipe_file", data, needs=PUT, long=True, **_by_one_request(url))


def create(url: str, data: bytes) -> bool:
    """Write an object only if there is none: True if it is this call's.

    Raises StorageError for a store that cannot do so atomically.
    """
    protocol = protocol_of(url)
    if protocol not in _ATOMIC_CREATE:
        raise StorageError(
            f"{short(url)}: {protocol}:// cannot create a file only where there is none, which "
            "keeps two drivers apart; give an output on S3, GCS or a disk"
        )
    try:
        ask(url, "pipe_file", data, needs=PUT, mode="create", **_by_one_request(url))
        return True
    except StorageError as error:
        exists = isinstance(error.__cause__, FileExistsError)
        if not exists and code_of(error.__cause__) not in ("PreconditionFailed", "412"):
            raise
    # an answer may have been lost, and the object be ours
    with contextlib.suppress(StorageMissing):
        return get(url) == data
    return False


@contextlib.contextmanager
def writing(url: str) -> Iterator[IO[bytes]]:
    """A stream that becomes an object, by one request, on a clean exit."""
    store(url)  # an error now, rather than when all is written
    with tempfile.NamedTemporaryFile(prefix="imgcls-upload-") as stream:
        yield stream
        stream.flush()
        _upload(url, stream.name)


def _upload(url: str, file: str) -> None:
    fs, path = store(url)
    more = _by_one_request(url)
    attempt(url, lambda: fs.put_file(file, path, **more), PUT)


def reading(url: str) -> IO[bytes]:
    """A seekable stream over ranges of an object, each asked for until it is whole."""
    size = int(ask(url, "info", needs=GET)["size"])
    return io.BufferedReader(_Ranges(url, size), _BUFFER_BYTES)


@dataclass(frozen=True)
class File:
    """A file as a listing tells it: its URL, bytes, time in UTC and ETag, None where not known."""

    path: str
    size: int | None
    mtime: datetime.datetime | None
    etag: str | None


@dataclass(frozen=True)
class Page:
    """Some of what a listing found."""

    folders: list[str]
    files: list[File]


def pages(url: str, *, deep: bool) -> Iterator[Page]:
    """What lies in a folder, a page at a time: files and folders, or, if `deep`, all files."""
    fs, path = store(url)
    root = url[: len(url) - len(path)] if url.endswith(path) else f"{protocol_of(url)}://"
    if protocol_of(url) not in _S3:
        method = "find" if deep else "ls"
        found = ask(url, method, needs=LIST, long=True, detail=True)
        infos = list(found.values()) if isinstance(found, dict) else found
        yield Page(
            [f"{root}{i['name'].rstrip('/')}" for i in infos if i["type"] == "directory"],
            [
                File(f"{root}{i['name']}", i.get("size"), None, None)
                for i in infos
                if i["type"] == "file"
            ],
        )
        return
    bucket, key, _ = fs.split_path(path)
    request = {"Bucket": bucket, "Prefix": f"{key.rstrip('/')}/" if key else ""}
    if not deep:
        request["Delimiter"] = "/"
    while True:
        call = functools.partial(fs._call_s3, "list_objects_v2", **request)
        asked = _attempted(url, call, LIST)
        answer = asyncio.run_coroutine_threadsafe(asked, fs.loop).result()
        yield _page_of(answer, f"{root}{bucket}/")
        if not answer.get("IsTruncated"):
            return
        request["ContinuationToken"] = answer["NextContinuationToken"]


def _page_of(answer: dict[str, Any], bucket: str) -> Page:
    folders = [f"{bucket}{each['Prefix'].rstrip('/')}" for each in answer.get("CommonPrefixes", [])]
    files = [
        File(f"{bucket}{each['Key']}", each["Size"], each["LastModified"], each["ETag"].strip('"'))
        for each in answer.get("Contents", [])
        if not each["Key"].endswith("/")
    ]
    return Page(folders, files)


class _Ranges(io.RawIOBase):
    """An object of `size` bytes, read by ranges."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size = url, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._size, self._at + len(buffer))
        if end <= self._at:
            return 0
        data = self._range(self._at, end)
        buffer[: len(data)] = data
        self._at = end
        return len(data)

    def _range(self, start: int, end: int) -> bytes:
        def whole() -> bytes:
            data: bytes = ask(self._url, "cat_file", needs=GET, start=start, end=end)
            if len(data) != end - start:
                raise StorageUnavailable(
                    f"{short(self._url)}: {len(data):,} bytes came of {end - start:,}"
                )
            return data

        return attempt(self._url, whole, GET)


async def _attempted(
    url: str, call: Callable[[], Awaitable[T]], needs: str, *, long: bool = False
) -> T:
    """As `attempt`; each call has a time, which grows and is longer for those that may be long."""
    pauses = _Pauses()
    patience = settings().attempt_seconds
    while True:
        try:
            limit = LONG * patience if long else min(patience, pauses.left + 1)
            return await asyncio.wait_for(call(), limit)
        except Exception as error:  # noqa: BLE001  raised again unless it will pass
            pause = pauses.after(typed(url, error, needs), error)
            patience *= 2
            await asyncio.sleep(pause)


class _Pauses:
    """Times between attempts, doubling with jitter, that end at a deadline."""

    def __init__(self, seconds: float | None = None) -> None:
        self._start = time.monotonic()
        self._deadline = self._start + (seconds or settings().deadline_seconds)
        self._count = 0
        self._told = False

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def after(self, error: StorageError, cause: Exception) -> float:
        """Seconds to wait after an error; raises it when it will not pass, or not in time."""
        pause = min(BACKOFF_SECONDS * 2**self._count, MAX_BACKOFF_SECONDS)
        pause *= random.uniform(0.5, 1.5)
        self._count += 1
        if not isinstance(error, StorageUnavailable) or pause > self.left:
            raise error from (cause if cause is not error else None)
        if not self._told and time.monotonic() - self._start > TOLD_SECONDS:
            self._told = True
            print(f"waiting up to {self.left:.0f} s for the store: {error}", file=sys.stderr)
        return pause


BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 5.0
TOLD_SECONDS = 10.0
LONG = 20
"""Times as long as others, a call may take that lists many objects or writes a large one."""


def _by_one_request(url: str) -> dict[str, Any]:
    """What keeps s3fs from cutting an object into parts."""
    return {"chunksize": _ONE_PUT_BYTES} if protocol_of(url) in _S3 else {}


@functools.cache
def _reader(protocol: str, settings: StorageConfig) -> Reader:
    return Reader(_file_system(protocol, settings))


@functools.cache
def _file_system(protocol: str, settings: StorageConfig) -> Any:
    import fsspec

    # a cached listing would hide what other processes have written since
    if protocol not in _S3:
        return fsspec.filesystem(protocol, use_listings_cache=False)
    fs = fsspec.filesystem(
        protocol,
        use_listings_cache=False,
        anon=settings.anon,
        endpoint_url=settings.endpoint_url,
        requester_pays=settings.requester_pays,
        client_kwargs={"region_name": settings.region} if settings.region else {},
        config_kwargs={
            "retries": {"total_max_attempts": 1},  # they are ours
            "connect_timeout": settings.attempt_seconds,
            "read_timeout": settings.attempt_seconds,
            "max_pool_connections": 64,
        },
        max_concurrency=1,  # else every read asks for the size first
        **({"profile": settings.profile} if settings.profile else {}),
    )
    fs.retries = 1
    return fs
