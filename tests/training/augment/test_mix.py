"""MixUp and CutMix: the targets are the shares of the classes in the pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from imgcls.training.augment.mix import mix_images, mix_targets
from tests.training.augment.batches import augmented, noise

MIXING = [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0, "mix_prob": 0.7}]


@pytest.mark.parametrize("settings", MIXING, ids=str)
def test_targets_are_the_shares_of_the_classes_in_the_pixels(settings: Any) -> None:
    brightness = torch.tensor([0, 80, 160, 240])  # of each class
    pixels = brightness[torch.arange(40) % 4].to(torch.uint8)[:, None, None, None]
    found, targets = augmented(pixels.expand(-1, 3, 12, 12), 12, **settings)
    assert (targets.shape, targets.dtype) == ((40, 4), torch.float32)
    torch.testing.assert_close(targets.sum(1), torch.ones(40))
    assert targets.min() >= 0
    in_pixels = found.float().mean((1, 2, 3))
    torch.testing.assert_close(in_pixels, targets @ brightness.float(), atol=0.51, rtol=0)
    assert targets.max(1).values.min() < 0.7, "some are really mixed"


def test_mixup_blends_each_image_with_the_one_before() -> None:
    pixels = noise(12, 6)
    torch.manual_seed(0)
    found, share = mix_images(pixels, 1.0, 0.0, 1.0)
    weight = share[:, None, None, None]
    expected = weight * pixels + (1 - weight) * pixels.roll(1, 0)
    torch.testing.assert_close(found.float(), expected, atol=0.51, rtol=0)
    assert len(share.unique()) == 12
    assert share.min() >= 0.5


def test_cutmix_pastes_a_square_of_the_image_before() -> None:
    own, other = torch.full((2, 3, 10, 10), 1, dtype=torch.uint8)
    pixels = torch.stack([own, other + 1] * 10)
    torch.manual_seed(0)
    found, share = mix_images(pixels, 0.0, 1.0, 1.0)
    for before, after, rest in zip(pixels, found, share, strict=True):
        rows, columns = (before != after)[0].nonzero().unbind(1)
        side = int(rows.max() - rows.min()) + 1
        assert side == columns.max() - columns.min() + 1
        assert len(rows) == side**2, "the whole square is from the other image"
        assert rest == pytest.approx(1 - side**2 / 100)


def test_images_are_mixed_as_often_as_requested_half_of_them_by_each() -> None:
    pixels = torch.tensor([0, 200], dtype=torch.uint8).repeat(300)[:, None, None, None]
    found, targets = augmented(
        pixels.expand(-1, 3, 8, 8), 8, mixup=1.0, cutmix=1.0, mix_prob=0.5, classes=2
    )
    mixed = targets.max(1).values < 1
    pasted = (found.flatten(1).amax(1) == 200) & (found.flatten(1).amin(1) == 0)
    assert 260 <= mixed.sum() <= 340
    assert 110 <= pasted.sum() <= 190
    assert (mixed | ~pasted).all()


@pytest.mark.parametrize("settings", MIXING[:2], ids=str)
def test_a_batch_of_one_is_mixed_with_itself(settings: Any) -> None:
    pixels = noise(1, 8)
    found, targets = augmented(pixels, 8, **settings)
    assert torch.equal(found, pixels)
    torch.testing.assert_close(targets, torch.tensor([[1.0, 0, 0, 0]]))


def test_labels_stay_labels_where_nothing_is_mixed() -> None:
    _, targets = augmented(noise(5, 8), 8, mixup=0.2, mix_prob=0.0)
    assert targets.tolist() == [0, 1, 2, 3, 0]


def test_targets_of_several_labels_are_shares_and_unknown_classes_stay_unknown() -> None:
    nan = torch.nan
    labels = torch.tensor([[1.0, 0.0, nan], [1.0, 1.0, 0.0], [0.0, nan, 1.0]])
    mixed = mix_targets(labels, torch.tensor([0.75, 1.0, 0.5]), 3)
    # the first is mixed with the last, the second stays as it is, the third is mixed with it
    expected = torch.tensor([[0.75, nan, nan], [1.0, 1.0, 0.0], [0.5, nan, 0.5]])
    torch.testing.assert_close(mixed, expected, equal_nan=True)
