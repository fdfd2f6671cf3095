"""Child processes in which fetched images are decoded: an image that crashes its decoder ends one.

A thread that inspects images has a child of its own. A child gets the bytes of an image and answers
with what `inspect_image` finds. One that dies, or does not answer in time, is replaced.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType

from imgcls.curation.fetched_images import FetchedImage, inspect_image
from imgcls.errors import CrashingImage, ImageError, RunFailed, StorageError

_TIMEOUT_S = 120.0
"""Time to decode one image; a decoder that hangs would hold up its shard for good."""
_START_TIMEOUT_S = 300.0
_EXIT_TIMEOUT_S = 10.0
_ATTEMPTS = 2
"""A child may also be killed for the memory of others, so that one death is no proof."""


class ImageInspector:
    """Inspects images in child processes, for any number of threads.

    max_pixels: as for `inspect_image`
    timeout_s:  a child that takes longer for an image is killed

    Raises RunFailed when a child cannot be started.
    """

    def __init__(self, max_pixels: int, timeout_s: float = _TIMEOUT_S) -> None:
        self._max_pixels, self._timeout_s = max_pixels, timeout_s
        self._own = threading.local()
        self._lock = threading.Lock()
        self._children: set[_Child] = set()
        self._is_closed = False

    def __enter__(self) -> ImageInspector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the children, also those that are busy."""
        with self._lock:
            self._is_closed = True
            children, self._children = self._children, set()
        for child in children:
            child.end()

    def inspect(self, outcome: bytes | StorageError | ImageError) -> FetchedImage:
        """What `inspect_image` returns; the status `crashed` for what ends a child."""
        if not isinstance(outcome, bytes):
            return inspect_image(outcome, self._max_pixels)
        reason = ""
        for _ in range(_ATTEMPTS):
            child = self._get_child()
            try:
                return child.inspect(outcome, self._timeout_s)
            except _ChildEnded as error:
                reason = str(error)
                self._drop(child)
        return FetchedImage(CrashingImage.status, f"{reason} while it was decoded")

    def _get_child(self) -> _Child:
        child: _Child | None = getattr(self._own, "child", None)
        if child is None:
            with self._lock:
                if self._is_closed:
                    raise RuntimeError("the inspector is closed")
                child = self._own.child = _Child(self._max_pixels)
                self._children.add(child)
        return child

    def _drop(self, child: _Child) -> None:
        self._own.child = None
        child.end()
        with self._lock:
            self._children.discard(child)


class _ChildEnded(Exception):
    """A child died or was killed; the message names the reason."""


class _Child:
    def __init__(self, max_pixels: int) -> None:
        self._connection, theirs = Pipe()
        number = theirs.fileno()
        command = f"from {__name__} import serve_inspector; serve_inspector({number}, {max_pixels})"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", command],
            pass_fds=[number],
            env={
                **os.environ,
                # where imports are found may be known to this process only
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": "1",
            },
            start_new_session=True,  # Ctrl-C in the terminal is for the driver
        )
        theirs.close()
        self._is_started = False

    def inspect(self, data: bytes, timeout_s: float) -> FetchedImage:
        """Raises _ChildEnded when the child does not answer, RunFailed when it does not start."""
        if not self._is_started:
            try:
                self._receive(_START_TIMEOUT_S)
            except _ChildEnded as error:
                raise RunFailed(f"cannot start a process that decodes images: {error}") from error
            self._is_started = True
        try:
            self._connection.send_bytes(data)
        except OSError as error:
            raise _ChildEnded(self._describe_exit()) from error
        image: FetchedImage = pickle.loads(self._receive(timeout_s))
        return image

    def _receive(self, timeout_s: float) -> bytes:
        try:
            if not self._connection.poll(timeout_s):
                raise _ChildEnded(f"the decoder did not end within {timeout_s:g} s")
            return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise _ChildEnded(self._describe_exit()) from error

    def _describe_exit(self) -> str:
        """Why the child has ended."""
        try:
            code = self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "the decoder closed its connection"
        if code < 0:
            return f"the decoder was ended by {signal.Signals(-code).name}"
        return f"the decoder ended with exit code {code}"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


def serve_inspector(number: int, max_pixels: int) -> None:
    """The main function of a child: inspect images until the other side closes the connection.

    number: the file descriptor of the connection
    """
    connection = Connection(number)
    connection.send_bytes(b"")
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            return
        connection.send_bytes(pickle.dumps(inspect_image(data, max_pixels)))
