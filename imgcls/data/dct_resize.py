"""Resizing what libjpeg has decoded at 1/2, 1/4 or 1/8, as if the whole image had been resized.

A pixel of the reduced image is the mean of a square of the whole one: resized by the usual filter
it would come out blurred. Each output pixel is estimated instead, by the weights of its six nearest
means along each axis that are best for images whose differences grow with distance.
Source: block kriging with a linear variogram; Journel and Huijbregts, Mining Geostatistics, 1978,
chapter V.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Pixels = npt.NDArray[np.uint8]
ResizeFilter = Literal["bilinear", "bicubic"]

MIN_TAPS = 6
"""Smallest number of means that an output pixel is made of, along each axis."""
_SAMPLES_PER_UNIT = 16
"""Points at which the filter is taken, per unit of it."""
_FILTER_RADIUS = {"bilinear": 1, "bicubic": 2}


def resize_dct_scaled(
    image: Pixels,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    filter_: ResizeFilter,
) -> Pixels:
    """A part of a reduced image at another size.

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


def _sum_weighted(lines: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(N, E): sums of lines (L, E), N times those that are chosen (N, K), times weights (N, K)."""
    return torch.nn.functional.embedding_bag(chosen, lines, mode="sum", per_sample_weights=weights)


@functools.lru_cache(maxsize=64)
def _compute_taps(
    count: int, start: float, stop: float, held: int, filter_: ResizeFilter
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of `held` means each of `count` output pixels is made of, and by what weights.

    Along one axis, whose means are one unit long and begin at 0. Returns (count, K) int64 and
    (count, K) float32, each row of which adds up to 1.
    """
    step = (stop - start) / count
    scale = max(step, 1.0)
    centre = start + (np.arange(count) + 0.5) * step
    reach = _FILTER_RADIUS[filter_]
    # fewer taps than the filter is wide change a bicubic resize by 0.5 and more of 255
    taps = min(held, max(MIN_TAPS, 2 * math.ceil(reach * scale) + 2))
    first = np.clip(np.round(centre - taps / 2).astype(np.int64), 0, held - taps)
    chosen = first[:, None] + np.arange(taps)
    points = (np.arange(2 * reach * _SAMPLES_PER_UNIT) + 0.5) / _SAMPLES_PER_UNIT - reach
    places = centre[:, None] + points * scale
    # as Pillow does, a filter that reaches beyond the image is cut off there
    wanted = _FILTERS[filter_](np.abs(points)) * ((places > 0) & (places < held))
    wanted /= wanted.sum(1, keepdims=True)
    to_points = np.abs(chosen[:, :, None] + 0.5 - places[:, None, :])
    mean_distance = np.where(to_points < 0.5, to_points**2 + 0.25, to_points)
    apart = np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))).astype(float)
    system = np.ones((taps + 1, taps + 1))
    system[:taps, :taps] = apart + np.eye(taps) / 3
    system[taps, taps] = 0
    aim = np.ones((taps + 1, count))
    aim[:taps] = np.einsum("ikp,ip->ki", mean_distance, wanted)
    weights = np.linalg.solve(system, aim)[:taps].T
    return torch.from_numpy(chosen), torch.from_numpy(weights.astype(np.float32))


def _bilinear(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.clip(1 - x, 0, None)


def _bicubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' kernel with a = -0.5, as Pillow has it."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic}
