"""Resize a JPEG that libjpeg decoded at 1/2, 1/4 or 1/8, to the result of resizing the whole image.

A pixel of the reduced image is the mean of a square of the whole one; the usual filter would blur
the result. Each output pixel is estimated instead from its six nearest means along each axis, by
the weights that are optimal for images whose differences grow with distance.
Source: block kriging with a linear variogram; Journel and Huijbregts, Mining Geostatistics, 1978,
chapter V.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import torch

from imgcls.data.decoding.pixels import Pixels
from imgcls.data.decoding.preprocess import Interpolation

MIN_TAPS = 6
"""Minimum number of means that an output pixel is computed from, along each axis."""
_SAMPLES_PER_UNIT = 16
"""Number of samples of the filter, per unit of its argument."""
_FILTER_RADIUS = {"bilinear": 1, "bicubic": 2}


def resize_dct_scaled(
    image: Pixels,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    filter_: Interpolation,
) -> Pixels:
    """Resize a part of a reduced image.

    image: (H, W, 3), each pixel the mean of a square
    size:  (width, height) of the result
    box:   left, top, right and bottom of the part, in pixels of `image`
    Returns (height, width, 3) uint8.
    """
    width, height = size
    rows, row_weights = _compute_taps(height, box[1], box[3], image.shape[0], filter_)
    columns, column_weights = _compute_taps(width, box[0], box[2], image.shape[1], filter_)
    top, left = int(rows.min()), int(columns.min())
    part = image[top : int(rows.max()) + 1, left : int(columns.max()) + 1]
    lines = torch.from_numpy(part.astype(np.float32))
    down = _sum_weighted(lines.flatten(1), rows - top, row_weights)
    turned = down.view(height, -1, 3).transpose(0, 1).reshape(-1, height * 3)
    across = _sum_weighted(turned, columns - left, column_weights).round_().clamp_(0, 255).byte()
    return across.view(width, height, 3).transpose(0, 1).contiguous().numpy()


def _sum_weighted(
    lines: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """(N, E) weighted sums of lines (L, E), by their indices (N, K) and weights (N, K)."""
    return torch.nn.functional.embedding_bag(indices, lines, mode="sum", per_sample_weights=weights)


@functools.lru_cache(maxsize=64)
def _compute_taps(
    count: int, start: float, stop: float, available: int, filter_: Interpolation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights of the means that each of `count` output pixels is computed from.

    start, stop: the part of the axis to resize; the `available` means are one unit long each
    Returns (count, K) int64 and (count, K) float32, each row of which sums to 1.
    """
    step = (stop - start) / count
    scale = max(step, 1.0)
    center = start + (np.arange(count) + 0.5) * step
    reach = _FILTER_RADIUS[filter_]
    # with fewer taps than the filter's width, a bicubic resize differs by 0.5 of 255 and more
    taps = min(available, max(MIN_TAPS, 2 * math.ceil(reach * scale) + 2))
    first = np.clip(np.round(center - taps / 2).astype(np.int64), 0, available - taps)
    indices = first[:, None] + np.arange(taps)
    points = (np.arange(2 * reach * _SAMPLES_PER_UNIT) + 0.5) / _SAMPLES_PER_UNIT - reach
    places = center[:, None] + points * scale
    # as in Pillow, the filter is cut off at the border of the image
    target = _FILTERS[filter_](np.abs(points)) * ((places > 0) & (places < available))
    target /= target.sum(1, keepdims=True)
    to_points = np.abs(indices[:, :, None] + 0.5 - places[:, None, :])
    mean_distance = np.where(to_points < 0.5, to_points**2 + 0.25, to_points)
    apart = np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))).astype(float)
    system = np.ones((taps + 1, taps + 1))
    system[:taps, :taps] = apart + np.eye(taps) / 3
    system[taps, taps] = 0
    aim = np.ones((taps + 1, count))
    aim[:taps] = np.einsum("ikp,ip->ki", mean_distance, target)
    weights = np.linalg.solve(system, aim)[:taps].T
    return torch.from_numpy(indices), torch.from_numpy(weights.astype(np.float32))


def _bilinear(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.clip(1 - x, 0, None)


def _bicubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' kernel with a = -0.5, as in Pillow."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic}
