"""Augmentation of batches of training images.

Each image of a batch is augmented with a random draw of its own. Random numbers come only from
torch's global CPU generator: after the same `torch.manual_seed`, the same batch is augmented to
the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from imgcls.training.augment.base import ImageBatch
from imgcls.training.augment.recipe import AugmentConfig


class Augment:
    """Augmentation of batches by a recipe; its state never changes."""

    def __init__(self, config: AugmentConfig, *, size: int, num_classes: int) -> None:
        """size: side of the square that the network takes, in pixels"""
        self.recipe = config.build_recipe()
        self.size = size
        self.num_classes = num_classes

    def __call__(
        self, pixels: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment each image with a random draw of its own, on the device of the batch.

        pixels: (N, 3, S, S) uint8 with S >= size
        labels: (N,) int64, or (N, num_classes) float32 for multilabel, on the same device
        Returns (N, 3, size, size) uint8, and the labels, or (N, num_classes) float32 shares of the
        classes if the recipe mixes images.
        """
        with _single_thread() if pixels.device.type == "cpu" else contextlib.nullcontext():
            batch = self.recipe.apply(ImageBatch(pixels, labels, self.size, self.num_classes))
            return batch.pixels, batch.targets


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    """Run the enclosed torch operations on the calling thread only.

    Augmentation is hundreds of small operations: on a busy machine, waiting for a second thread at
    the end of each took 50 times as long as running without one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
