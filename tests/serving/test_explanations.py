"""Explanations over HTTP: on request, bounded, and apart from the predictions."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from imgcls.client import Client
from imgcls.errors import BundleError
from imgcls.serving import explanations
from imgcls.serving.explanations import EXPLANATION_COST
from tests.serving.app import Running, assert_problem, jpeg, post, serving


def test_a_row_has_an_overlay_on_request(server: Running) -> None:
    plain = post(server, jpeg()).json()["predictions"][0]
    row = post(server, jpeg(), params={"explain": "true"}).json()["predictions"][0]
    explanation = row.pop("explanation")
    assert row == plain
    assert explanation["label"] == row["predicted_label"]
    head, _, data = explanation["image"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (192, 144)


def test_the_client_gets_explanations(server: Running, multilabel_bundle: Path) -> None:
    with Client(server.url) as client:
        rows = client.predict([jpeg("red"), b"no image"], explain=True)
    assert rows[0]["explanation"]["label"] == rows[0]["predicted_label"]
    assert "explanation" not in rows[1]
    with serving(multilabel_bundle) as several, Client(several.url) as client:
        row = client.predict(jpeg(), explain=True)[0]
    assert row["explanation"]["label"] == row["predicted_labels"][0]


def test_few_images_are_explained_per_request(color_bundle: Path) -> None:
    with serving(color_bundle, limits__explained_images=2) as running:
        files = [("image", jpeg(seed=seed)) for seed in range(3)]
        url = f"{running.url}/v1/predict"
        problem = assert_problem(
            requests.post(url, files=files, params={"explain": "true"}, timeout=60),
            413,
            "too_many_images",
        )
        assert "at most 2" in problem["detail"]
        assert requests.post(url, files=files, timeout=60).ok


def test_an_explanation_counts_as_several_images(locked: Running, keys: dict[str, str]) -> None:
    # 30 images per minute: 5 at once
    headers = {"Authorization": f"Bearer {keys['slow']}"}
    assert EXPLANATION_COST == 4
    assert post(locked, jpeg(), headers=headers, params={"explain": "true"}).ok
    assert_problem(post(locked, jpeg(), headers=headers), 429, "too_many_requests")


def test_more_images_than_may_wait_are_answered_with_busy(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanations, "MAX_WAITING", 0)
    problem = post(server, jpeg(), params={"explain": "true"})
    assert_problem(problem, 503, "busy")
    assert problem.headers["Retry-After"]
    assert post(server, jpeg()).ok


def test_a_network_that_cannot_be_explained_is_reported_and_still_predicts(
    color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise BundleError("bundle b: Flat: has no feature map")

    monkeypatch.setattr(explanations, "Explainer", refuse)
    with serving(color_bundle) as running:
        problem = assert_problem(
            post(running, jpeg(), params={"explain": "true"}), 501, "not_explainable"
        )
        assert "no feature map" in problem["detail"]
        assert post(running, jpeg()).ok


def test_no_second_network_is_loaded_without_a_request_for_it(color_bundle: Path) -> None:
    with serving(color_bundle) as running:
        post(running, jpeg())
        assert running.service.model.explainer._explainer is None
        post(running, jpeg(), params={"explain": "true"})
        assert running.service.model.explainer._explainer is not None
