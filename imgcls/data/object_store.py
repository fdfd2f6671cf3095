"""Object stores and web servers: S3, GCS, Azure, HTTP, and whatever else fsspec knows.

Owns how stores are reached, retries against a deadline, concurrent reads with an outcome for each
object, whole-object writes and create-if-absent. What it promises: an object arrives whole and as
it was stored or not at all, and never more of it than allowed. Local files never come here.
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

from pydantic import PositiveFloat, PositiveInt

from imgcls.config import Section
from imgcls.data import azure, gcs, http
from imgcls.data.readahead import WHOLE, Allowance, NoRoom
from imgcls.data.s3_reader import Reader
from imgcls.data.storage_errors import (
    GET,
    PUT,
    code_of,
    reason,
    retry_after,
    short,
    too_large,
    typed,
)
from imgcls.errors import StorageError, StorageMissing, StorageUnavailable

T = TypeVar("T")

_BUFFER_BYTES = 4 << 20
_ONE_PUT_BYTES = 1 << 30
S3 = ("s3", "s3a")
GCS = ("gs", "gcs")
AZURE = ("az", "abfs", "abfss")
HTTP = ("http", "https")
BUCKETS = (*S3, *GCS, *AZURE)
"""Stores of named objects in buckets or containers, which create an object atomically."""


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
    """Timeout of one request attempt, in seconds."""
    deadline_seconds: PositiveFloat = 60.0
    """Total time to retry a request after transient errors, in seconds."""
    host_requests: PositiveInt = 64
    """Maximum concurrent requests to one HTTP host, over all workers of a run."""
    user_agent: str = "imgcls"
    """User-Agent header of HTTP requests; some hosts require a contact address in it."""

    def shared_by(self, processes: int) -> StorageConfig:
        """The settings of each of several processes, which together keep the limit per host."""
        share = max(1, self.host_requests // max(1, processes))
        return self.model_copy(update={"host_requests": share})


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
    return carried_to(1, function, *given, **named)


def carried_to(
    processes: int, function: Callable[..., T], /, *given: Any, **named: Any
) -> Callable[..., T]:
    """As `carried`, for several processes at a time, which keep the limit per host together."""
    here = settings().shared_by(processes)

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
        account = azure.account_of(url) if protocol in AZURE else None
        fs = _file_system(protocol, settings(), account)
        return fs, fs._strip_protocol(http.request_url(url) if protocol in HTTP else url)
    except Exception as error:  # whatever a driver raises that is not installed or not configured
        refused = typed(url, error)
        if type(refused) is not StorageError:
            raise refused from error
        raise StorageError(
            f"{short(url)}: no file system for {protocol}:// ({reason(error)})"
        ) from error


def protocol_of(url: str) -> str:
    return url.partition(":")[0]


def url_of(url: str, path: str) -> str:
    """The URL of a path that the file system of `url` has named, written as `url` is."""
    protocol = protocol_of(url)
    if protocol not in BUCKETS:
        return f"{protocol}://{path}" if "://" not in path else path
    bucket = url.partition("://")[2].partition("/")[0]
    return f"{protocol}://{bucket}/{path.partition('/')[2]}"


def attempt(url: str, call: Callable[[], T], needs: str = "", seconds: float | None = None) -> T:
    """Call, translating errors; passing faults are tried again, backing off, until the deadline.

    needs:   the permission that it takes, to be named when it is refused
    seconds: a deadline of its own
    """
    pauses = _Pauses(seconds)
    while True:
        try:
            return call()
        except NoRoom:
            raise
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
    asked = attempted(url, call, needs, long=long)
    return asyncio.run_coroutine_threadsafe(asked, fs.loop).result()


def get(url: str, allowance: Allowance = WHOLE) -> bytes:
    """A whole object, if it has no more bytes than allowed.

    Raises StorageTooLarge, and NoRoom where other reads hold what it takes.
    """
    asked = start_get(url, allowance)
    if asked is not None:
        return asked.result()
    if allowance.max_bytes is None:
        return bytes(ask(url, "cat_file", needs=GET))
    fs, path = store(url)
    return attempt(url, lambda: _opened(url, fs, path, allowance), GET)


def start_get(url: str, allowance: Allowance = WHOLE) -> Future[bytes] | None:
    """Ask for an object and go on; None for stores whose driver can only be waited for."""
    if protocol_of(url) not in (*BUCKETS, *HTTP):
        return None
    fs, path = store(url)
    return asyncio.run_coroutine_threadsafe(_got(url, fs, path, allowance), fs.loop)


async def _got(url: str, fs: Any, path: str, allowance: Allowance) -> bytes:
    protocol, host = protocol_of(url), None
    read: Callable[[str], Awaitable[bytes]]
    if protocol in S3:
        doubted: set[str] = set()
        s3 = _reader(protocol, settings())
        read = lambda path: s3.read(path, doubted, allowance)  # noqa: E731
    elif protocol in HTTP:
        web = _web(settings())
        host = web.host(url)
        read = lambda _: web.read(url, allowance)  # noqa: E731
    else:
        by = gcs.read if protocol in GCS else azure.read
        read = functools.partial(by, fs, allowance=allowance)
    try:
        return await attempted(url, lambda: read(path), GET, host=host, allowance=allowance)
    except StorageMissing:
        # to a store ./ is a part of a name like any other; on a disk it means nothing
        plain = "/".join(part for part in path.split("/") if part != ".")
        if protocol not in BUCKETS or plain == path:
            raise
        return await attempted(url, lambda: read(plain), GET, allowance=allowance)


def _opened(url: str, fs: Any, path: str, allowance: Allowance) -> bytes:
    """An object, by a driver that knows no more than fsspec asks of it."""
    assert allowance.max_bytes is not None
    with fs.open(path, "rb") as stream:
        size = getattr(stream, "size", None)
        if size is not None and allowance.exceeded_by(size):
            raise too_large(url, allowance.max_bytes, size)
        allowance.reserve(allowance.max_bytes if size is None else size)
        data = bytes(stream.read(allowance.max_bytes + 1))
    if allowance.exceeded_by(len(data)):
        raise too_large(url, allowance.max_bytes)
    return data


def put(url: str, data: bytes) -> None:
    """Write an object by one request, up to a gigabyte."""
    ask(url, "pipe_file", data, needs=PUT, long=True, **_by_one_request(url))


def create(url: str, data: bytes) -> bool:
    """Write an object only if there is none: True if it is this call's.

    Raises StorageError for a store that cannot do so atomically.
    """
    protocol = protocol_of(url)
    if protocol not in BUCKETS:
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
    """A file as a listing has it: URL, bytes, time in UTC and version, None where not known.

    etag: the ETag of S3 and Azure, the generation of GCS: another one whenever it is replaced
    """

    path: str
    size: int | None
    mtime: datetime.datetime | None
    etag: str | None


@dataclass(frozen=True)
class Page:
    """Some of what a listing found."""

    folders: list[str]
    files: list[File]


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

    def readall(self) -> bytes:
        """The rest, by one request; RawIOBase would make one for every 8 KB."""
        at, self._at = self._at, self._size
        return self._range(at, self._size) if at < self._size else b""

    def _range(self, start: int, end: int) -> bytes:
        def whole() -> bytes:
            data: bytes = ask(self._url, "cat_file", needs=GET, start=start, end=end)
            if len(data) != end - start:
                raise StorageUnavailable(
                    f"{short(self._url)}: {len(data):,} bytes came of {end - start:,}"
                )
            return data

        return attempt(self._url, whole, GET)


async def attempted(
    url: str,
    call: Callable[[], Awaitable[T]],
    needs: str,
    *,
    long: bool = False,
    host: http.Host | None = None,
    allowance: Allowance = WHOLE,
) -> T:
    """As `attempt`; each call has a time, which grows and is longer for those that may be long.

    host:      to wait for, outside that time, before each attempt
    allowance: that the call may wait for, likewise
    """
    pauses = _Pauses()
    patience = settings().attempt_seconds
    while True:
        turn = contextlib.nullcontext(0.0) if host is None else host.turn(url, pauses.deadline)
        async with turn as queued:
            pauses.excuse(queued)
            limit = LONG * patience if long else min(patience, pauses.left + 1)
            try:
                return await asyncio.wait_for(call(), limit)
            except NoRoom as full:
                wanted: int | None = full.total
                pause = 0.0
            except Exception as error:  # noqa: BLE001  raised again unless it will pass
                wanted, pause = None, pauses.after(typed(url, error, needs), error)
                allowance.forget()
                patience *= 2
        if wanted is not None:
            began = time.monotonic()
            await asyncio.wrap_future(allowance.admission(wanted))
            pauses.excuse(time.monotonic() - began)
        else:
            await asyncio.sleep(pause)


class _Pauses:
    """Times between attempts, doubling with jitter or as the store asks, that end at a deadline."""

    def __init__(self, seconds: float | None = None) -> None:
        self._start = time.monotonic()
        self.deadline = self._start + (seconds or settings().deadline_seconds)
        self._count = 0
        self._told = False

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def excuse(self, seconds: float) -> None:
        """Leave out time that was spent waiting for other requests of our own."""
        self._start += seconds
        self.deadline += seconds

    def after(self, error: StorageError, cause: Exception) -> float:
        """Seconds to wait after an error; raises it when it will not pass, or not in time."""
        pause = min(BACKOFF_SECONDS * 2**self._count, MAX_BACKOFF_SECONDS)
        pause *= random.uniform(0.5, 1.5)
        pause = max(pause, retry_after(cause) or 0.0)
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
    return {"chunksize": _ONE_PUT_BYTES} if protocol_of(url) in S3 else {}


@functools.cache
def _reader(protocol: str, settings: StorageConfig) -> Reader:
    return Reader(_file_system(protocol, settings))


@functools.cache
def _web(settings: StorageConfig) -> http.Reader:
    return http.Reader(settings.host_requests, settings.user_agent, settings.attempt_seconds)


@functools.cache
def _file_system(protocol: str, settings: StorageConfig, account: str | None = None) -> Any:
    import fsspec

    # a cached listing would hide what other processes have written since
    if protocol in GCS:
        anon = {"token": "anon"} if settings.anon else {}
        return gcs.file_system(requester_pays=settings.requester_pays, **anon)
    if protocol in AZURE:
        return azure.file_system(account, anon=settings.anon, seconds=settings.attempt_seconds)
    if protocol in HTTP:
        client = {"headers": {"User-Agent": settings.user_agent}, "requote_redirect_url": False}
        return fsspec.filesystem(
            protocol, use_listings_cache=False, encoded=True, client_kwargs=client
        )
    if protocol not in S3:
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
