"""Scores of a batch, and scores that a GPU may still be computing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from imgcls.data.cuda import AsyncDownload, CudaTimer


@dataclass(frozen=True)
class Scores:
    """Scores and embeddings of N images.

    scores:    (N, C) float32 calibrated scores, in class order; all NaN for an image whose logits
        are not all finite (see `is_finite`)
    embedding: (N, E) float32 input of the final layer, averaged over space; None unless requested
    order:     (N, k) int64 the k best classes, best first, if they were requested and the device is
        a GPU
    """

    scores: npt.NDArray[np.float32]
    embedding: npt.NDArray[np.float32] | None = None
    order: npt.NDArray[np.int64] | None = None

    @property
    def is_finite(self) -> npt.NDArray[np.bool_]:
        """(N,) bool: whether all scores of an image are finite.

        Valid weights can still overflow in a layer for one image, above all in half precision.
        Such a row must not get a label.
        """
        return ~np.isnan(self.scores[:, 0])


class PendingScores:
    """Scores that a GPU may still be computing."""

    def __init__(
        self,
        scores: torch.Tensor,
        embedding: torch.Tensor | None,
        timer: CudaTimer,
        order: torch.Tensor | None = None,
    ) -> None:
        self._timer = timer
        self._scores = AsyncDownload(scores)
        self._embedding = None if embedding is None else AsyncDownload(embedding)
        self._order = None if order is None else AsyncDownload(order)

    def get(self) -> Scores:
        """Wait for the scores and return them."""
        embedding = None if self._embedding is None else self._embedding.get().numpy()
        order = None if self._order is None else self._order.get().numpy()
        return Scores(self._scores.get().numpy(), embedding, order)

    def gpu_seconds(self) -> float:
        """Wait for the end; GPU time since the forward pass before, in seconds; 0 on a CPU.

        Time in which the GPU had nothing to do is not counted.
        """
        return self._timer.elapsed_seconds()
