"""Features of an image file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from imgcls.data.decoding.image_features import (
    HASH_BITS,
    MIRROR_BITS,
    compute_digest,
    compute_features,
    compute_perceptual_hash,
)
from imgcls.errors import ImageTooLarge, NotAnImage, TruncatedImage
from tests.data.pictures import drawn, encoded, stored


def bits(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.bitwise_count(one ^ other).sum())


def test_a_file_is_described_as_a_viewer_shows_it() -> None:
    data = stored(drawn(300, 200), "JPEG", 6)
    facts = compute_features(data)
    assert (facts.format, facts.width, facts.height, facts.orientation) == ("JPEG", 300, 200, 6)
    assert facts.digest == compute_digest(data)
    assert len(facts.hash) * 8 == HASH_BITS
    upright = compute_features(encoded(drawn(300, 200), "JPEG"))
    assert bits(facts.hash, upright.hash) < 10


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((150, 100)),
        lambda image: image.resize((900, 600)),
        lambda image: Image.open(io.BytesIO(encoded(image, "JPEG", quality=30))),
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        lambda image: image.convert("L").convert("RGB"),
    ],
    ids=["smaller", "larger", "recompressed", "darker", "grey"],
)
def test_a_picture_that_was_changed_a_little_keeps_its_hash(change: object) -> None:
    image = drawn(450, 300)
    near = bits(compute_perceptual_hash(image), compute_perceptual_hash(change(image)))  # type: ignore[operator]
    assert near < 40
    other = ImageOps.flip(image)
    assert bits(compute_perceptual_hash(image), compute_perceptual_hash(other)) > 80


def test_mirroring_changes_known_bits_of_the_hash() -> None:
    image = drawn(512, 320)
    assert (
        bits(
            compute_perceptual_hash(image),
            compute_perceptual_hash(ImageOps.mirror(image)) ^ MIRROR_BITS,
        )
        <= 8
    )
    assert (
        bits(compute_perceptual_hash(image), compute_perceptual_hash(ImageOps.mirror(image))) > 80
    )


def test_the_measures_match_their_names() -> None:
    def of(image: Image.Image) -> object:
        return compute_features(encoded(image, "PNG"))

    black, white = of(Image.new("RGB", (64, 64))), of(Image.new("RGB", (64, 64), "white"))
    assert (black.bright, white.dark) == (0, 1)  # type: ignore[attr-defined]
    assert black.contrast == black.entropy == black.sharpness == 0  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert of(noise).entropy > 7  # type: ignore[attr-defined]
    sharp, blurred = of(drawn(256, 256)), of(drawn(256, 256).filter(ImageFilter.GaussianBlur(4)))
    assert blurred.sharpness < sharp.sharpness / 2  # type: ignore[attr-defined]
    assert of(drawn(64, 64).convert("L")).colour == 0  # type: ignore[attr-defined]
    assert of(drawn(64, 64)).colour > 0.3  # type: ignore[attr-defined]


def test_percentiles_are_numpys_to_a_shade() -> None:
    image = drawn(200, 120)
    facts = compute_features(encoded(image, "PNG"))
    luma = np.asarray(image.convert("L")) / 255
    assert (facts.dark, facts.bright) == pytest.approx(np.percentile(luma, (5, 95)), abs=1 / 255)
    assert facts.contrast == pytest.approx(luma.std(), abs=1e-6)


def test_what_is_no_image_is_refused_as_decoding_refuses_it() -> None:
    with pytest.raises(NotAnImage):
        compute_features(b"no image at all")
    with pytest.raises(TruncatedImage):
        compute_features(encoded(drawn(300, 200), "JPEG")[:2000])
    with pytest.raises(ImageTooLarge):
        compute_features(encoded(drawn(300, 200), "JPEG"), max_pixels=1000)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2)])
def test_the_smallest_images_have_facts(size: tuple[int, int]) -> None:
    assert compute_features(encoded(Image.new("RGB", size, "red"), "PNG")).sharpness == 0
