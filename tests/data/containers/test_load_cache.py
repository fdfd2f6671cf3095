from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from imgcls.data.containers.load_cache import LoadCache


def test_threads_that_ask_for_one_item_share_one_load() -> None:
    cache: LoadCache[bytes] = LoadCache(100, len)
    loads: list[int] = []
    together = threading.Barrier(4)

    def load() -> bytes:
        loads.append(1)
        return b"item"

    def ask() -> bytes:
        together.wait()
        return cache.get("key", load)

    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(ask) for _ in range(4)]]
    assert found == [b"item"] * 4
    assert len(loads) == 1


def test_the_item_used_least_recently_is_dropped_first() -> None:
    cache: LoadCache[bytes] = LoadCache(2, len)
    loads: list[str] = []

    def get(key: str) -> None:
        def load() -> bytes:
            loads.append(key)
            return b"x"

        cache.get(key, load)

    for key in "abacb":
        get(key)
    assert loads == ["a", "b", "c", "b"]


def test_an_item_over_the_limit_is_kept_alone() -> None:
    cache: LoadCache[bytes] = LoadCache(2, len)
    assert cache.get("small", lambda: b"x") == b"x"
    assert cache.get("large", lambda: b"12345") == b"12345"
    assert cache.get("large", lambda: b"loaded again") == b"12345"
    assert cache.get("small", lambda: b"y") == b"y"


def test_an_error_is_raised_and_not_kept() -> None:
    cache: LoadCache[bytes] = LoadCache(100, len)

    def fail() -> bytes:
        raise OSError("no answer")

    with pytest.raises(OSError, match="no answer"):
        cache.get("key", fail)
    assert cache.get("key", lambda: b"item") == b"item"


def test_an_item_that_is_discarded_is_loaded_again() -> None:
    cache: LoadCache[bytes] = LoadCache(3, len)
    assert cache.get("key", lambda: b"one") == b"one"
    cache.discard("key")
    cache.discard("none")
    assert cache.get("key", lambda: b"two") == b"two"
    assert cache.get("other", lambda: b"") == b""
    assert cache.get("key", lambda: b"three") == b"two"
