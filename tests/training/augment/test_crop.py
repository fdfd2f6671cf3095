"""Random crops and flips: geometry, frequency, the pixels of torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as TF

from imgcls.training.augment import crop
from imgcls.training.augment.base import draw_boxes, draw_uniform
from tests.training.augment.batches import augmented, noise


def boxes_of(count: int, side: int, scale: Any = (0.05, 1.0), ratio: Any = (0.5, 2.0)) -> Any:
    torch.manual_seed(0)
    area = draw_uniform(count, scale)
    return area, draw_boxes(area, ratio, side)


def test_boxes_lie_within_the_image_and_have_the_area_and_requested_shape() -> None:
    area, boxes = boxes_of(2000, 64, scale=(0.05, 0.4))
    top, left, height, width = boxes.unbind(1)
    assert boxes.min() >= 0
    assert (top + height).max() == 64, "the last row and column are reached"
    assert (left + width).max() == 64
    assert top.min() == left.min() == 0
    # each side is off by half a pixel at most
    found = height * width
    off = (height + width) / 2 + 1
    assert ((found - area * 64 * 64).abs() <= off).all()
    ratio = width / height
    assert (ratio <= 2 * (1 + 1 / height)).all()
    assert (ratio >= 0.5 * (1 - 1 / height)).all()
    small = ratio[area < 0.3].log()
    assert small.mean().abs() < 0.1, "as many wide ones as tall ones"


def test_a_box_of_the_whole_area_is_the_whole_image_whatever_its_shape() -> None:
    _, boxes = boxes_of(50, 31, scale=(1.0, 1.0))
    assert (boxes == torch.tensor([0, 0, 31, 31])).all()


@pytest.mark.parametrize(("side", "size"), [(32, 32), (40, 32), (20, 32), (90, 24)])
@pytest.mark.parametrize("how", [crop._crop_on_cpu, crop._crop_on_gpu])
def test_crops_are_those_of_torchvision(side: int, size: int, how: Any) -> None:
    """The GPU's way sums in float32 what the CPU's sums in integers: one level of 255 apart."""
    pixels = noise(24, side)
    _, boxes = boxes_of(24, side, scale=(0.2, 1.0))
    flips = torch.rand(2, 24) < 0.5
    found = how(pixels, boxes, flips, size)
    for image, box, (mirrored, turned), out in zip(pixels, boxes, flips.T, found, strict=True):
        expected = TF.resized_crop(image, *box.tolist(), [size, size], antialias=True)
        expected = TF.horizontal_flip(expected) if mirrored else expected
        expected = TF.vertical_flip(expected) if turned else expected
        torch.testing.assert_close(out.int(), expected.int(), atol=1, rtol=0)


@pytest.mark.parametrize("how", [crop._crop_on_cpu, crop._crop_on_gpu])
def test_flips_move_pixels_and_change_none(how: Any) -> None:
    pixels = noise(4, 19)
    boxes = crop.build_center_boxes(4, 19, 16)
    flips = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]]) > 0
    plain, mirrored, turned, both = how(pixels, boxes, flips, 16)
    middle = TF.center_crop(pixels, [16, 16])
    assert torch.equal(plain, middle[0])
    assert torch.equal(mirrored, middle[1].flip(-1))
    assert torch.equal(turned, middle[2].flip(-2))
    assert torch.equal(both, middle[3].flip(-1, -2))


@pytest.mark.parametrize(("setting", "axis"), [("hflip", -1), ("vflip", -2)])
def test_flips_are_as_frequent_as_requested(setting: str, axis: int) -> None:
    pixels = noise(400, 4)
    found, _ = augmented(pixels, 4, **{setting: 1.0})
    assert torch.equal(found, pixels.flip(axis))
    found, _ = augmented(pixels, 4, **{setting: 0.25})
    flipped = (found == pixels.flip(axis)).flatten(1).all(1)
    assert 70 <= flipped.sum() <= 130
    assert torch.equal(found[~flipped], pixels[~flipped])


def test_crops_keep_the_share_of_the_area_that_was_requested() -> None:
    # red is the column and green the row, so that a crop shows its position
    ramp = torch.arange(64, dtype=torch.uint8) * 4
    red, green = ramp.expand(64, 64), ramp[:, None].expand(64, 64)
    pixels = torch.stack([red, green, red]).expand(200, -1, -1, -1)
    found, _ = augmented(pixels, 64, crop_scale=(0.4, 0.6), crop_ratio=(0.5, 2.0))
    seen = found[:, :2].flatten(2).float()
    extent = (seen.amax(2) - seen.amin(2)) / 4 + 1
    area, shape = extent.prod(1) / 64**2, extent[:, 0] / extent[:, 1]
    assert 0.38 < area.min() < 0.42
    assert 0.58 < area.max() < 0.62
    assert 0.45 < shape.min() < 0.6
    assert 1.7 < shape.max() < 2.1


def test_the_weights_of_a_gpu_are_made_there() -> None:
    """Only boxes and flips are made on the CPU; meta tensors stand for those of a GPU."""
    on_cpu: list[int] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "cpu":
                on_cpu.append(out.numel())
            return out

    _, boxes = boxes_of(16, 40)
    pixels = noise(16, 40).to("meta")
    with Record():
        found = crop.crop_and_flip(pixels, boxes, torch.zeros(2, 16, dtype=torch.bool), 32)
    assert (found.shape, found.device.type) == ((16, 3, 32, 32), "meta")
    assert max(on_cpu, default=0) <= boxes.numel()
