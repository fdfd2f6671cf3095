"""The Ray session under a job: connect or start one, quietly, and say what it has.

Shared by the rooms that use Ray. Authentication, addresses and log folders stay Ray's own business:
what `RAY_ADDRESS` and `RAY_AUTH_MODE` say is obeyed and never changed here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import ray

from imgcls.errors import Interrupted


@dataclass(frozen=True)
class Node:
    """One machine's logical resources and the accelerator it names, as Ray knows them."""

    cpus: float
    gpus: float
    accelerator: str | None = None


def connect() -> None:
    """Join the cluster this job was submitted to, or start a private one on this machine."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Ray's core prints a false alarm for every actor pool; what matters reaches us as an exception
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if not ray.is_initialized():
        with _hushed():
            ray.init(logging_level=logging.WARNING, log_to_driver=False)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Hold back what native code writes to stderr; it is shown after all when an error follows."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def nodes() -> list[Node]:
    """The live machines, those without resources (a head that takes no work) left out."""
    found = []
    for node in ray.nodes():
        resources = node.get("Resources", {})
        cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
        if node.get("Alive") and (cpus or gpus):
            prefix = "accelerator_type:"
            names = [key[len(prefix) :] for key in resources if key.startswith(prefix)]
            found.append(Node(cpus, gpus, names[0] if names else None))
    return found


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within it, SIGTERM and Ctrl-C raise Interrupted in the main thread; a second one is ignored.

    In another thread than the main one (a notebook's executor) signals are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    previous = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
