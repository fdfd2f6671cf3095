"""A cache of items loaded from files, shared by threads: each is loaded once, few are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class LoadCache(Generic[T]):
    """Items by key, up to a total size; the item used least recently is dropped first.

    max_size: limit of the sum of the sizes of the items that are kept, without those in use
    get_size: size of an item
    """

    def __init__(self, max_size: int, get_size: Callable[[T], int]) -> None:
        self._max_size = max_size
        self._get_size = get_size
        self._items: OrderedDict[Hashable, Future[T]] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        """The item of a key, loaded by the first caller while the others wait.

        An error of `load` is raised for all callers that wait, and is not kept.
        """
        with self._lock:
            future = self._items.get(key)
            if future is not None:
                self._items.move_to_end(key)
            else:
                mine = self._items[key] = Future()
        if future is not None:
            return future.result()
        try:
            item = load()
        except BaseException as error:
            with self._lock:
                del self._items[key]
            mine.set_exception(error)
            raise
        mine.set_result(item)
        with self._lock:
            self._total += self._get_size(item)
            self._drop_oldest(key)
        return item

    def discard(self, key: Hashable) -> None:
        """Drop the item of a key; one that is being loaded stays."""
        with self._lock:
            future = self._items.get(key)
            if future is not None and future.done():
                del self._items[key]
                self._total -= self._get_size(future.result())

    def _drop_oldest(self, newest: Hashable) -> None:
        for key in list(self._items):
            if self._total <= self._max_size:
                return
            if key != newest and self._items[key].done():
                self._total -= self._get_size(self._items.pop(key).result())
