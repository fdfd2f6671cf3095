"""Color jitter: the colors of torchvision, all four changes in one matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from imgcls.training.augment import color
from tests.training.augment.batches import augmented, noise


def colored_noise(count: int, side: int) -> torch.Tensor:
    """Less red than green, so that the channels must not be mistaken for each other."""
    tint = torch.tensor([0, 60, 20], dtype=torch.uint8)[:, None, None]
    return noise(count, side, 80, 110) + tint


@pytest.mark.parametrize(
    ("setting", "reference"),
    [
        ("brightness", TF.adjust_brightness),
        ("contrast", TF.adjust_contrast),
        ("saturation", TF.adjust_saturation),
    ],
)
@pytest.mark.parametrize("end", [0, 1])
def test_colors_change_as_in_torchvision(
    monkeypatch: pytest.MonkeyPatch, setting: str, reference: Any, end: int
) -> None:
    """At either end of the range that is drawn from; two levels, since torchvision rounds down."""
    monkeypatch.setattr(
        color, "draw_uniform", lambda n, bounds: torch.full((n,), float(bounds[end]))
    )
    pixels = colored_noise(3, 8)
    found, _ = augmented(pixels, 8, **{setting: 0.3})
    expected = reference(pixels, (0.7, 1.3)[end])
    torch.testing.assert_close(found.int(), expected.int(), atol=2, rtol=0)


def test_colors_change_together_as_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(color, "draw_uniform", lambda n, bounds: torch.full((n,), float(bounds[0])))
    pixels = colored_noise(3, 8)
    found, _ = augmented(pixels, 8, brightness=0.3, contrast=0.4, saturation=0.5)
    expected = TF.adjust_saturation(pixels / 255, 0.5)
    expected = TF.adjust_brightness(TF.adjust_contrast(expected, 0.6), 0.7)
    torch.testing.assert_close(found.float(), 255 * expected, atol=1, rtol=0)


def test_factors_are_drawn_from_the_whole_range() -> None:
    pixels = torch.full((300, 3, 2, 2), 100, dtype=torch.uint8)
    found, _ = augmented(pixels, 2, brightness=0.5)
    assert 50 <= found.min() < 55
    assert 145 < found.max() <= 150
    assert 95 < found.float().mean() < 105


def test_a_hue_keeps_the_luma_and_half_a_turn_is_the_complement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(color, "draw_uniform", lambda n, bounds: torch.full((n,), float(bounds[1])))
    pixels = colored_noise(3, 8)
    found, _ = augmented(pixels, 8, hue=0.5)
    luma = TF.rgb_to_grayscale(pixels.float(), num_output_channels=3)
    torch.testing.assert_close(found.float(), 2 * luma - pixels.float(), atol=1, rtol=0)


def test_four_quarter_turns_of_the_hue_are_none_and_gray_stays_gray() -> None:
    quarter = color.build_color_matrix(torch.ones(1), torch.tensor([0.25]))[0]
    torch.testing.assert_close(quarter.matrix_power(4), torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(quarter @ torch.ones(3), torch.ones(3), atol=1e-4, rtol=0)
    paler = color.build_color_matrix(torch.tensor([0.5]), torch.zeros(1))[0]
    both = color.build_color_matrix(torch.tensor([0.5]), torch.tensor([0.25]))[0]
    torch.testing.assert_close(both, paler @ quarter)
    gray = torch.full((8, 3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(augmented(gray, 4, hue=0.5, saturation=1.0)[0], gray)


def test_colors_that_leave_the_range_are_clipped_and_do_not_wrap() -> None:
    pixels = torch.tensor([0, 250], dtype=torch.uint8).repeat(3, 8, 1)[None].expand(64, -1, -1, -1)
    found, _ = augmented(pixels[..., :2, :], 2, brightness=1.0, contrast=1.0)
    dark, light = found[..., 0].int(), found[..., 1].int()
    assert (dark <= light).all()
