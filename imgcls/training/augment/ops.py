"""The steps of augmentation, each on a whole uint8 batch with a draw of its own for every image.

Promises that all draws are made on the CPU, from torch's global generator, before anything is sent
to the batch's device, so that a GPU is never waited for. What is done how often is decided by
`augment`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
"""Of erased rectangles, as in Zhong et al., AAAI 2020, and torchvision's RandomErasing."""
CACHED_VALUES = 1 << 19
"""float32 values that stay in a CPU's cache from one operation to the next (2 MiB)."""

# YIQ, the colours of NTSC television: Y is the luma, I and Q span the plane that a hue turns in.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_LUMA = _YIQ[0]


def draw_uniform(count: int, bounds: tuple[float, float]) -> torch.Tensor:
    """(count,) float32, drawn evenly between the bounds."""
    return torch.empty(count).uniform_(*bounds)


def draw_boxes(area: torch.Tensor, ratio: tuple[float, float], side: int) -> torch.Tensor:
    """Boxes of given areas, of random shape and place, within a square of `side` pixels.

    area:  (N,) shares of the square
    ratio: bounds of width / height, which is drawn evenly on a log scale; where the area leaves
           no room for such a shape, from the shapes it has room for
    Returns (N, 4) int64: top, left, height, width, in pixels.
    """
    room = -area.log()
    low, high = (torch.full_like(area, math.log(bound)).clamp(-room, room) for bound in ratio)
    shape = torch.lerp(low, high, torch.rand(len(area))).exp()
    sizes = side * torch.stack([area / shape, area * shape], 1).sqrt()
    sizes = sizes.round().clamp(1, side).long()
    corners = (torch.rand(len(area), 2) * (side - sizes + 1)).long()
    return torch.cat([corners, sizes], 1)


def compute_center_offset(side: int, size: int) -> int:
    """Where the middle `size` of `side` pixels starts, rounded as torchvision's CenterCrop does."""
    return round((side - size) / 2)


def build_center_boxes(count: int, side: int, size: int) -> torch.Tensor:
    """(count, 4) int64: the middle of a square, as often as asked for."""
    at = compute_center_offset(side, size)
    return torch.tensor([[at, at, size, size]]).expand(count, 4)


def crop_and_flip(
    pixels: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: int
) -> torch.Tensor:
    """Cut a box out of each image, mirror it where asked, and resize it to a square.

    pixels: (N, 3, S, S) uint8
    boxes:  (N, 4) int64 on the CPU, as `random_boxes` makes them
    flips:  (2, N) bool on the CPU: left and right, upside down
    Returns (N, 3, size, size) uint8, resampled bilinearly with antialiasing.
    """
    if pixels.device.type == "cpu":
        return _crop_on_cpu(pixels, boxes, flips, size)
    return _crop_on_gpu(pixels, boxes, flips, size)


def _crop_on_cpu(
    pixels: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: int
) -> torch.Tensor:
    """On a CPU: torch resizes uint8 with vector instructions, four times as fast as grid_sample."""
    out = []
    for at, ((top, left, height, width), horizontal, vertical) in enumerate(
        zip(boxes.tolist(), *flips.tolist(), strict=True)
    ):
        part = pixels[at : at + 1, :, top : top + height, left : left + width]
        axes = [axis for axis, wanted in ((-1, horizontal), (-2, vertical)) if wanted]
        part = part.flip(axes) if axes else part
        out.append(F.interpolate(part, (size, size), mode="bilinear", antialias=True))
    return torch.cat(out)


def _crop_on_gpu(
    pixels: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: int
) -> torch.Tensor:
    """On a GPU: two products of matrices for the whole batch; unlike grid_sample, antialiased."""
    side, device = pixels.shape[-1], pixels.device
    columns = build_resampling_weights(boxes[:, 1], boxes[:, 3], flips[0], size, side).to(
        device, non_blocking=True
    )
    rows = build_resampling_weights(boxes[:, 0], boxes[:, 2], flips[1], size, side).to(
        device, non_blocking=True
    )
    out = torch.matmul(torch.matmul(rows[:, None], pixels.float()), columns[:, None].mT)
    return _to_uint8(out)


def build_resampling_weights(
    start: torch.Tensor, length: torch.Tensor, flip: torch.Tensor, size: int, side: int
) -> torch.Tensor:
    """(N, size, side) float32: the weights with which each output pixel sums up the inputs.

    start, length, flip: (N,) the stretch of each row of `side` pixels to resample, and whether
    backwards. A triangle as wide as an output pixel, though at least as an input pixel, and cut off
    at the ends of the stretch: the filter that Pillow calls BILINEAR.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    outputs = torch.arange(size)[None, :, None]
    outputs = torch.where(flip[:, None, None], size - 1 - outputs, outputs)
    inputs = torch.arange(side)[None, None, :]
    distance = (inputs + 0.5 - (start + scale * (outputs + 0.5))).abs()
    weights = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    weights *= (inputs >= start) & (inputs < start + length)
    return weights / weights.sum(-1, keepdim=True)


def jitter_color(
    pixels: torch.Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> torch.Tensor:
    """Change the colours of each image, all four at once, by one matrix per image.

    Factors are drawn evenly from 1 ± strength (0 at least) and hues from ± hue of a full turn, as
    in torchvision's ColorJitter. A hue turns in the YIQ plane instead of HSV, which keeps the luma
    and is linear (P. Haeberli, Matrix Operations for Image Processing, 1993); so all four commute
    and no order needs to be drawn. Values are clipped once, at the end.
    """
    count = len(pixels)
    bright, contrasts, saturations = (
        draw_uniform(count, (max(0.0, 1 - strength), 1 + strength))
        for strength in (brightness, contrast, saturation)
    )
    matrix = (
        bright[:, None, None]
        * contrasts[:, None, None]
        * build_color_matrix(saturations, draw_uniform(count, (-hue, hue)))
    )
    grey = bright * (1 - contrasts)  # share of the image's mean luma that contrast mixes in
    matrix, grey, luma = (t.to(pixels.device, non_blocking=True) for t in (matrix, grey, _LUMA))
    parts = []
    for part in _iter_slices(pixels):
        values = pixels[part].flatten(2).float()
        offset = (values.mean(2) @ luma) * grey[part]
        offset = offset[:, None, None].expand(-1, 3, 1)
        parts.append(_to_uint8(torch.baddbmm(offset, matrix[part], values)))
    return torch.cat(parts).view_as(pixels)


def build_color_matrix(saturation: torch.Tensor, hue: torch.Tensor) -> torch.Tensor:
    """(N, 3, 3) float32 on RGB columns: chroma stretched and turned, luma kept.

    saturation: (N,) factors
    hue:        (N,) in turns
    """
    angle = 2 * math.pi * hue
    across, along = saturation * angle.cos(), saturation * angle.sin()
    turned = torch.zeros(len(hue), 3, 3)
    turned[:, 0, 0] = 1
    turned[:, 1, 1] = turned[:, 2, 2] = across
    turned[:, 1, 2], turned[:, 2, 1] = -along, along
    return torch.linalg.inv(_YIQ) @ turned @ _YIQ


def erase_rectangles(pixels: torch.Tensor, probability: float) -> torch.Tensor:
    """Paint over a rectangle of some images, each with a random colour; returns a copy."""
    count, side = len(pixels), pixels.shape[-1]
    chosen = torch.rand(count) < probability
    boxes = draw_boxes(draw_uniform(count, ERASE_AREA), ERASE_RATIO, side)
    colours = torch.randint(0, 256, (count, 3, 1, 1), dtype=torch.uint8)
    return _paste(pixels, colours.to(pixels.device, non_blocking=True), boxes, chosen)


def mix_images(
    pixels: torch.Tensor, mixup: float, cutmix: float, probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix some images with the image before them in the batch.

    mixup, cutmix: alpha of Beta(alpha, alpha), from which an image's own share is drawn; 0 is off.
        With both on, each image that is mixed is mixed by either with probability one half.
    Returns the images, and (N,) float32 on the CPU: the share that each still has of itself, at
    least one half (but for whole pixels), lest it be lost and its neighbour stand there twice.
    Source: Zhang et al., ICLR 2018 (mixup); Yun et al., ICCV 2019 (cutmix).
    """
    count, side = len(pixels), pixels.shape[-1]
    mixed = torch.rand(count) < probability
    pasted = torch.rand(count) < (0.5 if mixup and cutmix else float(cutmix > 0))
    pasted, blended = mixed & pasted, mixed & ~pasted
    share = torch.ones(count)
    before = pixels.roll(1, 0)
    out = pixels
    if cutmix > 0:
        boxes = draw_boxes(1 - _draw_own_share(cutmix, count), (1.0, 1.0), side)
        share = torch.where(pasted, 1 - boxes[:, 2] * boxes[:, 3] / side**2, share)
        out = _paste(out, before, boxes, pasted)
    if mixup > 0:
        share = torch.where(blended, _draw_own_share(mixup, count), share)
        out = _blend(out, before, share, blended)
    return out, share


def mix_targets(labels: torch.Tensor, share: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(N, num_classes) float32: the shares of the classes in images as `mix` returns them.

    labels: (N,) int64 of the images before they were mixed
    share:  (N,) float32
    """
    own = torch.zeros(len(labels), num_classes, device=labels.device)
    own.scatter_(1, labels[:, None], 1.0)
    share = share.to(labels.device, non_blocking=True)[:, None]
    return own * share + own.roll(1, 0) * (1 - share)


def _draw_own_share(alpha: float, count: int) -> torch.Tensor:
    """(count,) float32 of 0.5 to 1: from Beta(alpha, alpha), or what is left if that is more."""
    share = torch.distributions.Beta(alpha, alpha).sample((count,))
    return torch.maximum(share, 1 - share)


def _paste(
    pixels: torch.Tensor, source: torch.Tensor, boxes: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """A copy in which the chosen images have their box from `source`, which may be one pixel each.

    One slice per chosen image: a mask over the whole batch took a CPU ten times as long.
    """
    out = pixels.clone()
    for at in chosen.nonzero().flatten().tolist():
        top, left, height, width = boxes[at].tolist()
        area = (at, slice(None), slice(top, top + height), slice(left, left + width))
        out[area] = source[area] if source.shape == pixels.shape else source[at]
    return out


def _blend(
    pixels: torch.Tensor, other: torch.Tensor, share: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """A copy in which the chosen images keep their share of themselves, the rest from `other`."""
    out = pixels.clone()
    rows = chosen.nonzero().flatten()
    weight = (1 - share[rows])[:, None, None, None].to(pixels.device, non_blocking=True)
    rows = rows.to(pixels.device, non_blocking=True)
    for part in _iter_slices(pixels, len(rows)):
        at = rows[part]
        out[at] = _to_uint8(torch.lerp(pixels[at].float(), other[at].float(), weight[part]))
    return out


def _iter_slices(pixels: torch.Tensor, count: int | None = None) -> Iterator[slice]:
    """Slices over a batch, or over `count` of its images: whole on a GPU, cache-sized on a CPU."""
    count = len(pixels) if count is None else count
    step = max(1, CACHED_VALUES // pixels[0].numel()) if pixels.device.type == "cpu" else count
    return (slice(start, start + step) for start in range(0, count, max(1, step)))


def _to_uint8(values: torch.Tensor) -> torch.Tensor:
    """Rounded and clipped; overwrites its argument."""
    return values.round_().clamp_(0, 255).to(torch.uint8)
