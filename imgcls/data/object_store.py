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

from imgcls.data import azure, gcs, http
from imgcls.data.readahead import UNLIMITED, BudgetFull, ReadAllowance
from imgcls.data.s3_reader import S3Reader
from imgcls.data.storage_errors import (
    GET,
    PUT,
    describe_error,
    get_error_code,
    get_retry_after,
    shorten_url,
    too_large_error,
    translate_error,
)
from imgcls.data.storage_settings import StorageConfig, current_settings
from imgcls.errors import StorageError, StorageMissing, StorageUnavailable

T = TypeVar("T")

_READ_BUFFER_BYTES = 4 << 20
_SINGLE_PUT_BYTES = 1 << 30
S3_PROTOCOLS = ("s3", "s3a")
GCS_PROTOCOLS = ("gs", "gcs")
AZURE_PROTOCOLS = ("az", "abfs", "abfss")
HTTP_PROTOCOLS = ("http", "https")
BUCKET_PROTOCOLS = (*S3_PROTOCOLS, *GCS_PROTOCOLS, *AZURE_PROTOCOLS)
"""Stores of named objects in buckets or containers, which create an object atomically."""


def resolve_store(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in its terms.

    Raises StorageError when there is no driver for it.
    """
    protocol = get_protocol(url)
    try:
        account = azure.get_account(url) if protocol in AZURE_PROTOCOLS else None
        fs = _build_file_system(protocol, current_settings(), account)
        return fs, fs._strip_protocol(http.encode_url(url) if protocol in HTTP_PROTOCOLS else url)
    except Exception as error:  # whatever a driver raises that is not installed or not configured
        refused = translate_error(url, error)
        if type(refused) is not StorageError:
            raise refused from error
        raise StorageError(
            f"{shorten_url(url)}: no file system for {protocol}:// ({describe_error(error)})"
        ) from error


def get_protocol(url: str) -> str:
    return url.partition(":")[0]


def build_url(url: str, path: str) -> str:
    """The URL of a path that the file system of `url` has named, written as `url` is."""
    protocol = get_protocol(url)
    if protocol not in BUCKET_PROTOCOLS:
        return f"{protocol}://{path}" if "://" not in path else path
    bucket = url.partition("://")[2].partition("/")[0]
    return f"{protocol}://{bucket}/{path.partition('/')[2]}"


def retry(url: str, call: Callable[[], T], needs: str = "", seconds: float | None = None) -> T:
    """Call, translating errors; passing faults are tried again, backing off, until the deadline.

    needs:   the permission that it takes, to be named when it is refused
    seconds: a deadline of its own
    """
    pauses = _Backoff(seconds)
    while True:
        try:
            return call()
        except BudgetFull:
            raise
        except Exception as error:  # noqa: BLE001  raised again unless it will pass
            time.sleep(pauses.next_pause(translate_error(url, error, needs), error))


def call_store(
    url: str, method: str, *arguments: Any, needs: str, long: bool = False, **more: Any
) -> Any:
    """Call a method of the URL's file system as `attempt` does, with the path before `arguments`.

    long: it may rightly take long, as listing a million objects does; else an answer that comes in
        a trickle is given up and asked for anew
    """
    fs, path = resolve_store(url)
    if not fs.async_impl:
        return retry(url, lambda: getattr(fs, method)(path, *arguments, **more), needs)
    call = functools.partial(getattr(fs, f"_{method}"), path, *arguments, **more)
    asked = retry_async(url, call, needs, long=long)
    return asyncio.run_coroutine_threadsafe(asked, fs.loop).result()


def get_object(url: str, allowance: ReadAllowance = UNLIMITED) -> bytes:
    """A whole object, if it has no more bytes than allowed.

    Raises StorageTooLarge, and NoRoom where other reads hold what it takes.
    """
    asked = start_get_object(url, allowance)
    if asked is not None:
        return asked.result()
    if allowance.max_bytes is None:
        return bytes(call_store(url, "cat_file", needs=GET))
    fs, path = resolve_store(url)
    return retry(url, lambda: _read_by_open(url, fs, path, allowance), GET)


def start_get_object(url: str, allowance: ReadAllowance = UNLIMITED) -> Future[bytes] | None:
    """Ask for an object and go on; None for stores whose driver can only be waited for."""
    if get_protocol(url) not in (*BUCKET_PROTOCOLS, *HTTP_PROTOCOLS):
        return None
    fs, path = resolve_store(url)
    return asyncio.run_coroutine_threadsafe(_get_object_async(url, fs, path, allowance), fs.loop)


async def _get_object_async(url: str, fs: Any, path: str, allowance: ReadAllowance) -> bytes:
    protocol, host = get_protocol(url), None
    read: Callable[[str], Awaitable[bytes]]
    if protocol in S3_PROTOCOLS:
        doubted: set[str] = set()
        s3 = _build_s3_reader(protocol, current_settings())
        read = lambda path: s3.read(path, doubted, allowance)  # noqa: E731
    elif protocol in HTTP_PROTOCOLS:
        web = _build_http_reader(current_settings())
        host = web.get_limiter(url)
        read = lambda _: web.read(url, allowance)  # noqa: E731
    else:
        by = gcs.read_gcs_object if protocol in GCS_PROTOCOLS else azure.read_azure_blob
        read = functools.partial(by, fs, allowance=allowance)
    try:
        return await retry_async(url, lambda: read(path), GET, host=host, allowance=allowance)
    except StorageMissing:
        # to a store ./ is a part of a name like any other; on a disk it means nothing
        plain = "/".join(part for part in path.split("/") if part != ".")
        if protocol not in BUCKET_PROTOCOLS or plain == path:
            raise
        return await retry_async(url, lambda: read(plain), GET, allowance=allowance)


def _read_by_open(url: str, fs: Any, path: str, allowance: ReadAllowance) -> bytes:
    """An object, by a driver that knows no more than fsspec asks of it."""
    assert allowance.max_bytes is not None
    with fs.open(path, "rb") as stream:
        size = getattr(stream, "size", None)
        if size is not None and allowance.is_exceeded_by(size):
            raise too_large_error(url, allowance.max_bytes, size)
        allowance.reserve(allowance.max_bytes if size is None else size)
        data = bytes(stream.read(allowance.max_bytes + 1))
    if allowance.is_exceeded_by(len(data)):
        raise too_large_error(url, allowance.max_bytes)
    return data


def put_object(url: str, data: bytes) -> None:
    """Write an object by one request, up to a gigabyte."""
    call_store(url, "pipe_file", data, needs=PUT, long=True, **_single_put_options(url))


def create_object(url: str, data: bytes) -> bool:
    """Write an object only if there is none: True if it is this call's.

    Raises StorageError for a store that cannot do so atomically.
    """
    protocol = get_protocol(url)
    if protocol not in BUCKET_PROTOCOLS:
        raise StorageError(
            f"{shorten_url(url)}: {protocol}:// cannot create a file only where there is none, "
            "which "
            "keeps two drivers apart; give an output on S3, GCS or a disk"
        )
    try:
        call_store(url, "pipe_file", data, needs=PUT, mode="create", **_single_put_options(url))
        return True
    except StorageError as error:
        exists = isinstance(error.__cause__, FileExistsError)
        if not exists and get_error_code(error.__cause__) not in ("PreconditionFailed", "412"):
            raise
    # an answer may have been lost, and the object be ours
    with contextlib.suppress(StorageMissing):
        return get_object(url) == data
    return False


@contextlib.contextmanager
def open_upload(url: str) -> Iterator[IO[bytes]]:
    """A stream that becomes an object, by one request, on a clean exit."""
    resolve_store(url)  # an error now, rather than when all is written
    with tempfile.NamedTemporaryFile(prefix="imgcls-upload-") as stream:
        yield stream
        stream.flush()
        _upload(url, stream.name)


def _upload(url: str, file: str) -> None:
    fs, path = resolve_store(url)
    more = _single_put_options(url)
    retry(url, lambda: fs.put_file(file, path, **more), PUT)


def open_object(url: str) -> IO[bytes]:
    """A seekable stream over ranges of an object, each asked for until it is whole."""
    size = int(call_store(url, "info", needs=GET)["size"])
    return io.BufferedReader(_RangeReader(url, size), _READ_BUFFER_BYTES)


@dataclass(frozen=True)
class FileInfo:
    """A file as a listing has it: URL, bytes, time in UTC and version, None where not known.

    etag: the ETag of S3 and Azure, the generation of GCS: another one whenever it is replaced
    """

    path: str
    size: int | None
    mtime: datetime.datetime | None
    etag: str | None


@dataclass(frozen=True)
class ListingPage:
    """Some of what a listing found."""

    folders: list[str]
    files: list[FileInfo]


class _RangeReader(io.RawIOBase):
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
        data = self._read_range(self._at, end)
        buffer[: len(data)] = data
        self._at = end
        return len(data)

    def readall(self) -> bytes:
        """The rest, by one request; RawIOBase would make one for every 8 KB."""
        at, self._at = self._at, self._size
        return self._read_range(at, self._size) if at < self._size else b""

    def _read_range(self, start: int, end: int) -> bytes:
        def whole() -> bytes:
            data: bytes = call_store(self._url, "cat_file", needs=GET, start=start, end=end)
            if len(data) != end - start:
                raise StorageUnavailable(
                    f"{shorten_url(self._url)}: {len(data):,} bytes came of {end - start:,}"
                )
            return data

        return retry(self._url, whole, GET)


async def retry_async(
    url: str,
    call: Callable[[], Awaitable[T]],
    needs: str,
    *,
    long: bool = False,
    host: http.HostLimiter | None = None,
    allowance: ReadAllowance = UNLIMITED,
) -> T:
    """As `attempt`; each call has a time, which grows and is longer for those that may be long.

    host:      to wait for, outside that time, before each attempt
    allowance: that the call may wait for, likewise
    """
    pauses = _Backoff()
    patience = current_settings().attempt_timeout_s
    while True:
        turn = (
            contextlib.nullcontext(0.0) if host is None else host.acquire_slot(url, pauses.deadline)
        )
        async with turn as queued:
            pauses.exclude(queued)
            limit = LONG_REQUEST_FACTOR * patience if long else min(patience, pauses.remaining + 1)
            try:
                return await asyncio.wait_for(call(), limit)
            except BudgetFull as full:
                wanted: int | None = full.total
                pause = 0.0
            except Exception as error:  # noqa: BLE001  raised again unless it will pass
                wanted, pause = None, pauses.next_pause(translate_error(url, error, needs), error)
                allowance.release()
                patience *= 2
        if wanted is not None:
            began = time.monotonic()
            await asyncio.wrap_future(allowance.reserve_later(wanted))
            pauses.exclude(time.monotonic() - began)
        else:
            await asyncio.sleep(pause)


class _Backoff:
    """Times between attempts, doubling with jitter or as the store asks, that end at a deadline."""

    def __init__(self, seconds: float | None = None) -> None:
        self._start = time.monotonic()
        self.deadline = self._start + (seconds or current_settings().retry_timeout_s)
        self._count = 0
        self._told = False

    @property
    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def exclude(self, seconds: float) -> None:
        """Leave out time that was spent waiting for other requests of our own."""
        self._start += seconds
        self.deadline += seconds

    def next_pause(self, error: StorageError, cause: Exception) -> float:
        """Seconds to wait after an error; raises it when it will not pass, or not in time."""
        pause = min(BACKOFF_SECONDS * 2**self._count, MAX_BACKOFF_SECONDS)
        pause *= random.uniform(0.5, 1.5)
        pause = max(pause, get_retry_after(cause) or 0.0)
        self._count += 1
        if not isinstance(error, StorageUnavailable) or pause > self.remaining:
            raise error from (cause if cause is not error else None)
        if not self._told and time.monotonic() - self._start > LOG_RETRY_AFTER_SECONDS:
            self._told = True
            print(f"waiting up to {self.remaining:.0f} s for the store: {error}", file=sys.stderr)
        return pause


BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 5.0
LOG_RETRY_AFTER_SECONDS = 10.0
LONG_REQUEST_FACTOR = 20
"""Times as long as others, a call may take that lists many objects or writes a large one."""


def _single_put_options(url: str) -> dict[str, Any]:
    """What keeps s3fs from cutting an object into parts."""
    return {"chunksize": _SINGLE_PUT_BYTES} if get_protocol(url) in S3_PROTOCOLS else {}


@functools.cache
def _build_s3_reader(protocol: str, settings: StorageConfig) -> S3Reader:
    return S3Reader(_build_file_system(protocol, settings))


@functools.cache
def _build_http_reader(settings: StorageConfig) -> http.HttpReader:
    return http.HttpReader(
        settings.max_requests_per_host, settings.user_agent, settings.attempt_timeout_s
    )


@functools.cache
def _build_file_system(protocol: str, settings: StorageConfig, account: str | None = None) -> Any:
    import fsspec

    # a cached listing would hide what other processes have written since
    if protocol in GCS_PROTOCOLS:
        anon = {"token": "anon"} if settings.anon else {}
        return gcs.build_gcs_file_system(requester_pays=settings.requester_pays, **anon)
    if protocol in AZURE_PROTOCOLS:
        return azure.build_azure_file_system(
            account, anon=settings.anon, seconds=settings.attempt_timeout_s
        )
    if protocol in HTTP_PROTOCOLS:
        client = {"headers": {"User-Agent": settings.user_agent}, "requote_redirect_url": False}
        return fsspec.filesystem(
            protocol, use_listings_cache=False, encoded=True, client_kwargs=client
        )
    if protocol not in S3_PROTOCOLS:
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
            "connect_timeout": settings.attempt_timeout_s,
            "read_timeout": settings.attempt_timeout_s,
            "max_pool_connections": 64,
        },
        max_concurrency=1,  # else every read asks for the size first
        **({"profile": settings.profile} if settings.profile else {}),
    )
    fs.retries = 1
    return fs
