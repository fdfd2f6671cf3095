"""Object stores and web servers: S3, GCS, Azure, HTTP, and every other protocol of fsspec.

Reads, writes and creates whole objects. An object arrives complete and as it was stored, or not at
all, and no more than the allowed bytes of it are read. Local files are handled by `filesystem`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import io
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from imgcls.data import azure, gcs, http
from imgcls.data.readahead import UNLIMITED, ReadAllowance
from imgcls.data.retries import retry, retry_async
from imgcls.data.s3_reader import S3Reader
from imgcls.data.storage_errors import (
    GET,
    PUT,
    describe_error,
    get_error_code,
    shorten_url,
    too_large_error,
    translate_error,
)
from imgcls.data.storage_settings import StorageConfig, bind_settings, current_settings
from imgcls.errors import StorageError, StorageMissing, StorageUnavailable

T = TypeVar("T")

_READ_BUFFER_BYTES = 4 << 20
_SINGLE_PUT_BYTES = 1 << 30
S3_PROTOCOLS = ("s3", "s3a")
GCS_PROTOCOLS = ("gs", "gcs")
AZURE_PROTOCOLS = ("az", "abfs", "abfss")
HTTP_PROTOCOLS = ("http", "https")
BUCKET_PROTOCOLS = (*S3_PROTOCOLS, *GCS_PROTOCOLS, *AZURE_PROTOCOLS)
"""Stores of objects in buckets or containers, which can create an object atomically."""


def resolve_store(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in its syntax.

    Raises StorageError when there is no driver for the protocol.
    """
    protocol = get_protocol(url)
    try:
        account = azure.get_account(url) if protocol in AZURE_PROTOCOLS else None
        fs = _build_file_system(protocol, current_settings(), account)
        return fs, fs._strip_protocol(http.encode_url(url) if protocol in HTTP_PROTOCOLS else url)
    except Exception as error:  # of any kind, from a driver that is not installed or configured
        refused = translate_error(url, error)
        if type(refused) is not StorageError:
            raise refused from error
        raise StorageError(
            f"{shorten_url(url)}: no file system for {protocol}:// ({describe_error(error)})"
        ) from error


def get_protocol(url: str) -> str:
    return url.partition(":")[0]


def build_url(url: str, path: str) -> str:
    """The URL of a path from a listing of the file system of `url`, with the protocol of `url`."""
    protocol = get_protocol(url)
    if protocol not in BUCKET_PROTOCOLS:
        return f"{protocol}://{path}" if "://" not in path else path
    bucket = url.partition("://")[2].partition("/")[0]
    return f"{protocol}://{bucket}/{path.partition('/')[2]}"


def call_store(
    url: str, method: str, *arguments: Any, needs: str, long: bool = False, **more: Any
) -> Any:
    """Call a method of the URL's file system, with retries; its path is the first argument.

    needs: permission of the request, see `storage_errors`
    long:  the request may take long, as listing a million objects does; a short one is made again
        when the response arrives too slowly
    """
    fs, path = resolve_store(url)
    if not fs.async_impl:
        return retry(url, lambda: getattr(fs, method)(path, *arguments, **more), needs)
    call = functools.partial(getattr(fs, f"_{method}"), path, *arguments, **more)
    request = retry_async(url, call, needs, long=long)
    return asyncio.run_coroutine_threadsafe(request, fs.loop).result()


def get_object(url: str, allowance: ReadAllowance = UNLIMITED) -> bytes:
    """Read a whole object, within an allowance.

    Raises StorageTooLarge, and BudgetFull where other reads hold the bytes it needs.
    """
    future = start_get_object(url, allowance)
    if future is not None:
        return future.result()
    if allowance.max_bytes is None:
        return bytes(call_store(url, "cat_file", needs=GET))
    fs, path = resolve_store(url)
    return retry(url, lambda: _read_by_open(url, fs, path, allowance), GET)


def start_get_object(url: str, allowance: ReadAllowance = UNLIMITED) -> Future[bytes] | None:
    """Start reading an object; None for stores whose driver is synchronous."""
    if get_protocol(url) not in (*BUCKET_PROTOCOLS, *HTTP_PROTOCOLS):
        return None
    fs, path = resolve_store(url)
    return asyncio.run_coroutine_threadsafe(_get_object_async(url, fs, path, allowance), fs.loop)


async def _get_object_async(url: str, fs: Any, path: str, allowance: ReadAllowance) -> bytes:
    protocol, host = get_protocol(url), None
    read: Callable[[str], Awaitable[bytes]]
    if protocol in S3_PROTOCOLS:
        suspect: set[str] = set()
        s3 = _build_s3_reader(protocol, current_settings())
        read = lambda path: s3.read(path, suspect, allowance)  # noqa: E731
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
        # on a disk ./ is the same folder; to a store it is part of the name
        plain = "/".join(part for part in path.split("/") if part != ".")
        if protocol not in BUCKET_PROTOCOLS or plain == path:
            raise
        return await retry_async(url, lambda: read(plain), GET, allowance=allowance)


def _read_by_open(url: str, fs: Any, path: str, allowance: ReadAllowance) -> bytes:
    """Read an object through the generic fsspec interface."""
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
    """Write an object by one request, up to 1 GiB."""
    call_store(url, "pipe_file", data, needs=PUT, long=True, **_single_put_options(url))


def create_object(url: str, data: bytes) -> bool:
    """Write an object only if there is none; returns whether this call wrote it.

    Raises StorageError for a store that cannot create atomically.
    """
    protocol = get_protocol(url)
    if protocol not in BUCKET_PROTOCOLS:
        raise StorageError(
            f"{shorten_url(url)}: {protocol}:// has no atomic create-if-absent, which the lock "
            "between two drivers needs; use an output on S3, GCS, Azure or a disk"
        )
    try:
        call_store(url, "pipe_file", data, needs=PUT, mode="create", **_single_put_options(url))
        return True
    except StorageError as error:
        exists = isinstance(error.__cause__, FileExistsError)
        if not exists and get_error_code(error.__cause__) not in ("PreconditionFailed", "412"):
            raise
    # the response to our own request may have been lost
    with contextlib.suppress(StorageMissing):
        return get_object(url) == data
    return False


@contextlib.contextmanager
def open_upload(url: str) -> Iterator[IO[bytes]]:
    """A stream that is written to an object, by one request, on a clean exit."""
    resolve_store(url)  # to fail before the data is produced
    with tempfile.NamedTemporaryFile(prefix="imgcls-upload-") as stream:
        yield stream
        stream.flush()
        _upload(url, stream.name)


def _upload(url: str, file: str) -> None:
    fs, path = resolve_store(url)
    more = _single_put_options(url)
    retry(url, lambda: fs.put_file(file, path, **more), PUT)


def open_object(url: str) -> IO[bytes]:
    """A seekable stream over an object, read by byte ranges with retries."""
    size = int(call_store(url, "info", needs=GET)["size"])
    return io.BufferedReader(_RangeReader(url, size), _READ_BUFFER_BYTES)


@dataclass(frozen=True)
class FileInfo:
    """A file in a listing: URL, bytes, modification time in UTC, version; None where unknown.

    etag: the ETag of S3 and Azure, or the generation of GCS; it changes with the content
    """

    path: str
    size: int | None
    mtime: datetime.datetime | None
    etag: str | None


@dataclass(frozen=True)
class ListingPage:
    """One page of a listing: URLs of folders, and files."""

    folders: list[str]
    files: list[FileInfo]


class _RangeReader(io.RawIOBase):
    """An object of `size` bytes, read by byte ranges."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size = url, size
        self._position = 0
        # Arrow reads from threads of its own, in which no settings apply
        self._read_range = bind_settings(self._request_range)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._size, self._position + len(buffer))
        if end <= self._position:
            return 0
        data = self._read_range(self._position, end)
        buffer[: len(data)] = data
        self._position = end
        return len(data)

    def readall(self) -> bytes:
        """The rest, by one request; RawIOBase would make one per 8 KB."""
        start, self._position = self._position, self._size
        return self._read_range(start, self._size) if start < self._size else b""

    def _request_range(self, start: int, end: int) -> bytes:
        def read() -> bytes:
            data: bytes = call_store(self._url, "cat_file", needs=GET, start=start, end=end)
            if len(data) != end - start:
                raise StorageUnavailable(
                    f"{shorten_url(self._url)}: received {len(data):,} of {end - start:,} bytes"
                )
            return data

        return retry(self._url, read, GET)


def _single_put_options(url: str) -> dict[str, Any]:
    """Options that keep s3fs from using a multipart upload."""
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

    # a cached listing would hide files that other processes have written since
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
            "retries": {"total_max_attempts": 1},  # see `retries`
            "connect_timeout": settings.attempt_timeout_s,
            "read_timeout": settings.attempt_timeout_s,
            "max_pool_connections": 64,
        },
        max_concurrency=1,  # otherwise every read requests the size first
        **({"profile": settings.profile} if settings.profile else {}),
    )
    fs.retries = 1
    return fs
