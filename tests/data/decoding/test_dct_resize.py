"""What was decoded at a fraction is resized as if it had been decoded whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from imgcls.data.decoding import dct_resize

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def picture(width: int, height: int, smooth: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (smooth, smooth, 0))
    low, high = noise.min(), noise.max()
    return np.round((noise - low) / (high - low) * 255).astype(np.uint8)


def means(image: np.ndarray, factor: int) -> np.ndarray:
    height, width, _ = image.shape
    squares = image.reshape(height // factor, factor, width // factor, factor, 3)
    return np.round(squares.mean((1, 3))).astype(np.uint8)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("part", [(0, 0, 640, 480), (101, 60, 500, 391)])
def test_it_is_nearer_to_the_whole_image_resized_than_resizing_again_is(
    name: Any, factor: int, part: tuple[int, int, int, int]
) -> None:
    whole = picture(640, 480, smooth=0.7 * factor)
    small = means(whole, factor)
    box = (part[0] / factor, part[1] / factor, part[2] / factor, part[3] / factor)
    size = (round((box[2] - box[0]) / 1.5), round((box[3] - box[1]) / 1.5))
    expected = np.asarray(Image.fromarray(whole).resize(size, FILTERS[name], box=part)).astype(int)
    again = np.asarray(Image.fromarray(small).resize(size, FILTERS[name], box=box))
    found = dct_resize.resize_dct_scaled(small, size, box, name)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 0.6 * np.abs(again - expected).mean()


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 40), (40, 40)])
@pytest.mark.parametrize("name", FILTERS)
def test_one_color_stays_that_color(shape: tuple[int, int], name: Any) -> None:
    image = np.full((*shape, 3), (200, 100, 7), np.uint8)
    found = dct_resize.resize_dct_scaled(image, (9, 13), (0, 0, shape[1], shape[0]), name)
    assert (found == (200, 100, 7)).all()


def test_what_is_turned_before_is_turned_after() -> None:
    image = picture(60, 44, smooth=1)
    found = dct_resize.resize_dct_scaled(image, (31, 23), (2.5, 1, 57.5, 43), "bilinear").astype(
        int
    )
    mirrored = dct_resize.resize_dct_scaled(
        image[:, ::-1], (31, 23), (2.5, 1, 57.5, 43), "bilinear"
    )
    assert np.abs(mirrored[:, ::-1] - found).max() <= 1
    across = dct_resize.resize_dct_scaled(
        image.transpose(1, 0, 2).copy(), (23, 31), (1, 2.5, 43, 57.5), "bilinear"
    )
    assert np.abs(across.transpose(1, 0, 2) - found).max() <= 1


def test_weights_add_up_to_one_and_stay_within_the_image() -> None:
    for name in FILTERS:
        chosen, weights = dct_resize._compute_taps(50, 0.0, 71.3, 72, name)
        assert chosen.min() == 0
        assert chosen.max() == 71
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
