"""Limit of the requests to one host: how many at a time, and none during a Retry-After."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from imgcls.data.storage.error_details import get_error_code, get_retry_after, shorten_url
from imgcls.errors import StorageThrottled

_RETRY_LATER_CODES = ("429", "503")


class HostLimiter:
    """Limits the requests to one host: how many at a time, and none during a Retry-After."""

    def __init__(self, name: str, requests: int) -> None:
        self._name = name
        self._slots = asyncio.Semaphore(requests)
        self._not_before = 0.0
        self._retry_after = 0.0

    def note_retry_after(self, error: BaseException) -> None:
        """Store until when a host wants no requests (Retry-After)."""
        seconds = get_retry_after(error) if get_error_code(error) in _RETRY_LATER_CODES else None
        if seconds is not None:
            self._not_before = max(self._not_before, time.monotonic() + seconds)
            self._retry_after = seconds

    @contextlib.asynccontextmanager
    async def acquire_slot(self, url: str, deadline: float) -> AsyncIterator[float]:
        """Wait for a slot and hold it; yields the seconds spent in the queue.

        deadline: of the request, by time.monotonic, not counting those seconds
        Raises StorageThrottled, without a request, when the host asks for a longer pause.
        """
        began = time.monotonic()
        async with self._slots:
            queued = time.monotonic() - began
            while (pause := self._not_before - time.monotonic()) > 0:
                if time.monotonic() + pause > deadline + queued:
                    raise StorageThrottled(
                        f"{shorten_url(url)}: {self._name} asks for no request for "
                        f"{self._retry_after:.0f} s "
                        "(Retry-After), which is longer than the retry time; rerun with "
                        "--retry-errors later, or raise --storage.retry-timeout-s"
                    )
                await asyncio.sleep(pause)
            yield queued
