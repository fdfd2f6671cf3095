"""Predicting from whatever a notebook has at hand, and what it shows of the answer."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from imgcls.data import images
from imgcls.errors import ImageError, StorageError
from imgcls.models.classifier import Classifier
from tests.browser import opened
from tests.conftest import draw
from tests.data.pictures import STORED, drawn, encoded, stored


@pytest.fixture
def classifier(colour_bundle: Path) -> Classifier:
    return Classifier.load(str(colour_bundle), device="cpu")


def test_an_image_may_be_a_path_its_bytes_or_pillows(
    classifier: Classifier, tmp_path: Path
) -> None:
    file = tmp_path / "a.png"
    draw("green").save(file)
    ways = [file, str(file), file.read_bytes(), Image.open(file)]
    together = classifier.predict(ways)
    apart = [classifier.predict(way)[0] for way in ways]
    assert len(together) == 4
    for prediction in (*together, *apart):
        assert prediction.label == together[0].label
        assert prediction.topk_scores == pytest.approx(together[0].topk_scores, abs=0.01)
    assert apart[0] == classifier.predict([file])[0]


def test_many_images_are_predicted_as_one_at_a_time(classifier: Classifier) -> None:
    pictures = [draw("red", seed=seed) for seed in range(7)]
    whole = classifier.predict(pictures)
    parts = classifier.predict(pictures, batch_size=3)
    assert [each.label for each in whole] == [each.label for each in parts]
    assert classifier.predict([]) == []


@pytest.mark.parametrize("orientation", STORED)
def test_a_pillow_image_is_turned_as_its_file_is(classifier: Classifier, orientation: int) -> None:
    data = stored(drawn(90, 60), "PNG", orientation)
    with Image.open(io.BytesIO(data)) as image:
        ours = images.prepared(image, classifier.preprocess).astype(int)
    pixels, _ = images.decode(data, classifier.preprocess)
    assert abs(ours - pixels).max() <= 2


def test_what_cannot_be_read_is_said(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.png"):
        classifier.predict(tmp_path / "none.png")
    with pytest.raises(ImageError):
        classifier.predict([b"no image"])
    cut = Image.open(io.BytesIO(encoded(drawn(300, 200), "JPEG")[:2000]))
    with pytest.raises(ImageError):
        classifier.predict(cut)


def test_a_notebook_shows_pictures_with_bars(classifier: Classifier, tmp_path: Path) -> None:
    named = tmp_path / "<i>red.png"
    draw("red").save(named)
    found = classifier.predict([named, draw("blue"), named.read_bytes()] + [draw("red")] * 30)
    page = tmp_path / "cell.html"
    page.write_text(f"<meta charset=utf-8>{found._repr_html_()}")
    with opened(f"file://{page}") as shown:
        assert shown.page.locator("img").count() == 24
        assert shown.page.locator("progress").count() == 24 * 3
        assert "<i>red.png" in shown.page.inner_text("body")
        assert "and 9 more" in shown.page.inner_text("body")
        shown.screenshot("notebook")
        assert shown.errors == []
    named.unlink()  # a picture that is gone is left out
    assert found[0]._repr_html_().count("<img") == 0
    assert "Prediction(label=" in repr(found[0])
    assert "source" not in repr(found[0])
