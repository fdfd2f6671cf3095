"""Graceful stop: SIGTERM and Ctrl-C are handled while a job waits for Ray.

Ray waits in native code: in the main thread it would miss SIGTERM, and Ray Train would handle
Ctrl-C itself. So Ray is called in another thread, and the main thread waits in Python.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import TypeVar

from imgcls.cluster.session import register_ray_thread
from imgcls.data.storage.storage_settings import bind_settings
from imgcls.errors import Interrupted

T = TypeVar("T")

_POLL_S = 0.2


class Interruption:
    """Stop request of a job, by SIGTERM, Ctrl-C or the program itself.

    The first signal raises Interrupted in the main thread at once. Native code that calls back into
    Python may swallow that, so the job also calls `check` between its steps.
    """

    def __init__(self) -> None:
        self._reason: str | None = None

    def request_stop(self, reason: str) -> None:
        """Make `check` raise, for a reason other than a signal."""
        self._reason = reason

    def check(self) -> None:
        """Raise Interrupted after a signal or `request_stop`."""
        if self._reason is not None:
            raise Interrupted(f"stopped by {self._reason}")

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[Interruption]:
        """Within the block, signals interrupt; outside the main thread they cannot be handled."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._reason is None:
            self._reason = signal.Signals(number).name
            self.check()


def run_in_thread(call: Callable[[], T]) -> Future[T]:
    """Run a call in a daemon thread, which does not keep the process alive; returns its future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised again by Future.result
            future.set_exception(error)

    thread = threading.Thread(target=bind_settings(run), name="call", daemon=True)
    register_ray_thread(thread)
    thread.start()
    return future


def wait_interruptibly(
    future: Future[T], interruption: Interruption, stop: Callable[[], None] | None = None
) -> T:
    """The future's result; after a signal raises Interrupted.

    stop: makes the call end; called in another thread until it has, which is not waited for
    """
    try:
        while not wait([future], timeout=_POLL_S).done:
            interruption.check()
    except BaseException:
        if stop is not None:
            _stop_in_background(stop, future.done)
        raise
    return future.result()


def _stop_in_background(stop: Callable[[], None], has_ended: Callable[[], bool]) -> None:
    def repeat() -> None:
        while not has_ended():
            stop()
            time.sleep(_POLL_S)

    run_in_thread(repeat)


def iterate_in_thread(
    items: Iterable[T], interruption: Interruption, stop: Callable[[], None] | None = None
) -> Iterator[T | None]:
    """Iterate in a daemon thread, so that signals are handled while Ray blocks.

    Yields None after every 0.2 s without an item.

    stop: makes `items` end; when the iteration is broken off, called in another thread until they
        have, so that Ray does not continue until its next item
    """
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    is_stopped = threading.Event()

    def consume() -> None:
        try:
            for item in items:
                ready.put((item, None))
                if is_stopped.is_set():
                    return
            ready.put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001  raised again by the consumer
            ready.put((None, error))

    thread = threading.Thread(target=bind_settings(consume), name="consume", daemon=True)
    register_ray_thread(thread)
    thread.start()
    try:
        while True:
            interruption.check()
            try:
                item, error = ready.get(timeout=_POLL_S)
            except queue.Empty:
                yield None
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        is_stopped.set()
        if stop is not None and thread.is_alive():
            _stop_in_background(stop, lambda: not thread.is_alive())
        thread.join(timeout=1)  # at its end, or inside Ray, which cannot be interrupted
