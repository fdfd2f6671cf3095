"""MixUp and CutMix: each image mixed with the one before it in the batch, and so its target."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from imgcls.training.augment.base import (
    ImageBatch,
    Operation,
    Probability,
    draw_boxes,
    iter_slices,
    paste_boxes,
    to_uint8,
)

if TYPE_CHECKING:
    import torch

Alpha = Annotated[float, Field(ge=0.0, le=10.0)]


class Mix(Operation):
    """MixUp, CutMix, or both on different images of a batch."""

    mixup: Alpha | None = None
    """Alpha of MixUp: two images and their labels are blended in shares from Beta(alpha, alpha)."""
    cutmix: Alpha | None = None
    """Alpha of CutMix: a rectangle of another image is pasted, its area from Beta(alpha, alpha)."""
    mix_prob: Probability | None = None
    """Share of the images to mix (default 1); with mixup and cutmix, half of them by each."""

    @property
    def is_active(self) -> bool:
        return self._share > 0 and bool(self.mixup or self.cutmix)

    @property
    def mixes_targets(self) -> bool:
        return self.is_active

    def describe(self) -> dict[str, object]:
        if not self.is_active:
            return {}
        shown = {"mixup": self.mixup, "cutmix": self.cutmix, "mix_prob": self._share}
        return {name: value for name, value in shown.items() if value}

    def find_requirements(self) -> dict[str, str]:
        return {} if self.mixup or self.cutmix else {"mix_prob": "mixup or cutmix"}

    def apply(self, batch: ImageBatch) -> ImageBatch:
        pixels, share = mix_images(batch.pixels, self.mixup or 0.0, self.cutmix or 0.0, self._share)
        targets = mix_targets(batch.targets, share, batch.num_classes)
        return replace(batch, pixels=pixels, targets=targets)

    @property
    def _share(self) -> float:
        return 1.0 if self.mix_prob is None else self.mix_prob


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
    import torch

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

    labels: of the images before they were mixed: (N,) int64, or for multilabel (N, num_classes)
        float32, where a class that is unknown (NaN) in one of two mixed images stays unknown
    share:  (N,) float32
    """
    import torch

    share = share.to(labels.device, non_blocking=True)[:, None]
    if labels.dim() == 2:
        return (labels * share + labels.roll(1, 0) * (1 - share)).where(share < 1, labels)
    own = torch.zeros(len(labels), num_classes, device=labels.device)
    own.scatter_(1, labels[:, None], 1.0)
    return own * share + own.roll(1, 0) * (1 - share)


def _draw_own_share(alpha: float, count: int) -> torch.Tensor:
    """(count,) float32 in 0.5 to 1: drawn from Beta(alpha, alpha), or its complement if larger."""
    import torch

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
        out[at] = to_uint8(pixels[at].float().lerp(other[at].float(), weight[part]))
    return out
