"""Embeddings as vectors of length 1. Importing this module does not import torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def normalize_embeddings(embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """(N, E) embeddings scaled to length 1, in float32; those of length 0 stay as they are."""
    vectors = embeddings.astype(np.float32)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float32] = vectors / np.maximum(length, 1e-12)
    return scaled
