"""CUDA streams of the stages of a batch, and the order between them.

- Decoding: a stream for each concurrent call (`DecodeStage`).
- Upload: a stream for each network (`PinnedUploader`).
- Forward pass and download: the current stream of the calling thread (`AsyncDownload`).

A stage that takes over memory waits for the stream that wrote it, and records its own stream with
the memory, so that the allocator does not reuse it before the stage has read it. On a CPU all of
this does nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch

from imgcls import log
from imgcls.errors import RequestError

DEVICE_FAILURE_STATUS = 70
"""Exit status of a process whose GPU has failed."""


def hand_over(
    tensors: Iterable[torch.Tensor], source: torch.cuda.Stream, target: torch.cuda.Stream
) -> None:
    """Let kernels that are launched on `target` from now on read what kernels on `source` write."""
    target.wait_stream(source)
    for tensor in tensors:
        tensor.record_stream(target)


class DecodeStage:
    """Decoding on a device, as a context manager: its kernels run on a stream of their own.

    No other thread uses the stream meanwhile. Streams are kept and reused, because torch has only
    32 of them per device and would give the same one to two threads.

    device: the device, also the CPU
    """

    _idle: ClassVar[dict[torch.device, list[torch.cuda.Stream]]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stack = contextlib.ExitStack()
        self._stream: torch.cuda.Stream | None = None
        self._consumer: torch.cuda.Stream | None = None

    def __enter__(self) -> DecodeStage:
        if self.device.type == "cuda":
            self._consumer = torch.cuda.current_stream(self.device)
            self._stream = self._stack.enter_context(self._borrow_stream())
            self._stack.enter_context(torch.cuda.stream(self._stream))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def wait_for_kernels(self) -> None:
        """Wait until the kernels of this stage have ended; needed right before each nvJPEG call.

        nvJPEG writes on a stream of torchvision's, which waits for no other. The memory that it
        gets may be that of images which were freed while kernels of this stage still read them.
        """
        if self._stream is not None:
            self._stream.synchronize()

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give the tensors to kernels on the stream that was current before this stage."""
        if self._stream is not None and self._consumer is not None:
            hand_over(tensors, self._stream, self._consumer)

    @contextlib.contextmanager
    def _borrow_stream(self) -> Iterator[torch.cuda.Stream]:
        with self._lock:
            idle = self._idle.setdefault(self.device, [])
            stream = idle.pop() if idle else torch.cuda.Stream(self.device)
        try:
            yield stream
        finally:
            with self._lock:
                idle.append(stream)


class PinnedUploader:
    """Copies batches to a GPU through pinned memory, on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """The batch on the device, ready for kernels launched later on this thread's stream."""
        kernels = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copy = batch.pin_memory().to(self._device, non_blocking=True)
        hand_over([copy], self._stream, kernels)
        return copy


class AsyncDownload:
    """Asynchronous copy of a tensor to the host; a CPU tensor is returned as it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor
        self._done: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            # an event belongs to one device, which need not be the current one
            with torch.cuda.device(tensor.device):
                self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._host.copy_(tensor, non_blocking=True)
                self._done = torch.cuda.Event()
                self._done.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> torch.Tensor:
        """Wait for the copy and return it."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


class CudaTimer:
    """GPU time of the kernels launched between construction and `stop`; 0 on a CPU.

    Kernels that other threads launch in between run in this time too. Of timers that are chained by
    `stop`, each counts only the time after the end of the one before: their sum counts no time
    twice.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event] = []
        self._earlier_end: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._record(0)

    def stop(self, earlier: CudaTimer | None = None) -> None:
        """Record the end.

        earlier: the timer that was stopped last, whose time is not counted again
        """
        if self._marks:
            self._record(1)
            self._earlier_end = earlier._marks[1] if earlier is not None else None

    def elapsed_seconds(self) -> float:
        """Wait for the end; elapsed GPU time."""
        if not self._marks:
            return 0.0
        start, end = self._marks
        end.synchronize()
        elapsed = float(start.elapsed_time(end))
        if self._earlier_end is not None:
            elapsed = max(0.0, min(elapsed, self._earlier_end.elapsed_time(end)))
        return elapsed / 1000

    def _record(self, mark: int) -> None:
        with torch.cuda.device(self._device):
            self._marks[mark].record(torch.cuda.current_stream(self._device))


def exit_after_device_failure(delay_s: float) -> None:
    """End the process, whose GPU has failed, after some seconds in which it can send responses.

    Call it while the exception is handled: its traceback is printed.
    """
    _print_device_failure()
    threading.Timer(delay_s, os._exit, (DEVICE_FAILURE_STATUS,)).start()


def _print_device_failure() -> None:
    traceback.print_exc()
    sys.stderr.write("the GPU failed: this process ends, to be replaced\n")
    sys.stderr.flush()


@contextlib.contextmanager
def exit_on_device_failure() -> Iterator[None]:
    """End the process when a GPU fails in the block, so that another one is started in its place.

    After such an error (an illegal access, ECC) every later CUDA call of the process fails.
    """
    try:
        yield
    except torch.AcceleratorError:
        _print_device_failure()
        os._exit(DEVICE_FAILURE_STATUS)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device with its index; None: the GPU if there is one, else the CPU.

    torchvision rebuilds its JPEG decoder when the device differs, also "cuda" from "cuda:0".
    Raises RequestError for a device that torch does not know, or a GPU that it does not find.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise RequestError(f"device: {device!r} is not cpu, cuda or cuda:INDEX") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {found}: torch finds no GPU; pass cpu")
    if str(found) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return found


def find_worker_device(planned: str) -> torch.device:
    """The device of a worker for which "cpu" or "cuda" is planned.

    A GPU that Ray counts but torch does not find, for want of a driver, is reported.
    """
    if planned == "cuda" and not torch.cuda.is_available():
        log.emit("note", "Ray assigned a GPU to this worker, but torch finds none: using the CPU")
        return torch.device("cpu")
    return resolve_device(planned)
