"""Sizes, crops and bars are those of torchvision, for images of any shape."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import _compute_resized_output_size

from imgcls.data.decoding import decode
from imgcls.data.decoding.resize import compute_resized_size
from tests.data.pictures import (
    COLOR,
    difference,
    drawn,
    encoded,
    fast,
)

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as decode.py does outside pytest


@given(width=st.integers(1, 30_000), height=st.integers(1, 30_000), resize=st.integers(1, 600))
def test_the_resized_length_is_rounded_as_torchvision_does(
    width: int, height: int, resize: int
) -> None:
    spec = fast(resize=resize, crop=1)
    expected = _compute_resized_output_size((height, width), [resize])
    assert compute_resized_size((width, height), spec) == tuple(reversed(expected))


@given(
    width=st.integers(1, 90), height=st.integers(1, 90), crop=st.integers(1, 40),
    margin=st.integers(0, 20), mode=st.sampled_from(["crop", "pad", "squash"]),
    format=st.sampled_from(["PNG", "JPEG"]),
)  # fmt: skip
def test_any_size_becomes_the_models_size(
    width: int, height: int, crop: int, margin: int, mode: Any, format: str
) -> None:
    spec = fast(resize=crop + margin, crop=crop, mode=mode)
    pixels, shown = decode.decode_image(
        encoded(Image.new("RGB", (width, height), COLOR), format), spec
    )
    assert pixels.shape == (3, crop, crop)
    assert shown == (width, height)
    if mode != "pad":
        assert np.abs(pixels.astype(int) - np.array(COLOR).reshape(3, 1, 1)).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    ("size", "inside"),
    [((200, 100), (slice(56, 168), slice(None))), ((30, 60), (slice(None), slice(56, 168)))],
)
def test_pad_shows_the_whole_picture_between_black_bars(
    format: str, size: tuple[int, int], inside: tuple[slice, slice]
) -> None:
    spec = fast(mode="pad")
    data = encoded(drawn(*size), format)
    pixels, _ = decode.decode_image(data, spec)
    fitted = (224, 112) if size[0] > size[1] else (112, 224)
    whole = Image.open(io.BytesIO(data)).resize(fitted, Image.Resampling.BILINEAR)
    assert difference(pixels[:, *inside], np.asarray(whole).transpose(2, 0, 1)) < 2
    bars = pixels.copy()
    bars[:, *inside] = 0
    assert not bars.any()


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (20_000, 3), (1, 1)])
def test_a_line_of_pixels_is_a_picture_too(format: str, mode: Any, size: tuple[int, int]) -> None:
    pixels, shown = decode.decode_image(
        encoded(Image.new("RGB", size, COLOR), format), fast(mode=mode)
    )
    assert pixels.shape == (3, 224, 224)
    assert shown == size
    seen = pixels.reshape(3, -1).max(1)
    assert np.abs(seen.astype(int) - COLOR).max() <= 3
