"""Retries of requests to stores: exponential backoff with jitter, until a deadline.

Transient errors are retried; all others are raised at once, as the StorageError that explains them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from imgcls.data.storage.error_details import get_retry_after
from imgcls.data.storage.host_limiter import HostLimiter
from imgcls.data.storage.readahead import UNLIMITED, BudgetFull, ReadAllowance
from imgcls.data.storage.storage_errors import translate_error
from imgcls.data.storage.storage_settings import current_settings
from imgcls.errors import StorageError, StorageUnavailable

T = TypeVar("T")

logger = logging.getLogger(__name__)

BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
LOG_RETRY_AFTER_S = 10.0
LONG_REQUEST_FACTOR = 20
"""Timeout of a request that lists many objects or writes a large one, as a multiple of others."""


def retry(url: str, call: Callable[[], T], needs: str = "", seconds: float | None = None) -> T:
    """Call a function; retry after transient errors until the deadline.

    needs:   permission of the request, named in the message where it is refused
    seconds: until the deadline, in place of the settings' `retry_timeout_s`
    """
    backoff = _Backoff(seconds)
    while True:
        try:
            return call()
        except BudgetFull:
            raise
        except Exception as error:  # noqa: BLE001  raised again unless it is transient
            time.sleep(backoff.next_pause(translate_error(url, error, needs), error))


async def retry_async(
    url: str,
    call: Callable[[], Awaitable[T]],
    needs: str,
    *,
    long: bool = False,
    host: HostLimiter | None = None,
    allowance: ReadAllowance = UNLIMITED,
) -> T:
    """As `retry`, with a timeout for each attempt, which doubles with every failure.

    long:      the request may take long (`LONG_REQUEST_FACTOR`)
    host:      a slot of it is held during each attempt; waiting for it counts as no retry time
    allowance: of the read; waiting for its bytes counts as no retry time
    """
    backoff = _Backoff()
    timeout = current_settings().attempt_timeout_s
    while True:
        slot = (
            contextlib.nullcontext(0.0)
            if host is None
            else host.acquire_slot(url, backoff.deadline)
        )
        async with slot as queued:
            backoff.exclude(queued)
            limit = LONG_REQUEST_FACTOR * timeout if long else min(timeout, backoff.remaining + 1)
            try:
                return await asyncio.wait_for(call(), limit)
            except BudgetFull as full:
                wanted: int | None = full.total
                pause = 0.0
            except Exception as error:  # noqa: BLE001  raised again unless it is transient
                is_cut = limit < timeout and isinstance(error, TimeoutError)
                found = translate_error(url, error, needs)
                wanted, pause = None, backoff.next_pause(found, error, is_cut=is_cut)
                allowance.release()
                timeout *= 2
        if wanted is not None:
            began = time.monotonic()
            await asyncio.wrap_future(allowance.reserve_later(wanted))
            backoff.exclude(time.monotonic() - began)
        else:
            await asyncio.sleep(pause)


class _Backoff:
    """Pauses between attempts: doubled each time, with jitter, or as long as the store asks."""

    def __init__(self, seconds: float | None = None) -> None:
        self._start = time.monotonic()
        self.deadline = self._start + (seconds or current_settings().retry_timeout_s)
        self._count = 0
        self._is_logged = False
        self._last: StorageError | None = None

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def exclude(self, seconds: float) -> None:
        """Do not count time that was spent waiting for other requests of this process."""
        self._start += seconds
        self.deadline += seconds

    def next_pause(self, error: StorageError, cause: Exception, *, is_cut: bool = False) -> float:
        """Seconds to wait after an error; raises it when it is permanent or the time is over.

        is_cut: the deadline ended the attempt, so that the error before it is the one to know
        """
        pause: float = min(BACKOFF_S * 2**self._count, MAX_BACKOFF_S)
        pause *= random.uniform(0.5, 1.5)
        pause = max(pause, get_retry_after(cause) or 0.0)
        self._count += 1
        if not isinstance(error, StorageUnavailable) or pause > self.remaining:
            if is_cut and self._last is not None:
                error = self._last
            raise error from (cause if cause is not error else None)
        self._last = error
        if not self._is_logged and time.monotonic() - self._start > LOG_RETRY_AFTER_S:
            self._is_logged = True
            logger.warning("retrying for up to %.0f s: %s", self.remaining, error)
        return pause
