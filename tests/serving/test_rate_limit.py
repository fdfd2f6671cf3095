"""Rates per key, exact over many replicas."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from imgcls.serving.rate_limit import BURST_SECONDS, PREFETCH_SECONDS, LocalAllowance, TokenBuckets


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_goes_and_then_the_rate_holds() -> None:
    clock = Clock()
    purse = TokenBuckets(clock)
    assert purse.take("a", 2.0, 20, 0.0) == (20, 0.0)
    assert purse.take("a", 2.0, 1, 0.0) == (0.0, 0.5)
    clock.now += 0.5
    assert purse.take("a", 2.0, 1, 0.0) == (1, 0.0)
    assert purse.take("b", 2.0, 1, 0.0) == (1, 0.0)


def test_a_request_larger_than_a_burst_goes_when_the_bucket_is_full_and_is_owed() -> None:
    clock = Clock()
    purse = TokenBuckets(clock)
    assert purse.take("a", 0.1, 5, 0.0) == (5, 0.0)
    taken, wait = purse.take("a", 0.1, 1, 0.0)
    assert (taken, round(wait)) == (0.0, 50)
    clock.now += 50
    assert purse.take("a", 0.1, 1, 0.0)[0] == 1


@given(
    st.floats(1.0, 2000.0),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.floats(0.0, 2.0)), max_size=80),
)
def test_replicas_together_never_let_more_through_than_the_rate(
    per_minute: float, requests: list[tuple[int, int, float]]
) -> None:
    clock = Clock()
    purse = TokenBuckets(clock)

    async def take(name: str, per_second: float, need: int, ahead: float) -> tuple[float, float]:
        return purse.take(name, per_second, need, ahead)

    pockets = [LocalAllowance(take, clock) for _ in range(4)]
    burst = max(per_minute / 60 * BURST_SECONDS, 1.0)
    let_through, largest = 0, 0
    for replica, images, seconds in requests:
        clock.now += seconds
        if asyncio.run(pockets[replica].spend("key", per_minute, images)) == 0:
            let_through += images
            largest = max(largest, images)
            # what is above a burst is owed, so it can go too far once
            assert let_through <= burst + clock.now * per_minute / 60 + largest + 1e-6


def test_most_requests_cost_no_message() -> None:
    clock = Clock()
    purse = TokenBuckets(clock)
    messages = 0

    async def take(name: str, per_second: float, need: int, ahead: float) -> tuple[float, float]:
        nonlocal messages
        messages += 1
        return purse.take(name, per_second, need, ahead)

    async def ask() -> list[int]:
        pocket = LocalAllowance(take, clock)
        waits = []
        for _ in range(1000):
            clock.now += 0.01
            waits.append(await pocket.spend("key", 6000, 1))
        return waits

    assert set(asyncio.run(ask())) == {0}
    assert messages <= 1000 * 0.01 / PREFETCH_SECONDS + 1


def test_who_must_wait_is_told_how_long() -> None:
    clock = Clock()
    purse = TokenBuckets(clock)

    async def take(name: str, per_second: float, need: int, ahead: float) -> tuple[float, float]:
        return purse.take(name, per_second, need, ahead)

    async def ask() -> None:
        pocket = LocalAllowance(take, clock)
        while await pocket.spend("key", 60, 1) == 0:
            pass
        wait = await pocket.spend("key", 60, 5)
        assert 4 <= wait <= 5
        clock.now += wait
        assert await pocket.spend("key", 60, 5) == 0

    asyncio.run(ask())
