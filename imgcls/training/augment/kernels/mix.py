"""MixUp and CutMix: each image mixed with the one before it in the batch, and so its target."""

from __future__ import annotations

import torch

from imgcls.training.augment.kernels.base import draw_boxes, iter_slices, paste_boxes, to_uint8


def mix_images(
    pixels: torch.Tensor, mixup: float, cutmix: float, probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix some images with the image before them in the batch.

    mixup, cutmix: alpha of Beta(alpha, alpha), from which each image's own share is drawn; 0 is
        off. With both on, each image to mix is mixed by either with probability one half.
    Returns the images, and (N,) float32 on the CPU: the share that each keeps of itself, at least
    one half (but for whole pixels), so that no image is lost while its neighbor appears twice.
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
        out = paste_boxes(out, before, boxes, pasted)
    if mixup > 0:
        share = torch.where(blended, _draw_own_share(mixup, count), share)
        out = _blend(out, before, share, blended)
    return out, share


def mix_targets(labels: torch.Tensor, share: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(N, num_classes) float32: the shares of the classes in images as `mix_images` returns them.

    labels: (N,) int64 of the images before they were mixed
    share:  (N,) float32
    """
    own = torch.zeros(len(labels), num_classes, device=labels.device)
    own.scatter_(1, labels[:, None], 1.0)
    share = share.to(labels.device, non_blocking=True)[:, None]
    return own * share + own.roll(1, 0) * (1 - share)


def _draw_own_share(alpha: float, count: int) -> torch.Tensor:
    """(count,) float32 in 0.5 to 1: drawn from Beta(alpha, alpha), or its complement if larger."""
    share = torch.distributions.Beta(alpha, alpha).sample((count,))
    return torch.maximum(share, 1 - share)


def _blend(
    pixels: torch.Tensor, other: torch.Tensor, share: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """A copy in which the chosen images keep their share of themselves, the rest from `other`."""
    out = pixels.clone()
    rows = chosen.nonzero().flatten()
    weight = (1 - share[rows])[:, None, None, None].to(pixels.device, non_blocking=True)
    rows = rows.to(pixels.device, non_blocking=True)
    for part in iter_slices(pixels, len(rows)):
        at = rows[part]
        out[at] = to_uint8(torch.lerp(pixels[at].float(), other[at].float(), weight[part]))
    return out
