"""Choice of the batch size for which a forward pass was captured, by the size of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

ForwardFn = Callable[[torch.Tensor], torch.Tensor]

SIZE_FACTOR = 4
"""Ratio of the sizes that are captured: the padding of a batch costs less than three forward passes
of its images, and a graph takes memory."""


def choose_graph_sizes(batch_size: int) -> tuple[int, ...]:
    """1, 4, 16, ... below a maximum batch size, and this size itself."""
    sizes, size = [], 1
    while size < batch_size:
        sizes.append(size)
        size *= SIZE_FACTOR
    return (*sizes, batch_size)


class SizedForward:
    """A forward pass that runs the smallest captured one which holds the batch.

    captured: forward passes by the largest batch size that each takes; a larger batch runs in the
        one of the largest size
    """

    def __init__(self, captured: Mapping[int, ForwardFn]) -> None:
        self._captured = dict(sorted(captured.items()))
        self._largest = max(self._captured)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        count = len(inputs)
        size = next((size for size in self._captured if size >= count), self._largest)
        return self._captured[size](inputs)
