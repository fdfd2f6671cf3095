"""Concurrent reads of images whose results come as they complete, for lists from many hosts.

`image_files.read_ahead` delivers in order, so one slow host would delay all others. Here each image
is processed in a thread as soon as it is read.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from imgcls.data import image_files
from imgcls.data.storage.readahead import ByteBudget, ReadAllowance
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import ImageError, StorageError

K = TypeVar("K")
T = TypeVar("T")

_FIRST_MEAN_BYTES = 1_000_000.0
"""Assumed mean size of the files before any is read."""
_MEAN_WEIGHT = 1 / 8
"""Weight of the newest file in the mean size."""
_SIZE_MARGIN = 1.5
"""Assumed ratio of the size of the next files to the mean."""


@dataclass(frozen=True)
class _Failure:
    """An error that ends the reads of a pool."""

    error: BaseException


class ImagePool(Generic[K, T]):
    """Reads images concurrently and processes each; results are taken in the order of completion.

    process:   gets the key of a read and its bytes or its error; runs in as many threads as there
        are cores
    in_flight: maximum number of concurrent reads
    max_bytes: limit of one file; a larger one is a StorageTooLarge

    The files that are read and not processed yet hold at most READ_AHEAD_BYTES or `max_bytes`, and
    the one that is joined from its pieces.
    """

    def __init__(
        self,
        process: Callable[[K, bytes | StorageError | ImageError], T],
        in_flight: int,
        max_bytes: int,
    ) -> None:
        self._process = process
        self._in_flight = in_flight
        self._max_bytes = max_bytes
        # any file fits alone, so that a read which waits for the others is admitted in the end
        self._budget_bytes = max(image_files.READ_AHEAD_BYTES, max_bytes)
        self._budget = ByteBudget(self._budget_bytes)
        self._mean_bytes = _FIRST_MEAN_BYTES
        self._numbers = itertools.count(1)  # 0, the oldest, would not count against the budget
        self._reads: dict[int, Future[bytes]] = {}
        self._finished: queue.SimpleQueue[tuple[int, K, T | _Failure]] = queue.SimpleQueue()
        self._readers = create_thread_pool(in_flight, "fetch")
        self._processors = create_thread_pool(len(os.sched_getaffinity(0)), "process")

    def __enter__(self) -> ImagePool[K, T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for reading in list(self._reads.values()):
            reading.cancel()
        self._budget.close()
        self._readers.shutdown(wait=kind is None, cancel_futures=True)
        self._processors.shutdown(wait=kind is None, cancel_futures=True)

    @property
    def num_pending(self) -> int:
        """Number of reads whose result was not taken yet."""
        return len(self._reads)

    @property
    def is_full(self) -> bool:
        """Whether another read would exceed the limit, or probably the budget.

        A read without room for its bytes ends its request, and makes it again later.
        """
        expected = self._budget_bytes // int(_SIZE_MARGIN * self._mean_bytes + 1)
        return len(self._reads) >= max(1, min(self._in_flight, expected))

    def submit(self, key: K, url: str | None) -> None:
        """Start a read; None, for a row without a path, becomes a StorageMissing."""
        number = next(self._numbers)
        allowance = ReadAllowance(self._max_bytes, self._budget, number)
        reading = image_files.start_image_read(url, self._readers, allowance)
        self._reads[number] = reading
        reading.add_done_callback(lambda done: self._on_read(number, key, done))

    def take(self, timeout_s: float) -> tuple[K, T] | None:
        """The next result; None if there is none within the time.

        Raises StorageCredentials, which concerns all files, and errors of `process`.
        """
        try:
            number, key, result = self._finished.get(timeout=timeout_s)
        except queue.Empty:
            return None
        del self._reads[number]
        if isinstance(result, _Failure):
            raise result.error
        return key, result

    def _on_read(self, number: int, key: K, reading: Future[bytes]) -> None:
        if not reading.cancelled():
            with contextlib.suppress(RuntimeError):  # closed meanwhile, after an error
                self._processors.submit(self._run, number, key, reading)

    def _run(self, number: int, key: K, reading: Future[bytes]) -> None:
        try:
            outcome = image_files.get_outcome(reading)
            if isinstance(outcome, bytes):
                self._mean_bytes += _MEAN_WEIGHT * (len(outcome) - self._mean_bytes)
            result: T | _Failure = self._process(key, outcome)
        except BaseException as error:  # noqa: BLE001  raised again by `take`
            result = _Failure(error)
        self._budget.release(number)
        self._finished.put((number, key, result))
