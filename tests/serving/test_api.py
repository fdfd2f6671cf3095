"""The HTTP interface over real HTTP: responses, rejected requests, headers for browsers."""

from __future__ import annotations

import asyncio
import io
import shutil
import socket
from pathlib import Path

import pytest
import requests
import torch
from PIL import Image

from imgcls.client import Client, ServiceError
from imgcls.models.bundle import load_bundle, load_bundle_weights, save_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.label_sets import LabelSets
from tests.models.test_ood import with_detector
from tests.serving.app import (
    Running,
    assert_problem,
    jpeg,
    png_header,
    post,
    recalibrate,
    serving,
)

# ---------------------------------------------------------------------- responses


def test_an_image_gets_the_prediction_of_the_classifier(
    server: Running, color_bundle: Path
) -> None:
    data = jpeg()
    expected = Classifier.load(str(color_bundle), device="cpu").predict([data], top_k=2)[0]
    response = post(server, data, params={"top_k": 2})
    assert response.status_code == 200
    answer = response.json()
    assert answer["model"] == server.service.model.sha256
    assert answer["predictions"] == [
        {
            "row": 0,
            "name": None,
            "predicted_label": expected.label,
            "confidence": expected.confidence,
            "accepted": True,
            "topk_labels": expected.topk_labels,
            "topk_scores": expected.topk_scores,
            "width": 64,
            "height": 48,
            "status": "ok",
            "error": None,
        }
    ]


def test_a_rejected_image_among_several_is_a_row(server: Running) -> None:
    with Client(server.url) as client:
        rows = client.predict([jpeg("red"), b"no image", jpeg("blue"), jpeg()[:400], b""])
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["status"] for row in rows] == [*("ok", "not_an_image", "ok", "truncated", "empty")]
    for row in rows:
        good = row["status"] == "ok"
        assert (row["predicted_label"] is not None) == good
        assert (row["error"] is None) == good
        assert row["accepted"] == good


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/model", "/", "/openapi.json"])
def test_head_is_get_without_the_body(server: Running, path: str) -> None:
    whole = requests.get(server.url + path, timeout=60)
    head = requests.head(server.url + path, timeout=60)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == str(len(whole.content))
    assert head.headers["Content-Type"] == whole.headers["Content-Type"]


def test_head_of_a_post_route_is_rejected(server: Running) -> None:
    assert requests.head(f"{server.url}/v1/predict", timeout=60).status_code == 405


def test_a_threshold_of_the_request_decides_what_is_accepted(server: Running) -> None:
    with Client(server.url) as client:
        (row,) = client.predict(jpeg(), threshold=1.0)
        assert row["accepted"] is False
        (row,) = client.predict(jpeg(), threshold=0.0)
        assert row["accepted"] is True


def test_embeddings_come_on_request(server: Running, color_bundle: Path) -> None:
    with Client(server.url) as client:
        (plain,) = client.predict(jpeg())
        (row,) = client.predict(jpeg(), embeddings=True)
    assert "embedding" not in plain
    assert len(row["embedding"]) == Classifier.load(str(color_bundle), device="cpu").embedding_width
    assert row["topk_scores"] == plain["topk_scores"]


def test_the_client_takes_paths_and_returns_their_names(server: Running, tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(jpeg())
    with Client(server.url) as client:
        (row,) = client.predict(tmp_path / "one.jpg")
        assert row["name"] == "one.jpg"
        assert client.model()["classes"] == ["red", "green", "blue"]
        with pytest.raises(ServiceError, match="begin with") as caught:
            client.predict(b"no image")
        assert (caught.value.status, caught.value.kind) == (415, "not_an_image")


def test_the_model_is_described(server: Running) -> None:
    description = requests.get(f"{server.url}/v1/model", timeout=10).json()
    assert description["classes"] == ["red", "green", "blue"]
    assert description["sha256"] == server.service.model.sha256
    assert description["engine"] == f"torch {torch.__version__}"
    assert description["preprocess"]["crop"] == 32 or description["preprocess"]["crop"] > 0
    for path in ("/healthz", "/readyz"):
        response = requests.get(f"{server.url}{path}", timeout=10)
        assert (response.status_code, response.text) == (200, "ok")


def test_the_threshold_in_effect_is_the_one_described(color_bundle: Path) -> None:
    with serving(color_bundle, threshold=0.99) as running, Client(running.url) as client:
        description = client.model()
        assert (description["threshold"], description["thresholds"]) == (0.99, {})
        assert client.predict(jpeg())[0]["accepted"] is False


def test_label_sets_are_in_the_responses_of_a_model_that_has_them(
    server: Running, color_bundle: Path, tmp_path: Path
) -> None:
    with Client(server.url) as client:
        assert "label_set" not in client.predict(jpeg())[0]
        assert client.model()["label_set_coverage"] is None
    plain = load_bundle(str(color_bundle))
    sets = LabelSets(coverage=0.9, thresholds=[0.5])
    save_bundle(
        str(tmp_path / "bundle"),
        plain.spec.model_copy(update={"label_sets": sets}),
        load_bundle_weights(plain),
    )
    with serving(tmp_path / "bundle") as running, Client(running.url) as client:
        (row,) = client.predict(jpeg())
        assert client.model()["label_set_coverage"] == 0.9
    expected = (
        Classifier.load(str(tmp_path / "bundle"), device="cpu").predict([jpeg()])[0].label_set
    )
    assert row["label_set"] == expected == row["topk_labels"][: len(expected or [])]


def test_ood_scores_are_in_the_responses_of_a_model_that_has_them(
    server: Running, color_bundle: Path, tmp_path: Path
) -> None:
    with Client(server.url) as client:
        assert "ood_score" not in client.predict(jpeg())[0]
        assert client.model()["ood_rate"] is None
    made = with_detector(color_bundle, tmp_path / "bundle", -1.0)
    (expected,) = Classifier(made, device="cpu").predict([jpeg()])
    with serving(tmp_path / "bundle") as running, Client(running.url) as client:
        (row,) = client.predict(jpeg(), threshold=0.0)
        assert client.model()["ood_rate"] == 0.05
    assert (row["is_ood"], row["accepted"]) == (True, False)
    assert row["ood_score"] == pytest.approx(expected.ood_score, abs=1e-6)
    assert "embedding" not in row


def test_a_response_names_the_model_that_was_used(color_bundle: Path, tmp_path: Path) -> None:
    """Also if it was replaced while the request was being sent."""
    bundle = tmp_path / "bundle"
    shutil.copytree(color_bundle, bundle)
    with serving(bundle) as running:
        before = running.service.model.sha256
        body = jpeg()
        with socket.create_connection(("127.0.0.1", running.port), 30) as connection:
            connection.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n"
                b"Expect: 100-continue\r\n\r\n" % len(body)
            )
            assert connection.recv(100).startswith(
                b"HTTP/1.1 100 "
            )  # the service waits for the body
            recalibrate(bundle)
            swap = running.service.update(running.service.config)
            assert asyncio.run_coroutine_threadsafe(swap, running.loop).result(60)
            connection.sendall(body)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    after = running.service.model.sha256
    assert before != after
    assert after.encode() in answer
    assert before.encode() not in answer


def test_an_internal_error_is_a_problem(color_bundle: Path) -> None:
    with serving(color_bundle) as running:
        running.service._batcher._run_batch = lambda items: [None] * len(items)
        response = post(running, jpeg())
        assert_problem(response, 500, "internal_error")
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        # and the service answers the next request
        assert requests.get(f"{running.url}/healthz", timeout=10).status_code == 200


def test_a_draining_service_is_not_ready_and_still_answers(server: Running) -> None:
    server.service.is_draining = True
    try:
        response = requests.get(f"{server.url}/readyz", timeout=10)
        assert_problem(response, 503, "draining")
        assert response.headers["Retry-After"]
        assert post(server, jpeg()).status_code == 200
    finally:
        server.service.is_draining = False


# ---------------------------------------------------------------------- rejected requests


@pytest.mark.parametrize(
    ("data", "status", "kind"),
    [
        (b"<html>no</html>", 415, "not_an_image"),
        (b"%PDF-1.7\n", 415, "unsupported"),
        (jpeg()[:500], 422, "truncated"),
        (b"", 422, "empty"),
        (png_header(50_000, 50_000), 413, "too_large"),
        (jpeg() + bytes(2 << 20), 413, "too_many_bytes"),
    ],
)
def test_an_image_that_cannot_be_used_is_a_problem(
    server: Running, data: bytes, status: int, kind: str
) -> None:
    assert_problem(post(server, data), status, kind)


@pytest.mark.parametrize(
    ("query", "named"),
    [("top_k=0", "top_k"), ("top_k=x", "top_k"), ("threshold=1.5", "threshold")],
)
def test_a_wrong_parameter_is_named(server: Running, query: str, named: str) -> None:
    response = requests.post(f"{server.url}/v1/predict?{query}", jpeg(), timeout=10)
    assert named in str(assert_problem(response, 400, "invalid_parameter")["detail"])


def test_other_content_types_are_rejected(server: Running) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"url": "http://169.254.169.254/latest/meta-data"}'
    assert_problem(post(server, body, headers=headers), 415, "unsupported_body")
    headers = {"Content-Type": "multipart/form-data"}
    assert_problem(post(server, jpeg(), headers=headers), 400, "malformed_form")
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_problem(post(server, b"--x\r\nnonsense", headers=headers), 400, "malformed_form")
    assert_problem(post(server, b"--x--\r\n", headers=headers), 400, "no_image")
    form = requests.post(f"{server.url}/v1/predict", files={"a": (None, "text")}, timeout=10)
    assert_problem(form, 400, "no_image")


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2fpage.py", "/x"]
)
def test_no_file_is_served(server: Running, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"root:" not in answer


def test_a_wrong_method_is_a_problem(server: Running) -> None:
    response = requests.delete(f"{server.url}/v1/model", timeout=10)
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "GET"


# ---------------------------------------------------------------------- browsers


def test_every_response_has_security_headers(server: Running) -> None:
    for path in ("/", "/v1/model", "/nothing", "/healthz"):
        headers = requests.get(f"{server.url}{path}", timeout=10).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in headers


def test_an_image_without_finite_scores_is_an_error(overflowing_bundle: Path) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (64, 48), "white").save(sink, "PNG")
    with serving(overflowing_bundle, precision="fp32") as running:
        files = [("image", ("red.jpg", jpeg())), ("image", ("white.png", sink.getvalue()))]
        answer = requests.post(f"{running.url}/v1/predict", files=files, timeout=30)
    assert answer.status_code == 200, answer.text
    red, white = answer.json()["predictions"]
    assert (red["status"], white["status"]) == ("ok", "not_finite")
    assert "outputs NaN or infinity for this image" in white["error"]
    assert white["predicted_label"] is None
    assert white["confidence"] is None
    assert white["accepted"] is False
