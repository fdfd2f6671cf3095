"""CUDA graph of the forward pass, asynchronous copies to and from a GPU, and GPU timing.

The host submits a batch and continues with the next one; only reading the scores waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

WARM_UP_PASSES = 3
"""Forward passes before a graph is captured: libraries choose their kernels in the first ones."""


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
        kernels.wait_stream(self._stream)
        copy.record_stream(kernels)
        return copy


class AsyncDownload:
    """Asynchronous copy of a tensor to the host; a CPU tensor is returned as it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor
        self._done: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

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
        self._marks: list[torch.cuda.Event] = []
        self._earlier_end: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._marks[0].record()

    def stop(self, earlier: CudaTimer | None = None) -> None:
        """Record the end.

        earlier: the timer that was stopped last, whose time is not counted again
        """
        if self._marks:
            self._marks[1].record()
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


class CudaGraphRunner:
    """A network captured as a CUDA graph, which launches all kernels at once, for one batch size.

    Smaller batches are padded to this size, so that the scores of a row do not depend on the number
    of rows in its batch; larger ones run without the graph.
    """

    def __init__(
        self, network: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor
    ) -> None:
        self._network = network
        self._input = torch.zeros_like(example)
        self._lock = threading.Lock()
        stream = torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                network(self._input)
        torch.cuda.current_stream(example.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = network(self._input)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        count = len(inputs)
        if count > len(self._input):
            return self._network(inputs)
        with self._lock:
            self._input[:count].copy_(inputs)
            self._graph.replay()
            return self._output[:count].clone()
