"""Predicting from whatever a notebook has at hand, and what it shows of the answer."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from imgcls.data import image_files
from imgcls.data.decoding import decode
from imgcls.errors import EmptyImage, ImageError, NotAnImage, RequestError, StorageError
from imgcls.models.classifier import Classifier
from tests.browser import opened
from tests.conftest import draw
from tests.data.pictures import STORED, drawn, encoded, stored


@pytest.fixture
def classifier(color_bundle: Path) -> Classifier:
    return Classifier.load(str(color_bundle), device="cpu")


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
        ours = decode.preprocess_pil_image(image, classifier.preprocess).astype(int)
    pixels, _ = decode.decode_image(data, classifier.preprocess)
    assert abs(ours - pixels).max() <= 2


def test_what_cannot_be_read_is_reported(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.png"):
        classifier.predict(tmp_path / "none.png")
    with pytest.raises(ImageError):
        classifier.predict([b"no image"])
    cut = Image.open(io.BytesIO(encoded(drawn(300, 200), "JPEG")[:2000]))
    with pytest.raises(ImageError):
        classifier.predict(cut)
    with io.BytesIO(encoded(drawn(30, 20), "PNG")) as stream:
        closed = Image.open(stream)
    with pytest.raises(ImageError, match="closed file"):
        classifier.predict(closed)


@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
def test_an_image_without_pixels_has_no_prediction(color_bundle: Path, mode: Any) -> None:
    classifier = Classifier.load(str(color_bundle), device="cpu")
    classifier.preprocess = classifier.preprocess.model_copy(update={"mode": mode})
    outside = draw("red").crop((3, 3, 3, 9))
    given = [np.zeros((0, 8, 3), np.uint8), np.zeros((8, 0), np.uint8), outside, draw("red")]
    found = classifier.predict(given, errors="return")
    assert [each.status for each in found] == ["empty"] * 3 + ["ok"]
    assert found[0].error == "image 0 (ndarray): the image has no pixels: 8 x 0"
    with pytest.raises(EmptyImage, match="image 0"):
        classifier.explain(outside, classifier.classes[0])


def test_the_bytes_of_one_image_may_be_of_any_type(classifier: Classifier) -> None:
    data = encoded(drawn(30, 20), "PNG")
    (expected,) = classifier.predict(data)
    assert classifier.predict(bytearray(data)) == [expected]
    assert classifier.predict(memoryview(data)) == [expected]


def test_a_file_above_the_limit_has_the_status_of_a_labeling_run(
    classifier: Classifier, tmp_path: Path
) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(image_files.MAX_IMAGE_BYTES + 1)
    (found,) = classifier.predict(tmp_path / "huge.jpg", errors="return")
    assert found.status == "too_large"


def test_a_notebook_shows_images_of_every_type(classifier: Classifier, tmp_path: Path) -> None:
    draw("red").save(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes()
    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    column = pa.array([str(tmp_path / "red.png")])
    given: list[Any] = [
        bytearray(data),
        memoryview(data),
        np.asarray(draw("red")),
        deep,
        *column,
        *pa.array([data]),
    ]
    found = classifier.predict(given)
    assert [each._repr_html_().count("<img") for each in found] == [1] * len(given)
    assert found[4].source == str(tmp_path / "red.png")
    assert deep.size == (8, 8)


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


def test_a_notebook_shows_all_labels_of_a_multilabel_model(
    multilabel_bundle: Path, tmp_path: Path
) -> None:
    classifier = Classifier.load(str(multilabel_bundle), device="cpu")
    (found,) = classifier.predict(draw("red"))
    assert found.labels == ["red", "blue"]
    assert "<b>red</b>, <b>blue</b> accepted" in found._repr_html_()
    unlike = replace(found, accepted=False, is_ood=True)
    assert "<b>red</b>, <b>blue</b> abstained" in unlike._repr_html_()
    none = replace(found, labels=[], accepted=False)
    html = none._repr_html_()
    assert "<b>no label</b>" in html
    assert "abstained" not in html
    assert "<b>red</b>" not in html
    assert html.count("<progress") == 3
    nasty = replace(found, labels=["<i>"])._repr_html_()
    assert "<i>" not in nasty


# ------------------------------------------------------------------ what may be given


def test_iterables_and_arrays_are_images_too(classifier: Classifier, tmp_path: Path) -> None:
    names = ["red", "green", "blue"]
    for name in names:
        draw(name).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in names]
    expected = [each.topk_labels for each in classifier.predict(paths)]
    arrays = [np.asarray(draw(name)) for name in names]
    frame = pd.DataFrame({"path": [str(path) for path in paths]})
    ways = {
        "generator": (path for path in paths),
        "tuple": tuple(paths),
        "series": frame["path"],
        "object array": frame["path"].to_numpy(object),
        "text array": np.array([str(path) for path in paths]),
        "arrow": pa.array([str(path) for path in paths]),
        "arrays": arrays,
        "one array of many": np.stack(arrays),
    }
    for way, given in ways.items():
        found = classifier.predict(given, batch_size=2)
        assert [each.topk_labels for each in found] == expected, way
    assert classifier.predict(arrays[1])[0].topk_labels == expected[1]
    grey = np.asarray(draw("red").convert("L"))
    assert len(classifier.predict(grey)) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            pd.DataFrame({"path": ["a.png"]}),
            r"a DataFrame is not a list of images; .*frame\['path'\]",
        ),
        ({"a.png": 1}, "a dict is not a list of images"),
        (7, "got a int; pass a path, a URL"),
        ([7], r"image 0 \(int\): is a int; pass a path, a URL"),
        ([None], r"image 0 \(NoneType\)"),
        (np.zeros((4, 4, 3)), r"image 0 \(ndarray\): is an array float64 \(4, 4, 3\); pass uint8"),
        (np.zeros((3, 64, 64), np.uint8), r"is an array uint8 \(3, 64, 64\); pass uint8"),
    ],
    ids=["frame", "dict", "number", "numbers", "none", "floats", "channels first"],
)
def test_what_is_no_image_is_refused_with_what_is(
    classifier: Classifier, given: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        classifier.predict(given, errors="return")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "5"])
@pytest.mark.parametrize("name", ["top_k", "batch_size"])
def test_numbers_below_one_are_refused(classifier: Classifier, name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name}: {value!r} is not an integer of at least"):
        classifier.predict(draw("red"), **{name: value})


def test_a_top_k_above_the_classes_gives_them_all(classifier: Classifier) -> None:
    assert len(classifier.predict(draw("red"), top_k=99)[0].topk_labels) == 3


def test_one_bad_image_is_named_or_is_answered_in_its_place(
    classifier: Classifier, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    draw("green").save(good)
    bad.write_bytes(b"<html>")
    gone = tmp_path / "gone.png"
    with pytest.raises(NotAnImage, match=r"bad\.png: "):
        classifier.predict([good, bad, good])
    with pytest.raises(NotAnImage, match=r"image 1 \(bytes\): "):
        classifier.predict([good, b"<html>"])
    found = classifier.predict([good, bad, gone, b"", good], errors="return", batch_size=2)
    assert [each.status for each in found] == ["ok", "not_an_image", "missing", "empty", "ok"]
    assert found[0].topk_scores == found[4].topk_scores == classifier.predict(good)[0].topk_scores
    failed = found[1]
    assert (failed.label, failed.confidence, failed.accepted) == (None, None, False)
    assert failed.source == bad
    assert str(bad) in str(failed.error)
    assert "no prediction" in found._repr_html_()
    assert all(each.status != "ok" for each in classifier.predict([bad], errors="return"))
