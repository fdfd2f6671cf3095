"""Rate limit per API key: a token bucket per key, shared by all replicas.

One `TokenBuckets` in the coordinator keeps the count exact for any number of replicas. Each replica
prefetches tokens into its `LocalAllowance`, so that most requests need no call to the coordinator.
Source: token bucket as in Tanenbaum, Computer Networks, section 5.4.2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

BURST_S = 10.0
"""Capacity of a bucket, in seconds of the key's rate: what an idle key may send at once."""
PREFETCH_S = 0.5
"""Tokens that a replica prefetches, in seconds of the key's rate."""
_ROUNDING = 1e-9


@dataclass
class _Bucket:
    tokens: float
    updated_at: float


class TokenBuckets:
    """Token buckets of all keys; not thread-safe.

    clock: monotonic time in seconds
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(
        self, name: str, per_second: float, needed: int, prefetch: float, held: float = 0.0
    ) -> tuple[float, float]:
        """Take `needed` tokens of a key, and up to `prefetch` more.

        held: tokens taken before for the same request, or prefetched; a bucket is full with them
        Returns the number of tokens taken and 0; or 0 and the seconds until there are enough.
        """
        now = self._clock()
        capacity = max(per_second * BURST_S, 1.0)
        bucket = self._buckets.setdefault(name, _Bucket(capacity, now))
        bucket.tokens = min(capacity, bucket.tokens + (now - bucket.updated_at) * per_second)
        bucket.updated_at = now
        # a request larger than the capacity passes when the bucket is full, and leaves a debt
        minimum = min(needed + held, capacity)
        if bucket.tokens + held < minimum - _ROUNDING:
            return 0.0, (minimum - bucket.tokens) / per_second
        taken = needed + max(0.0, min(prefetch, bucket.tokens - needed))
        bucket.tokens -= taken
        return taken, 0.0


TakeTokens = Callable[[str, float, int, float, float], Awaitable[tuple[float, float]]]


class LocalAllowance:
    """Prefetched tokens of all keys in one replica.

    take: asynchronous `TokenBuckets.take`, in the coordinator
    """

    def __init__(self, take: TakeTokens, clock: Callable[[], float] = time.monotonic) -> None:
        self._take = take
        self._clock = clock
        self._tokens: dict[str, tuple[float, float]] = {}

    async def spend(self, name: str, per_minute: float, images: int, paid: int = 0) -> int:
        """Spend a token per image. Returns 0, or the whole seconds to wait if there are too few.

        paid: tokens that the same request has spent before
        """
        per_second = per_minute / 60
        held = self._get_tokens(name)
        if held < images:
            prefetch = per_second * PREFETCH_S
            taken, wait = await self._take(name, per_second, images, prefetch, held + paid)
            if wait > 0:
                return max(1, math.ceil(wait))
            self._tokens[name] = self._get_tokens(name) + taken, self._clock()
        tokens, taken_at = self._tokens[name]
        self._tokens[name] = tokens - images, taken_at
        return 0

    def _get_tokens(self, name: str) -> float:
        """Tokens of a key; they expire, since many replicas could otherwise hoard them all."""
        tokens, taken_at = self._tokens.get(name, (0.0, 0.0))
        return tokens if self._clock() - taken_at < 2 * PREFETCH_S else 0.0
