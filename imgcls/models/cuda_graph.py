"""CUDA graph of the forward pass: the host launches all kernels of a batch at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

WARM_UP_PASSES = 3
"""Forward passes before a graph is captured: libraries choose their kernels in the first ones."""

_capture_lock = threading.Lock()
"""torch allows one capture at a time in a process."""
_failed_captures: list[torch.cuda.CUDAGraph] = []
"""Kept, because torch's allocator of pinned memory still asks them for their streams."""


class CaptureError(Exception):
    """A network cannot be captured as a CUDA graph; it can run without one."""


class CudaGraphRunner:
    """A network captured as a CUDA graph for one batch size.

    Smaller batches are padded to this size, so that the scores of a row do not depend on the number
    of rows in its batch; larger ones run without the graph.

    Raises CaptureError for a network that waits for the device, for example to choose a shape by
    data; torch.OutOfMemoryError; torch.AcceleratorError for a device that has failed.
    """

    def __init__(
        self, network: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor
    ) -> None:
        self._network = network
        self._input = torch.zeros_like(example)
        self._lock = threading.Lock()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(example.device), _capture_lock:
            self._output = _capture(self._graph, network, self._input)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        count = len(inputs)
        if count > len(self._input):
            return self._network(inputs)
        with self._lock:
            self._input[:count].copy_(inputs)
            self._graph.replay()
            return self._output[:count].clone()


def _capture(
    graph: torch.cuda.CUDAGraph,
    network: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
) -> torch.Tensor:
    """Capture the network on the current device; returns its output, which replays overwrite."""
    stream = torch.cuda.Stream(inputs.device)
    kernels = torch.cuda.current_stream(inputs.device)
    stream.wait_stream(kernels)
    pool = torch.cuda.graph_pool_handle()
    # a failed capture does not restore the stream that was current before
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_PASSES):
            network(inputs)
        try:
            # thread_local: what other threads do meanwhile, such as answering requests, is allowed
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                output = network(inputs)
        except RuntimeError as error:
            _abandon_capture(graph, pool, inputs.device)
            raise _find_reason(error) from error
    kernels.wait_stream(stream)
    return output


def _abandon_capture(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Undo what a failed capture leaves behind; raises torch.AcceleratorError if the device failed.

    Without it, torch's allocator would count the capture as in progress, and would not reuse memory
    that two streams have used.
    """
    _failed_captures.append(graph)
    with contextlib.suppress(RuntimeError):  # torch may have ended it
        torch._C._cuda_endAllocateToPool(device.index, pool)
    torch.cuda.synchronize(device)


def _find_reason(error: BaseException) -> Exception:
    """The first error of a failed capture: what follows only reports that it is invalid."""
    while error.__context__ is not None:
        error = error.__context__
    if isinstance(error, torch.OutOfMemoryError):
        return error
    return CaptureError(str(error).partition("\n")[0])
