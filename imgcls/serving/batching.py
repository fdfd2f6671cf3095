"""Forward passes over whatever is waiting: alone when nobody else is, in full batches under load.

A batch is closed at the moment that the network is free for it, and never before: so nobody waits
for company, and nobody goes alone while others wait. (`serve.batch` closes one when its time is up,
free or not: of 64 clients it made batches of 1.1 images, and threw half of the speed away.)
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class DynamicBatcher(Generic[Item, Result]):
    """Runs a function over items that come one by one, in a thread of its own.

    run:  of at most `size` items at a time; its results in the same order
    size: may be changed at any time
    """

    def __init__(self, run: Callable[[Sequence[Item]], Sequence[Result]], size: int) -> None:
        self.size = size
        self._run_batch = run
        self._queue: queue.SimpleQueue[tuple[Item, asyncio.Future[Result]]] = queue.SimpleQueue()
        threading.Thread(target=self._run_loop, name="classify", daemon=True).start()

    def submit(self, item: Item, future: asyncio.Future[Result]) -> None:
        """Have an item done; from any thread. The future gets its result, in its own loop."""
        self._queue.put((item, future))

    def _run_loop(self) -> None:
        while True:
            batch = [self._queue.get()]
            while len(batch) < self.size:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            # who has hung up needs no answer
            batch = [(item, future) for item, future in batch if not future.cancelled()]
            if not batch:
                continue
            futures = [future for _, future in batch]
            loop = futures[0].get_loop()
            try:
                results = self._run_batch([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001  it is raised again where it is awaited
                loop.call_soon_threadsafe(_set_exception, futures, error)
            else:
                loop.call_soon_threadsafe(_set_results, futures, results)


def _set_results(futures: Sequence[asyncio.Future[Result]], results: Sequence[Result]) -> None:
    for future, result in zip(futures, results, strict=True):
        if not future.done():
            future.set_result(result)


def _set_exception(futures: Sequence[asyncio.Future[Result]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
