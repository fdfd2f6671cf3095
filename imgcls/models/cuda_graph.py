"""What keeps a GPU at work: copies beside the kernels, and a forward pass that is one command.

The host hands over a batch and goes on to the next; only who wants the scores waits for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

WARM_UP_PASSES = 3
"""Passes before a graph is recorded: libraries choose their kernels in the first ones."""


class PinnedUploader:
    """Copies batches to a GPU through pinned memory, on a stream beside that of the kernels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """The batch on the device, for what is launched on this thread's stream from now on."""
        kernels = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            there = batch.pin_memory().to(self._device, non_blocking=True)
        kernels.wait_stream(self._stream)
        there.record_stream(kernels)
        return there


class AsyncDownload:
    """A tensor on its way to the host, if it is not there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor
        self._done: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def get(self) -> torch.Tensor:
        """The tensor on the host; waits for it."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


class CudaTimer:
    """Time that a GPU spends on what is launched between its making and `stop`; 0 on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._marks: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._marks[0].record()

    def stop(self) -> None:
        if self._marks:
            self._marks[1].record()

    def elapsed_seconds(self) -> float:
        """Waits for the end."""
        if not self._marks:
            return 0.0
        start, end = self._marks
        end.synchronize()
        return start.elapsed_time(end) / 1000


class CudaGraphRunner:
    """A network as a CUDA graph: all its kernels at one command, for batches of one size.

    Smaller batches are run at that size too, so that a row's scores do not depend on how many rows
    came with it; larger ones as they are.
    """

    def __init__(
        self, network: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor
    ) -> None:
        self._network = network
        self._input = torch.zeros_like(example)
        self._lock = threading.Lock()
        aside = torch.cuda.Stream(example.device)
        aside.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_PASSES):
                network(self._input)
        torch.cuda.current_stream(example.device).wait_stream(aside)
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
