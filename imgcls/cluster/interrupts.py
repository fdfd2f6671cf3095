"""Waiting for Ray so that signals are still answered.

Ray's waits are native code: in the main thread they lose SIGTERM, and Ray Train would take Ctrl-C
for itself. So the call is made in another thread, and the main one waits in Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from imgcls.cluster.session import Interruption, register_ray_thread
from imgcls.data.storage_settings import bind_settings

T = TypeVar("T")


def run_in_thread(call: Callable[[], T]) -> Future[T]:
    """The future result of a call under way in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  it is raised again where it is awaited
            future.set_exception(error)

    thread = threading.Thread(target=bind_settings(run), name="call", daemon=True)
    register_ray_thread(thread)
    thread.start()
    return future


def wait_interruptibly(future: Future[T], interruption: Interruption) -> T:
    """Its result; raises Interrupted, and leaves the call alone, if a signal comes first."""
    while not wait([future], timeout=0.2).done:
        interruption.check()
    return future.result()
