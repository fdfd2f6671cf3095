"""Triton kernels that resize and crop the images of a batch, of any sizes, in two launches.

The arithmetic is that of torch's resize of uint8 on CPUs, which is Pillow's: weights of at most 15
bits, rows before columns, and sums rounded to 8 bits after each. The pixels are therefore those of
`resize.resize_tensor`, bit for bit; they are normalized where those are, by the network's side.
Source: torch, aten/src/ATen/native/cpu/UpSampleKernel.cpp, compute_index_ranges_int16_weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.decoding.resize import DecodedImage, compute_crop_window, compute_resized_size

ROWS, COLUMNS = 8, 64
"""Pixels of the output that one program computes."""
BLOCK = 128
"""Output positions whose weights are computed at a time."""
OPTIONS = {"enable_fp_fusion": False}
"""Of the compiler: a fused multiply-add would round otherwise than a CPU does."""

_IMAGE_FIELDS = tl.constexpr(4)
"""Address, and the strides of channels, rows and columns."""
_AXIS_FIELDS = tl.constexpr(7)
"""Length, length after the resize, first one kept, place on the canvas, number kept, taps, and the
place of the axis among the weights."""
_TAPS, _WEIGHTS = [9, 16], [10, 17]
"""Columns of the last two fields of y and of x."""


def resize_with_triton(images: Sequence[DecodedImage], spec: Preprocess) -> torch.Tensor:
    """Resize and crop images on the current device, on its current stream.

    images: at least one; the launched kernels read their memory
    Returns (N, 3, crop, crop) uint8, channels last in memory.
    """
    device = images[0].pixels.device
    count, crop = len(images), spec.crop
    table = torch.tensor([_describe(image, spec) for image in images], dtype=torch.int64)
    taps = table[:, _TAPS]
    ends = taps.flatten().cumsum(0).view(count, 2)
    table[:, _WEIGHTS] = (ends - taps) * crop
    weights = torch.empty(int(ends[-1, 1]) * crop, dtype=torch.int16, device=device)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    starts = torch.empty((count, 2, crop), dtype=torch.int32, device=device)
    shifts = torch.empty((count, 2), dtype=torch.int32, device=device)
    output = torch.empty((count, crop, crop, 3), dtype=torch.uint8, device=device)
    _compute_weights[(count, 2)](
        table, weights, starts, shifts,
        CROP=crop, BICUBIC=spec.interpolation == "bicubic", BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    grid = (count, triton.cdiv(crop, ROWS), triton.cdiv(crop, COLUMNS))
    _resize[grid](
        table, weights, starts, shifts, output,
        CROP=crop, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
    )  # fmt: skip
    return output.permute(0, 3, 1, 2)


def _describe(image: DecodedImage, spec: Preprocess) -> list[int]:
    """The image's row of the table: _IMAGE_FIELDS, then _AXIS_FIELDS of y and of x."""
    pixels = image.pixels
    address = pixels.data_ptr()
    (_, height, width), (channel, row, column) = pixels.shape, pixels.stride()
    # the orientation is a matter of strides: transposed first, then mirrored
    if image.orientation >= 5:
        height, width, row, column = width, height, column, row
    if image.orientation in (3, 4, 7, 8):
        address, row = address + (height - 1) * row, -row
    if image.orientation in (2, 3, 6, 7):
        address, column = address + (width - 1) * column, -column
    resized = compute_resized_size(image.display_size, spec)
    (left, top, right, bottom), (x, y) = compute_crop_window(resized, spec)
    return [
        address, channel, row, column,
        height, resized[1], top, y, bottom - top, _count_taps(height, resized[1], spec), 0,
        width, resized[0], left, x, right - left, _count_taps(width, resized[0], spec), 0,
    ]  # fmt: skip


def _count_taps(length: int, resized: int, spec: Preprocess) -> int:
    """Upper bound of the number of pixels that an output pixel is computed from, on one axis."""
    reach = 2 if spec.interpolation == "bicubic" else 1
    return 2 * math.ceil(reach * max(1.0, length / resized)) + 1


@triton.jit
def _filter(x: tl.tensor, BICUBIC: tl.constexpr) -> tl.tensor:
    """The resampling filter at distances x; the bicubic one has a = -1/2, as Pillow's."""
    x = tl.abs(x)
    if BICUBIC:
        near = ((1.5 * x - 2.5) * x) * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.maximum(1.0 - x, 0.0)


@triton.jit
def _find_window(
    position: tl.tensor, length: tl.tensor, scale: tl.tensor, BICUBIC: tl.constexpr
) -> tl.tensor:
    """Center in the input of output positions, and the first and last input pixel, exclusive."""
    support = tl.maximum(scale, 1.0) * (2.0 if BICUBIC else 1.0)
    center = scale * (position.to(tl.float64) + 0.5)
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    last = tl.minimum((center + support + 0.5).to(tl.int32), length)
    return center, first, last


@triton.jit
def _weigh(
    tap: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    center: tl.tensor,
    inverse: tl.tensor,
    BICUBIC: tl.constexpr,
) -> tl.tensor:
    """Weights of one tap, not normalized."""
    pixel = first + tap
    weight = _filter((pixel.to(tl.float64) - center + 0.5) * inverse, BICUBIC)
    return tl.where(pixel < last, weight, 0.0)


@triton.jit
def _compute_weights(
    table: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    shifts: tl.tensor,
    CROP: tl.constexpr,
    BICUBIC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: the weights of one axis of one image.

    table:   (N, 18) int64, see `_describe`
    weights: (taps, CROP) int16 of each axis of each image, times 2^shift
    starts:  (N, 2, CROP) int32, the first input pixel of each output pixel
    shifts:  (N, 2) int32, the largest shift at which all weights of the axis have 15 bits
    """
    image, axis = tl.program_id(0), tl.program_id(1)
    fields = table + image * (_IMAGE_FIELDS + 2 * _AXIS_FIELDS) + _IMAGE_FIELDS
    fields = fields + axis * _AXIS_FIELDS
    length, resized = tl.load(fields).to(tl.int32), tl.load(fields + 1).to(tl.int32)
    kept_from, kept = tl.load(fields + 2).to(tl.int32), tl.load(fields + 4).to(tl.int32)
    taps, own_weights = tl.load(fields + 5).to(tl.int32), weights + tl.load(fields + 6)
    scale = length.to(tl.float64) / resized.to(tl.float64)
    inverse = 1.0 / tl.maximum(scale, 1.0)
    largest = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, resized, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        center, first, last = _find_window(position, length, scale, BICUBIC)
        total = tl.zeros((BLOCK,), tl.float64)
        peak = tl.zeros((BLOCK,), tl.float64)
        for tap in range(taps):
            weight = _weigh(tap, first, last, center, inverse, BICUBIC)
            total += weight
            peak = tl.maximum(peak, weight)
        exists = position < resized
        largest = tl.maximum(largest, tl.where(exists, peak / tl.where(exists, total, 1.0), 0.0))
    limit = tl.max(largest, 0)
    candidate = tl.arange(0, 32)
    scaled = 0.5 + limit * (1 << tl.where(candidate < 22, candidate + 1, 0)).to(tl.float64)
    shift = tl.sum(((candidate < 22) & (scaled.to(tl.int32) < 32768)).to(tl.int32), 0)
    tl.store(shifts + image * 2 + axis, shift)
    unit = (1 << shift).to(tl.float64)
    for begin in range(0, kept, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        center, first, last = _find_window(kept_from + place, length, scale, BICUBIC)
        tl.store(starts + (image * 2 + axis) * CROP + place, first, mask=place < kept)
        total = tl.zeros((BLOCK,), tl.float64)
        for tap in range(taps):
            total += _weigh(tap, first, last, center, inverse, BICUBIC)
        total = tl.where(place < kept, total, 1.0)
        for tap in range(taps):
            exact = _weigh(tap, first, last, center, inverse, BICUBIC) / total * unit
            rounded = tl.where(exact < 0.0, exact - 0.5, exact + 0.5).to(tl.int16)
            tl.store(own_weights + tap * CROP + place, rounded, mask=place < kept)


@triton.jit
def _round(total: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """Sums of weighted pixels as 8-bit values."""
    return tl.minimum(tl.maximum((total + (1 << (shift - 1))) >> shift, 0), 255)


@triton.jit
def _resize(
    table: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    shifts: tl.tensor,
    output: tl.tensor,
    CROP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program: ROWS x COLUMNS pixels of one image, all three channels.

    table, weights, starts, shifts: as for `_compute_weights`
    output: (N, CROP, CROP, 3) uint8; pixels outside the image are black
    """
    image = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    fields = table + image * (_IMAGE_FIELDS + 2 * _AXIS_FIELDS)
    source = tl.load(fields).to(tl.pointer_type(tl.uint8))
    of_channel, of_row, of_column = tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    down, across = fields + _IMAGE_FIELDS, fields + _IMAGE_FIELDS + _AXIS_FIELDS
    height, width = tl.load(down), tl.load(across)
    row_taps, column_taps = tl.load(down + 5).to(tl.int32), tl.load(across + 5).to(tl.int32)
    y, x = row - tl.load(down + 3).to(tl.int32), column - tl.load(across + 3).to(tl.int32)
    in_rows, in_columns = (y >= 0) & (y < tl.load(down + 4)), (x >= 0) & (x < tl.load(across + 4))
    first_row = tl.load(starts + image * 2 * CROP + y, mask=in_rows, other=0)
    first_column = tl.load(starts + (image * 2 + 1) * CROP + x, mask=in_columns, other=0)
    row_weights, column_weights = weights + tl.load(down + 6) + y, weights + tl.load(across + 6) + x
    row_shift, column_shift = tl.load(shifts + image * 2), tl.load(shifts + image * 2 + 1)
    red = tl.zeros((ROWS, COLUMNS), tl.int32)
    green = tl.zeros((ROWS, COLUMNS), tl.int32)
    blue = tl.zeros((ROWS, COLUMNS), tl.int32)
    for row_tap in range(row_taps):
        line = first_row + row_tap
        row_weight = tl.load(row_weights + row_tap * CROP, mask=in_rows, other=0).to(tl.int32)
        line_is_used = in_rows & (line < height)
        line_red = tl.zeros((ROWS, COLUMNS), tl.int32)
        line_green = tl.zeros((ROWS, COLUMNS), tl.int32)
        line_blue = tl.zeros((ROWS, COLUMNS), tl.int32)
        for column_tap in range(column_taps):
            at = first_column + column_tap
            weight = tl.load(column_weights + column_tap * CROP, mask=in_columns, other=0)
            weight = weight.to(tl.int32)[None, :]
            used = line_is_used[:, None] & (in_columns & (at < width))[None, :]
            pixel = source + line[:, None] * of_row + at[None, :] * of_column
            line_red += weight * tl.load(pixel, mask=used, other=0).to(tl.int32)
            line_green += weight * tl.load(pixel + of_channel, mask=used, other=0).to(tl.int32)
            line_blue += weight * tl.load(pixel + 2 * of_channel, mask=used, other=0).to(tl.int32)
        red += row_weight[:, None] * _round(line_red, column_shift)
        green += row_weight[:, None] * _round(line_green, column_shift)
        blue += row_weight[:, None] * _round(line_blue, column_shift)
    to = output + ((image * CROP + row[:, None]).to(tl.int64) * CROP + column[None, :]) * 3
    exists = (row < CROP)[:, None] & (column < CROP)[None, :]
    tl.store(to, _round(red, row_shift).to(tl.uint8), mask=exists)
    tl.store(to + 1, _round(green, row_shift).to(tl.uint8), mask=exists)
    tl.store(to + 2, _round(blue, row_shift).to(tl.uint8), mask=exists)
