"""Explanations over HTTP: on request, bounded, and apart from the predictions."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from imgcls.client import Client
from imgcls.config import build
from imgcls.errors import ConfigError, NotExplainable
from imgcls.models.explain import Explainer
from imgcls.serving import explanations
from imgcls.serving.config import ServeConfig
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


def test_an_explanation_counts_as_several_images(color_bundle: Path, keys: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {keys['slow']}"}  # 30 images per minute: 5 at once
    assert EXPLANATION_COST == 4
    with serving(color_bundle, keys__file=keys["file"]) as running:
        assert post(running, jpeg(), headers=headers, params={"explain": "true"}).ok
        assert_problem(post(running, jpeg(), headers=headers), 429, "too_many_requests")


def test_more_images_than_may_wait_are_answered_with_busy(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanations, "MAX_WAITING_EXPLANATIONS", 0)
    problem = post(server, jpeg(), params={"explain": "true"})
    assert_problem(problem, 503, "busy")
    assert problem.headers["Retry-After"]
    assert post(server, jpeg()).ok


def test_a_network_that_cannot_be_explained_is_reported_and_still_predicts(
    color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NotExplainable("bundle b: Flat: has no feature map")

    monkeypatch.setattr(explanations, "Explainer", refuse)
    with serving(color_bundle) as running:
        problem = assert_problem(
            post(running, jpeg(), params={"explain": "true"}), 501, "not_explainable"
        )
        assert "no feature map" in problem["detail"]
        assert post(running, jpeg()).ok


@pytest.mark.parametrize("is_gone", [True, False])
def test_weights_that_were_replaced_are_reported_and_read_once(
    color_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(color_bundle, bundle)
    loads = []

    def count_loads(*arguments: Any) -> Explainer:
        loads.append(arguments)
        return Explainer(*arguments)

    monkeypatch.setattr(explanations, "Explainer", count_loads)
    with serving(bundle) as running:
        if is_gone:
            (bundle / "model.safetensors").unlink()
        else:
            (bundle / "model.safetensors").write_bytes(b"another")
        for _ in range(2):
            problem = assert_problem(
                post(running, jpeg(), params={"explain": "true"}), 503, "weights_unavailable"
            )
            assert "reload the model" in problem["detail"]
        assert len(loads) == 1
        assert post(running, jpeg()).ok


def test_several_images_pass_a_small_rate_limit_when_its_bucket_is_full(
    color_bundle: Path, keys: dict[str, str]
) -> None:
    headers = {"Authorization": f"Bearer {keys['slow']}"}  # 5 images at once
    with serving(color_bundle, keys__file=keys["file"]) as running:
        files = [("image", jpeg(seed=seed)) for seed in range(3)]
        url = f"{running.url}/v1/predict"
        explained = requests.post(
            url, files=files, params={"explain": "true"}, headers=headers, timeout=60
        )
        assert explained.ok, explained.text
        assert_problem(post(running, jpeg(), headers=headers), 429, "too_many_requests")
    with serving(color_bundle, keys__file=keys["file"]) as running:
        files = [("image", jpeg(seed=seed)) for seed in range(7)]
        url = f"{running.url}/v1/predict"
        assert requests.post(url, files=files, headers=headers, timeout=60).ok


def test_a_refused_explanation_is_not_counted(color_bundle: Path, keys: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {keys['slow']}"}
    with serving(color_bundle, keys__file=keys["file"], limits__explained_images=0) as running:
        for _ in range(3):
            problem = assert_problem(
                post(running, jpeg(), headers=headers, params={"explain": "true"}),
                501,
                "explanations_off",
            )
            assert "limits.explained_images is 0" in problem["detail"]
        assert post(running, jpeg(), headers=headers).ok
        with Client(running.url, key=keys["slow"]) as client:
            assert client.model()["explained_images"] == 0


def test_a_request_may_not_have_more_explained_images_than_may_wait() -> None:
    build(ServeConfig, {"model": "m", "limits.explained_images": 16})
    with pytest.raises(ConfigError, match="explained_images"):
        build(ServeConfig, {"model": "m", "limits.explained_images": 17})


def test_no_second_network_is_loaded_without_a_request_for_it(color_bundle: Path) -> None:
    with serving(color_bundle) as running:
        post(running, jpeg())
        assert running.service.model.explainer._explainer is None
        post(running, jpeg(), params={"explain": "true"})
        assert running.service.model.explainer._explainer is not None
