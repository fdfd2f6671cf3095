"""How much a key may send: a token bucket per key, dealt out to replicas ahead of need.

One `Purse` for the whole service keeps the count exact however many replicas there are; each has a
`Pocket` of tokens that it took from the purse, so that most requests cost no message.
Source: token bucket as in Tanenbaum, Computer Networks, section 5.4.2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

BURST_SECONDS = 10.0
"""A key that was silent for so long may send so many seconds' worth at once."""
PREFETCH_SECONDS = 0.5
"""What a pocket takes at a time."""


@dataclass
class _Bucket:
    tokens: float
    updated_at: float


class TokenBuckets:
    """Tokens of all keys; not thread-safe.

    clock: seconds, ever growing
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, name: str, per_second: float, need: int, ahead: float) -> tuple[float, float]:
        """Take `need` tokens for a key, and up to `ahead` more.

        Returns what was taken, and 0 seconds; or 0 and the seconds until there will be enough.
        """
        now = self._clock()
        most = max(per_second * BURST_SECONDS, 1.0)
        bucket = self._buckets.setdefault(name, _Bucket(most, now))
        bucket.tokens = min(most, bucket.tokens + (now - bucket.updated_at) * per_second)
        bucket.updated_at = now
        # more at once than a bucket ever holds goes when it is full, and is owed
        if bucket.tokens < min(need, most):
            return 0.0, (min(need, most) - bucket.tokens) / per_second
        taken = need + max(0.0, min(ahead, bucket.tokens - need))
        bucket.tokens -= taken
        return taken, 0.0


TakeTokens = Callable[[str, float, int, float], Awaitable[tuple[float, float]]]


class LocalAllowance:
    """One replica's tokens of all keys.

    take: `Purse.take`, from wherever the purse is
    """

    def __init__(self, take: TakeTokens, clock: Callable[[], float] = time.monotonic) -> None:
        self._take = take
        self._clock = clock
        self._tokens: dict[str, tuple[float, float]] = {}

    async def spend(self, name: str, per_minute: float, images: int) -> int:
        """Pay for images; 0 when they are paid for, else the whole seconds to wait before."""
        per_second = per_minute / 60
        if self._get_tokens(name) < images:
            ahead = per_second * PREFETCH_SECONDS
            taken, wait = await self._take(name, per_second, images, ahead)
            if wait > 0:
                return max(1, math.ceil(wait))
            self._tokens[name] = self._get_tokens(name) + taken, self._clock()
        tokens, when = self._tokens[name]
        self._tokens[name] = tokens - images, when
        return 0

    def _get_tokens(self, name: str) -> float:
        """Tokens not spent in time are forfeited: a key of many replicas would keep them all."""
        tokens, when = self._tokens.get(name, (0.0, 0.0))
        return tokens if self._clock() - when < 2 * PREFETCH_SECONDS else 0.0
