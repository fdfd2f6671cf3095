"""Message channel between the training workers and the driver: a Ray actor on the driver's node.

Workers post log lines and epochs, register themselves, and report failures; the driver requests
the stop. Posted items are only displayed and logged: the history returns with the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imgcls import log
from imgcls.data.storage.storage_settings import bind_settings
from imgcls.training.epoch_metrics import EpochMetrics

THREAD_NAME = "driver channel"


class DriverChannel:
    """State of the channel; its methods run in a Ray actor."""

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._posts: list[str | EpochMetrics] = []
        self._failure: str | None = None
        self._is_closed = False
        self._stop = asyncio.Event()
        self._changed = asyncio.Condition()

    async def register_worker(self, worker: Any) -> None:
        self._workers.append(worker)

    async def list_workers(self) -> list[Any]:
        """Actor handles of all workers since the start, replaced ones included."""
        return self._workers

    async def report_failure(self, reason: str) -> None:
        """Store a failure that would occur again after a restart; the first one counts."""
        self._failure = self._failure or reason

    async def get_failure(self) -> str | None:
        return self._failure

    async def request_stop(self) -> None:
        self._stop.set()

    async def wait_for_stop(self) -> None:
        """Return once the driver requests that the workers save and stop."""
        await self._stop.wait()

    async def post(self, item: str | EpochMetrics) -> None:
        async with self._changed:
            self._posts.append(item)
            self._changed.notify_all()

    async def close(self) -> None:
        self._stop.set()
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    async def wait_for_posts(self, seen: int) -> tuple[list[str | EpochMetrics], bool]:
        """Wait for posts after the first `seen`; also returns whether the channel is closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_closed or len(self._posts) > seen)
            return self._posts[seen:], self._is_closed


@contextlib.contextmanager
def open_driver_channel(epochs: int, on_epoch: Callable[[EpochMetrics], None]) -> Iterator[Any]:
    """The handle of a new channel; a thread of the driver prints posts as they arrive.

    epochs:   number of epochs of the training, for the log lines
    on_epoch: called in the thread with each epoch
    """
    here = ray.get_runtime_context().get_node_id()
    # Ray's types do not know the methods of an async actor
    channel: Any = (
        ray.remote(num_cpus=0)(DriverChannel)
        # on the driver's node, so that no other lost node takes the channel with it
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
        .remote()
    )

    def follow() -> None:
        seen, is_closed = 0, False
        with contextlib.suppress(ray.exceptions.RayError):
            while not is_closed:
                posts, is_closed = ray.get(channel.wait_for_posts.remote(seen))
                seen += len(posts)
                for post in posts:
                    is_epoch = isinstance(post, EpochMetrics)
                    log.show(post.format_line(epochs) if is_epoch else post)
                    if is_epoch:
                        on_epoch(post)

    follower = threading.Thread(target=bind_settings(follow), name=THREAD_NAME, daemon=True)
    follower.start()
    try:
        yield channel
    finally:
        channel.close.remote()
        follower.join(timeout=5)
        ray.kill(channel)
