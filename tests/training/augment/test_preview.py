"""The picture of augmented images: what evaluation sees, and what workers see."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imgcls.training.augment.augment import Augment
from imgcls.training.augment.crop import center_crop
from imgcls.training.augment.preview import choose_sample_rows, draw_preview
from imgcls.training.augment.recipe import PRESETS, AugmentConfig
from tests.training.augment.batches import noise


def sheet(preset: str, side: int = 20, size: int = 16, **settings: Any) -> Image.Image:
    config = AugmentConfig.model_validate({"preset": preset})
    augment = Augment(config, size=size, num_classes=3)
    pixels, labels = noise(3, side).numpy(), torch.arange(3)
    names = ["cat", "dog", "a name that is too long for the width of a caption"]
    return Image.open(io.BytesIO(draw_preview(pixels, labels, names, augment, **settings)))


def contains(picture: Image.Image, tile: np.ndarray) -> bool:
    """Whether the tile is somewhere in the picture, pixel for pixel."""
    pixels = np.asarray(picture)
    height, width, _ = tile.shape
    corners = np.argwhere((pixels == tile[0, 0]).all(-1))
    return any(np.array_equal(pixels[y : y + height, x : x + width], tile) for y, x in corners)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_preview_shows_every_image_as_it_is_evaluated(preset: str) -> None:
    picture = sheet(preset)
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    for image in center_crop(noise(3, 20), 16):
        tile = image.permute(1, 2, 0).numpy().repeat(9, 0).repeat(9, 1)
        assert contains(picture, tile)


def test_the_preview_shows_what_a_worker_would_see() -> None:
    torch.manual_seed(4)
    config = AugmentConfig(preset="light")
    found, _ = Augment(config, size=16, num_classes=3)(noise(3, 20), torch.arange(3))
    picture = sheet("light", seed=4)
    for image in found:
        assert contains(picture, image.permute(1, 2, 0).numpy().repeat(9, 0).repeat(9, 1))


def test_the_preview_grows_with_its_columns_and_shrinks_large_images() -> None:
    narrow, wide = sheet("standard", columns=2), sheet("standard", columns=5)
    assert wide.width - narrow.width == 3 * (16 * 9 + 6)
    assert sheet("light", side=300, size=256, columns=2).width == narrow.width


def test_the_preview_makes_room_for_the_targets_of_mixed_images() -> None:
    assert sheet("strong").height > sheet("standard").height


def test_the_preview_depends_on_its_seed_and_keeps_the_random_state_of_the_caller() -> None:
    before = torch.get_rng_state()
    first, second, other = sheet("strong"), sheet("strong"), sheet("strong", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != other.tobytes()


def test_the_sample_rows_have_as_many_classes_as_possible() -> None:
    assert choose_sample_rows(np.array([0, 0, 0, 1, 1, 2]), 4).tolist() == [0, 1, 3, 5]
    assert choose_sample_rows(np.array([5, 3, 5]), 8).tolist() == [1, 0, 2]
    many = choose_sample_rows(np.arange(1000) // 10, 8)
    assert len(many) == 8
    assert (many[0], many[-1]) == (0, 990)
