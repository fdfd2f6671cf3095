"""Object stores and web servers: S3, GCS, Azure, HTTP, and every other protocol of fsspec.

Reads, writes, creates and lists whole objects. An object arrives complete and as it was stored, or
not at all, and no more than the allowed bytes of it are read. The differences between the stores
are in their adapters, see `stores`. Local files are handled by `filesystem`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import itertools
import tempfile
from collections import deque
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from typing import IO, Any, TypeVar

from imgcls.data.storage.error_details import describe_error, get_error_code, shorten_url
from imgcls.data.storage.readahead import UNLIMITED, ReadAllowance, too_large_error
from imgcls.data.storage.registry import STORES, find_store, get_protocol
from imgcls.data.storage.retries import retry, retry_async
from imgcls.data.storage.storage_errors import translate_error
from imgcls.data.storage.storage_settings import (
    StorageConfig,
    bind_settings,
    create_thread_pool,
    current_settings,
)
from imgcls.data.storage.store import (
    GET,
    LIST,
    PUT,
    BucketStore,
    FileInfo,
    ListingPage,
    ReadObject,
    Store,
)
from imgcls.errors import StorageError, StorageMissing, StorageUnavailable

T = TypeVar("T")

_READ_BUFFER_BYTES = 4 << 20
_CONCURRENT_RANGES = 8


def resolve_store(url: str) -> tuple[Store, str]:
    """The store of a URL under the current settings, and the path in the syntax of its driver.

    Raises StorageError when there is no driver for the protocol.
    """
    protocol = get_protocol(url)
    try:
        store = build_store(protocol, current_settings(), find_store(url).get_account(url))
        return store, store.get_path(url)
    except Exception as error:  # of any kind, from a driver that is not installed or configured
        refused = translate_error(url, error)
        if type(refused) is not StorageError:
            raise refused from error
        raise StorageError(
            f"{shorten_url(url)}: no file system for {protocol}:// ({describe_error(error)})"
        ) from error


@functools.cache
def build_store(protocol: str, settings: StorageConfig, account: str | None) -> Store:
    """The store of a protocol under some settings, the same one at every call."""
    return find_store(f"{protocol}://")(protocol, settings, account)


def build_url(url: str, path: str) -> str:
    """The URL of a path from a listing of the file system of `url`, with the protocol of `url`."""
    return find_store(url).build_url(url, path)


def call_store(
    url: str, method: str, *arguments: Any, needs: str, long: bool = False, **more: Any
) -> Any:
    """Call a method of the URL's file system, with retries; its path is the first argument.

    needs: permission of the request, see `store`
    long:  the request may take long, as listing a million objects does; a short one is made again
        when the response arrives too slowly
    """
    store, path = resolve_store(url)
    fs = store.file_system
    if not fs.async_impl:
        return retry(url, lambda: getattr(fs, method)(path, *arguments, **more), needs)
    call = functools.partial(getattr(fs, f"_{method}"), path, *arguments, **more)
    return _start_request(store, retry_async(url, call, needs, long=long)).result()


def _start_request(store: Store, request: Coroutine[Any, Any, T]) -> Future[T]:
    """Start a request on the event loop of the store's file system."""
    return asyncio.run_coroutine_threadsafe(_run_request(request), store.file_system.loop)


async def _run_request(request: Coroutine[Any, Any, T]) -> T:
    """The result of a request, whose error asyncio does not print when the request is canceled.

    A request that fails after its future was canceled has an error that is read nowhere.
    """
    task = asyncio.current_task()
    assert task is not None
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await request


def get_object(url: str, allowance: ReadAllowance = UNLIMITED) -> bytes:
    """Read a whole object, within an allowance.

    Raises StorageTooLarge, and BudgetFull where other reads hold the bytes it needs.
    """
    future = start_get_object(url, allowance)
    if future is not None:
        return future.result()
    if allowance.max_bytes is None:
        return bytes(call_store(url, "cat_file", needs=GET))
    store, path = resolve_store(url)
    return retry(url, lambda: _read_by_open(url, store.file_system, path, allowance), GET)


def start_get_object(url: str, allowance: ReadAllowance = UNLIMITED) -> Future[bytes] | None:
    """Start reading an object; None for stores whose driver is synchronous."""
    store, path = resolve_store(url)
    read = store.start_read(url, allowance)
    if read is None:
        return None
    return _start_request(store, _get_object_async(url, store, path, read, allowance))


async def _get_object_async(
    url: str, store: Store, path: str, read: ReadObject, allowance: ReadAllowance
) -> bytes:
    read_cached = store.start_cached_read(url, allowance)
    if read_cached is not None:
        cached = await retry_async(url, read_cached, GET, allowance=allowance)
        if cached is not None:
            return cached
    host = store.get_host_limiter(url)
    try:
        return await retry_async(url, lambda: read(path), GET, host=host, allowance=allowance)
    except StorageMissing:
        # on a disk ./ is the same folder; to a store it is part of the name
        plain = "/".join(part for part in path.split("/") if part != ".")
        if not isinstance(store, BucketStore) or plain == path:
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
    call_store(url, "pipe_file", data, needs=PUT, long=True, **find_store(url).put_options)


def create_object(url: str, data: bytes) -> bool:
    """Write an object only if there is none; returns whether this call wrote it.

    Raises StorageError for a store that cannot create atomically.
    """
    store = find_store(url)
    if not store.creates_atomically:
        kinds = dict.fromkeys(STORES.values())
        others = ", ".join(kind.title for kind in kinds if issubclass(kind, BucketStore))
        raise StorageError(
            f"{shorten_url(url)}: {get_protocol(url)}:// has no atomic create-if-absent, which the "
            f"lock between two drivers needs; use an output on {others} or a disk"
        )
    try:
        call_store(url, "pipe_file", data, needs=PUT, mode="create", **store.put_options)
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
    store, path = resolve_store(url)
    retry(url, lambda: store.file_system.put_file(file, path, **store.put_options), PUT)


def get_object_size(url: str) -> int:
    """Size of an object in bytes; raises StorageError where the server does not name it."""
    return require_size(url, call_store(url, "info", needs=GET))


def require_size(url: str, info: Mapping[str, Any]) -> int:
    """The size in the driver's information about an object; raises as `get_object_size`.

    Web servers that compress or generate a file send no Content-Length.
    """
    if info.get("size") is None:
        raise StorageError(
            f"{shorten_url(url)}: the server does not name its size, which is needed to read parts "
            "of it; download the file first"
        )
    return int(info["size"])


def open_object(url: str) -> IO[bytes]:
    """A seekable stream over an object, read by byte ranges with retries, or whole without size."""
    size = _find_size(url)
    if size is None:
        return io.BytesIO(get_object(url))
    return io.BufferedReader(_RangeReader(url, size), _READ_BUFFER_BYTES)


def _find_size(url: str) -> int | None:
    size = call_store(url, "info", needs=GET).get("size")
    return None if size is None else int(size)


def iter_object_blocks(url: str, block_bytes: int) -> Iterator[bytes]:
    """The bytes of an object in order, by concurrent reads of ranges of `block_bytes`.

    An object without a known size, or from a server that ignores ranges, is read whole.
    """
    size = _find_size(url)
    if size is None:
        whole = get_object(url)
    elif size == 0:
        return
    else:  # alone, because a server that ignores ranges would send all for each range
        whole = _request_range_or_object(url, 0, min(size, block_bytes), size=size)
        if len(whole) < size:
            yield whole
            yield from _iter_ranges(url, range(block_bytes, size, block_bytes), size)
            return
    for start in range(0, len(whole), block_bytes):
        yield whole[start : start + block_bytes]


def _iter_ranges(url: str, starts: range, size: int) -> Iterator[bytes]:
    """Ranges of an object in order, each up to the start of the next, read concurrently."""
    remaining = iter(starts)
    reading: deque[Future[bytes]] = deque()
    with create_thread_pool(_CONCURRENT_RANGES, "range") as pool:
        try:
            while True:
                for start in itertools.islice(remaining, _CONCURRENT_RANGES - len(reading)):
                    end = min(size, start + starts.step)
                    reading.append(pool.submit(get_range, url, start, end))
                if not reading:
                    return
                yield reading.popleft().result()
        finally:
            for future in reading:
                future.cancel()


def iter_store_pages(url: str, *, deep: bool) -> Iterator[ListingPage]:
    """List a folder page by page: its files and folders, or with `deep` all files below it.

    Raises StorageBucketMissing when there is no such bucket.
    """
    store, path = resolve_store(url)
    list_page = store.start_listing(url, path, deep=deep)
    if list_page is None:
        yield _list_by_driver(url, deep=deep)
        return
    token = None
    while True:
        request = retry_async(url, functools.partial(list_page, token), LIST)
        page, token = _start_request(store, request).result()
        yield page
        if token is None:
            return


def _list_by_driver(url: str, *, deep: bool) -> ListingPage:
    """List through the generic fsspec interface, in one page."""
    found = call_store(url, "find" if deep else "ls", needs=LIST, long=True, detail=True)
    infos = list(found.values()) if isinstance(found, dict) else found
    return ListingPage(
        [build_url(url, each["name"].rstrip("/")) for each in infos if each["type"] == "directory"],
        [
            FileInfo(build_url(url, each["name"]), each.get("size"), None, None)
            for each in infos
            if each["type"] == "file"
        ],
    )


class _RangeReader(io.RawIOBase):
    """An object of `size` bytes, read by byte ranges."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size = url, size
        self._position = 0
        self._object: bytes | None = None  # from a server that ignores ranges
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
        if self._object is None:
            data = _request_range_or_object(self._url, start, end, size=self._size)
            if len(data) == end - start:
                return data
            self._object = data
        return self._object[start:end]


def get_range(url: str, start: int, end: int, version: str | None = None) -> bytes:
    """The bytes from `start` up to `end` of an object, by one request.

    version: of the object, where it is known
    Raises StorageChanged for an object of another version, in stores that compare it, and
    StorageError where the server ignores ranges.
    """
    return _request_range_or_object(url, start, end, version)


def _request_range_or_object(
    url: str, start: int, end: int, version: str | None = None, size: int | None = None
) -> bytes:
    """The bytes of a range, or all `size` bytes from a server that ignores ranges."""

    def read() -> bytes:
        data = _request_range(url, start, end, version)
        if len(data) > end - start and len(data) != size:
            raise StorageError(
                f"{shorten_url(url)}: the server ignores ranges, which are needed to read parts of "
                "it; download the file first"
            )
        if len(data) < end - start:
            raise StorageUnavailable(
                f"{shorten_url(url)}: received {len(data):,} of {end - start:,} bytes"
            )
        return data

    return retry(url, read, GET)


def _request_range(url: str, start: int, end: int, version: str | None) -> bytes:
    store, path = resolve_store(url)
    if not store.file_system.async_impl:
        data: bytes = call_store(url, "cat_file", needs=GET, start=start, end=end)
        return data
    call = functools.partial(store.read_range, path, start, end, version)
    request = retry_async(url, call, GET, host=store.get_host_limiter(url))
    return _start_request(store, request).result()
