"""A service of a model with any number of labels per image, over HTTP and in a browser."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from imgcls.client import Client
from imgcls.models.classifier import Classifier
from tests.browser import opened
from tests.conftest import draw
from tests.serving.app import Running, jpeg, post, recalibrate, serving


@pytest.fixture(scope="module")
def multilabel(multilabel_bundle: Path) -> Iterator[Running]:
    with serving(multilabel_bundle) as running:
        yield running


def test_a_row_has_all_labels_that_reach_their_thresholds(
    multilabel: Running, multilabel_bundle: Path
) -> None:
    data = jpeg()
    expected = Classifier.load(str(multilabel_bundle), device="cpu").predict([data], top_k=2)[0]
    assert expected.labels == ["red", "blue"]
    answer = post(multilabel, data, params={"top_k": 2}).json()
    assert answer["predictions"] == [
        {
            "row": 0,
            "name": None,
            "predicted_labels": ["red", "blue"],
            "accepted": True,
            "topk_labels": ["red", "green"],
            "topk_scores": expected.topk_scores,
            "width": 64,
            "height": 48,
            "status": "ok",
            "error": None,
        }
    ]


@pytest.mark.parametrize(
    ("threshold", "labels"), [(0.5, ["red", "green"]), (0.95, []), (0.0, ["red", "green", "blue"])]
)
def test_a_threshold_of_the_request_replaces_those_of_all_classes(
    multilabel: Running, threshold: float, labels: list[str]
) -> None:
    with Client(multilabel.url) as client:
        (row,) = client.predict(jpeg(), threshold=threshold)
    assert row["predicted_labels"] == labels
    assert row["accepted"] == bool(labels)


def test_scores_of_all_classes_come_on_request(multilabel: Running, server: Running) -> None:
    for running in (multilabel, server):
        with Client(running.url) as client:
            (plain,) = client.predict(jpeg())
            (row,) = client.predict(jpeg(), scores=True, top_k=3)
        assert "scores" not in plain
        assert list(row["scores"]) == ["red", "green", "blue"]
        for name, score in zip(row["topk_labels"], row["topk_scores"], strict=True):
            assert row["scores"][name] == score


def test_an_image_without_a_prediction_has_the_keys_of_the_others(multilabel: Running) -> None:
    with Client(multilabel.url) as client:
        good, bad = client.predict([jpeg(), b"no image"])
    assert list(bad) == list(good)
    assert (bad["status"], bad["accepted"]) == ("not_an_image", False)
    assert bad["predicted_labels"] is None


def test_the_model_names_its_task_and_the_thresholds_in_effect(
    multilabel: Running, multilabel_bundle: Path, server: Running
) -> None:
    with Client(multilabel.url) as client:
        description = client.model()
    assert description["task"] == "multilabel"
    assert description["thresholds"] == {"green": 0.7, "blue": 0.2}
    assert requests.get(f"{server.url}/v1/model", timeout=10).json()["task"] == "single_label"
    with serving(multilabel_bundle, threshold=0.95) as running, Client(running.url) as client:
        description = client.model()
        assert (description["threshold"], description["thresholds"]) == (0.95, {})
        assert client.predict(jpeg())[0]["predicted_labels"] == []


def test_every_response_is_described(multilabel: Running) -> None:
    description = schemathesis.openapi.from_url(f"{multilabel.url}/openapi.json")
    for path, method in (("/v1/predict", "POST"), ("/v1/model", "GET")):

        @given(case=description[path][method].as_strategy())
        @settings(max_examples=20, suppress_health_check=list(HealthCheck))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(
                base_url=multilabel.url,
                excluded_checks=[ignored_auth, positive_data_acceptance],  # there are no keys
            )

        check()
    schema = requests.get(f"{multilabel.url}/openapi.json", timeout=10).json()
    row = schema["components"]["schemas"]["PredictionRow"]
    names = {"predicted_label", "confidence", "predicted_labels", "scores"}
    assert not names & set(row["required"])
    assert names <= set(row["properties"])


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_shows_labels_as_chips_and_marks_thresholds(
    multilabel: Running, tmp_path: Path, width: int
) -> None:
    draw("red", (320, 240)).save(tmp_path / "red.jpg")
    with opened(multilabel.url, width=width, height=844) as page:
        card = page.page.locator("#results > li").first
        files = page.page.locator("#files")
        page.page.wait_for_function(
            "() => document.querySelector('fieldset').textContent.includes('Minimum score')"
        )
        assert "Scores per image" in page.page.inner_text("fieldset")

        files.set_input_files(str(tmp_path / "red.jpg"))
        card.locator(".took").wait_for()
        assert card.locator(".chip").all_inner_texts() == ["red", "blue"]
        page.check_accessible("dark", "light")
        assert card.locator(".badge").all_inner_texts() == ["accepted"]
        assert card.locator("img").get_attribute("alt") == "red, blue, accepted"
        marks = card.locator(".mark")
        titles = [marks.nth(i).get_attribute("title") for i in range(marks.count())]
        assert titles == ["threshold 50.0 %", "threshold 70.0 %", "threshold 20.0 %"]
        assert card.locator("li.below").all_inner_texts() == [
            card.locator("ol.scores > li").nth(1).inner_text()
        ]
        bar, mark = card.locator(".bar").nth(1).bounding_box(), marks.nth(1).bounding_box()
        middle = mark["x"] + mark["width"] / 2
        assert (middle - bar["x"]) / bar["width"] == pytest.approx(0.7, abs=0.01)

        page.page.fill("#threshold", "0.95")
        files.set_input_files(str(tmp_path / "red.jpg"))
        page.page.locator("#results > li").nth(1).wait_for()
        card.locator(".took").wait_for()
        assert card.locator(".label").inner_text() == "no label"
        assert card.locator(".badge").count() == 0
        assert card.locator("img").get_attribute("alt") == "no label"
        assert card.locator("li.below").count() == 3
        assert card.locator(".mark").first.get_attribute("title") == "threshold 95.0 %"
        page.screenshot(f"serve-multilabel-{width}")
        assert page.page.evaluate("() => document.documentElement.scrollWidth") <= width
        assert page.errors == []


def test_the_page_marks_the_thresholds_of_a_reloaded_model(
    multilabel_bundle: Path, tmp_path: Path
) -> None:
    draw("red", (320, 240)).save(tmp_path / "red.jpg")
    copy = tmp_path / "bundle"
    shutil.copytree(multilabel_bundle, copy)
    with serving(copy) as running, opened(running.url) as page:
        page.page.wait_for_function(
            "() => document.querySelector('#about').textContent.includes('3 classes')"
        )
        recalibrate(copy)
        update = running.service.update(running.service.config)
        assert asyncio.run_coroutine_threadsafe(update, running.loop).result(60)
        page.page.locator("#files").set_input_files(str(tmp_path / "red.jpg"))
        page.page.locator("#results .took").wait_for()
        assert page.page.locator("#results .mark").count() == 3
        assert running.service.model.sha256[:12] in page.page.inner_text("#about")
