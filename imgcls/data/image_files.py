"""Image files by path or URL: single ones, and many concurrently in order within a memory budget.

An image is a file on a disk or in a store, see `filesystem`, or a member of a file that contains
many images, see `containers`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from imgcls.data.containers import members
from imgcls.data.storage import filesystem
from imgcls.data.storage.readahead import BudgetFull, ByteBudget, ReadAllowance
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import ImageError, StorageCredentials, StorageError, StorageMissing

MAX_IMAGE_BYTES = 100_000_000
"""Default limit for the size of an image file."""
READ_AHEAD_BYTES = 256_000_000
"""Maximum bytes that one `read_ahead` buffers, in addition to the next file."""


def read_image(url: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """Read an image file of at most `max_bytes`.

    Raises as `read` does, StorageTooLarge for a larger file, StorageError for a path that is no
    regular file, such as a FIFO or a device, and ImageError for a damaged member of a container.
    """
    return _read_limited(url, ReadAllowance(max_bytes))


def get_size(url: str) -> int:
    """Size of an image file in bytes; raises StorageMissing and StorageError."""
    if members.is_member_url(url):
        name = members.parse_member_url(url)
        return members.open_container(name.kind, name.file).get_size(name.member)
    return filesystem.size(url)


def read_ahead(
    urls: Iterable[str | None], in_flight: int = 16, max_bytes: int = MAX_IMAGE_BYTES
) -> Iterator[bytes | StorageError | ImageError]:
    """Read image files concurrently; yields the bytes or the error of each, in order.

    in_flight: number of concurrent reads
    max_bytes: limit of one file; a larger one yields StorageTooLarge

    A damaged member of a container yields an ImageError.

    Memory is bounded by READ_AHEAD_BYTES + 2 * max_bytes: the files that wait, the next one, and
    the one that is joined from its pieces. None, for a row without a path, yields StorageMissing.
    Raises StorageCredentials, which concerns all files.
    """
    waiting: deque[Future[bytes]] = deque()
    budget = ByteBudget(READ_AHEAD_BYTES)

    def delivered(left: int) -> Iterator[bytes | StorageError | ImageError]:
        while len(waiting) > left:
            yield get_outcome(waiting.popleft())
            budget.release_oldest()

    with create_thread_pool(in_flight, "fetch") as pool:
        try:
            for number, url in enumerate(urls):
                waiting.append(
                    start_image_read(url, pool, ReadAllowance(max_bytes, budget, number))
                )
                yield from delivered(in_flight - 1)
            yield from delivered(0)
        finally:
            for future in waiting:
                future.cancel()
            budget.close()


def _read_limited(url: str, allowance: ReadAllowance) -> bytes:
    """Read a file within its allowance, waiting while other reads hold the bytes it needs."""
    while True:
        try:
            if members.is_member_url(url):
                return members.read_member(url, allowance)
            return filesystem.read_within(url, allowance)
        except BudgetFull as full:
            allowance.reserve_later(full.total).result()


def start_image_read(
    url: str | None, pool: ThreadPoolExecutor, allowance: ReadAllowance
) -> Future[bytes]:
    """Start a read: on the store's event loop where it has one, else in a thread."""
    try:
        if url is None:
            raise StorageMissing("the path is null")
        is_member = members.is_member_url(url)
        reading = None if is_member else filesystem.start_read(url, allowance)
    except StorageError as error:
        failed: Future[bytes] = Future()
        failed.set_exception(error)
        return failed
    return pool.submit(_read_limited, url, allowance) if reading is None else reading


def get_outcome(reading: Future[bytes]) -> bytes | StorageError | ImageError:
    """The bytes of a finished read, or its error; raises StorageCredentials."""
    try:
        return reading.result()
    except StorageCredentials:
        raise
    except (StorageError, ImageError) as error:
        return error
