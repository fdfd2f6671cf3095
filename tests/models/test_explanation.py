"""A map placed on the whole image, and its pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.models.classifier import Classifier
from imgcls.models.explanation import Explanation, place_on_image
from tests.conftest import draw


@pytest.mark.parametrize(
    ("spec", "size", "box"),
    [
        # a square from the middle of a wide image: 224 of 256 pixels of the height
        (Preprocess(resize=256, crop=224), (800, 400), (225, 25, 575, 375)),
        (Preprocess(resize=224, crop=224), (400, 800), (0, 200, 400, 600)),
        (Preprocess(resize=224, crop=224, mode="squash"), (800, 400), (0, 0, 800, 400)),
        (Preprocess(resize=224, crop=224, mode="pad"), (800, 400), (0, 0, 800, 400)),
        (Preprocess(resize=224, crop=224), (2000, 1), (999, 0, 1000, 1)),
    ],
)
def test_a_map_is_placed_where_the_network_looked(
    spec: Preprocess, size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    placed = place_on_image(np.ones((224, 224), np.float32), size, size, spec)
    expected = np.zeros((size[1], size[0]), np.float32)
    expected[box[1] : box[3], box[0] : box[2]] = 1
    assert placed.shape == expected.shape
    assert np.abs(placed - expected).sum() <= 2 * max(size)


def test_padding_of_the_input_is_no_part_of_the_image() -> None:
    spec = Preprocess(resize=224, crop=224, mode="pad")
    bars = np.ones((224, 224), np.float32)
    bars[56:168] = 0  # the image is 224 x 112
    assert not place_on_image(bars, (800, 400), (200, 100), spec).any()


def test_an_overlay_is_the_image_where_the_map_is_0() -> None:
    image = draw("green", (40, 30))
    class_map = np.zeros((30, 40), np.float32)
    class_map[10:20, 10:20] = 1
    overlay = np.asarray(Explanation("green", class_map, image).overlay()).astype(int)
    difference = np.abs(overlay - np.asarray(image).astype(int)).sum(2)
    assert not difference[class_map == 0].any()
    red, green, _ = overlay[12, 12]
    assert red > green


def test_pictures_are_of_the_whole_upright_image(color_bundle: Path) -> None:
    classifier = Classifier.load(str(color_bundle), device="cpu")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    sink = io.BytesIO()
    draw("red", (800, 400)).save(sink, "JPEG", exif=exif)
    for source in (sink.getvalue(), Image.open(io.BytesIO(sink.getvalue()))):
        found = classifier.explain(source)[0]
        assert found.overlay().size == (256, 512)
        assert found.class_map.shape == (512, 256)
        assert Image.open(io.BytesIO(found._repr_png_())).size == (256, 512)
    small = classifier.explain(draw("red", (8, 4)))[0]
    assert small.overlay().size == (224, 112)


def test_a_notebook_shows_the_overlay_with_its_class(color_bundle: Path, tmp_path: Path) -> None:
    classifier = Classifier.load(str(color_bundle), device="cpu")
    draw("red").save(tmp_path / "a&b.png")
    found = classifier.explain([tmp_path / "a&b.png"] * 2, "red")
    page = found._repr_html_()
    assert page.count("data:image/jpeg;base64,") == 2
    assert 'alt="image regions that contribute to the score of red"' in page
    assert "a&amp;b.png" in page
    empty = Explanation("<i>", np.zeros((4, 4), np.float32), Image.new("RGB", (4, 4)))
    assert empty.is_empty
    assert "&lt;i&gt;" in empty._repr_html_()
    assert "no region increases its score" in empty._repr_html_()
