"""The HTTP interface over real HTTP: answers, refusals, and what attackers try."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imgcls.client import Client, ServiceError
from imgcls.config import build
from imgcls.models.classifier import Classifier
from imgcls.serving.api_keys import NewKeyConfig, create_key
from tests.conftest import REPOSITORY, draw
from tests.processes import service_port, wait_for
from tests.serving.app import Running, recalibrate, serving


def jpeg(name: str = "red", seed: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    sink = io.BytesIO()
    draw(name, size, seed).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces its size, and is otherwise a kilobyte of nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed)


@pytest.fixture(scope="module")
def server(colour_bundle: Path) -> Iterator[Running]:
    with serving(colour_bundle, limits__image_bytes=1 << 20, limits__body_bytes=4 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A key file with keys of all kinds; `file` is where it is."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = {"file": str(file)}
    for name, more in {
        "nightly": {},
        "ops": {"scopes": ["admin"]},
        "slow": {"images_per_minute": 30},
    }.items():
        made[name] = create_key(build(NewKeyConfig, {"file": str(file), "name": name, **more}))
    return made


@pytest.fixture(scope="module")
def locked(colour_bundle: Path, keys: dict[str, str]) -> Iterator[Running]:
    with serving(colour_bundle, keys__file=keys["file"]) as running:
        yield running


def post(running: Running, data: bytes, **options: object) -> requests.Response:
    headers = {"Content-Type": "image/jpeg", **options.pop("headers", {})}  # type: ignore[dict-item]
    return requests.post(
        f"{running.url}/v1/predict",
        data,
        headers=headers,
        timeout=60,
        **options,  # type: ignore[arg-type]
    )


def refused(response: requests.Response, status: int, kind: str) -> dict[str, object]:
    """The problem that a response is."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, object] = response.json()
    assert problem["type"] == f"urn:imgcls:problem:{kind}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem


# ---------------------------------------------------------------------- answers


def test_an_image_gets_what_the_classifier_says(server: Running, colour_bundle: Path) -> None:
    data = jpeg()
    expected = Classifier.load(str(colour_bundle)).predict([data], top_k=2)[0]
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


def test_of_several_images_a_bad_one_is_a_row(server: Running) -> None:
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


def test_head_of_what_only_posts_is_refused(server: Running) -> None:
    assert requests.head(f"{server.url}/v1/predict", timeout=60).status_code == 405


def test_a_threshold_of_the_request_decides_what_is_accepted(server: Running) -> None:
    with Client(server.url) as client:
        (row,) = client.predict(jpeg(), threshold=1.0)
        assert row["accepted"] is False
        (row,) = client.predict(jpeg(), threshold=0.0)
        assert row["accepted"] is True


def test_embeddings_come_on_request(server: Running, colour_bundle: Path) -> None:
    with Client(server.url) as client:
        (plain,) = client.predict(jpeg())
        (row,) = client.predict(jpeg(), embeddings=True)
    assert "embedding" not in plain
    assert len(row["embedding"]) == Classifier.load(str(colour_bundle)).embedding_width
    assert row["topk_scores"] == plain["topk_scores"]


def test_the_client_takes_paths_and_tells_their_names(server: Running, tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(jpeg())
    with Client(server.url) as client:
        (row,) = client.predict(tmp_path / "one.jpg")
        assert row["name"] == "one.jpg"
        assert client.model()["classes"] == ["red", "green", "blue"]
        with pytest.raises(ServiceError, match="begin with") as caught:
            client.predict(b"no image")
        assert (caught.value.status, caught.value.kind) == (415, "not_an_image")


def test_the_model_is_described(server: Running) -> None:
    said = requests.get(f"{server.url}/v1/model", timeout=10).json()
    assert said["classes"] == ["red", "green", "blue"]
    assert said["sha256"] == server.service.model.sha256
    assert said["preprocess"]["crop"] == 32 or said["preprocess"]["crop"] > 0
    for path in ("/healthz", "/readyz"):
        response = requests.get(f"{server.url}{path}", timeout=10)
        assert (response.status_code, response.text) == (200, "ok")


def test_the_threshold_in_force_is_the_one_described(colour_bundle: Path) -> None:
    with serving(colour_bundle, threshold=0.99) as running, Client(running.url) as client:
        said = client.model()
        assert (said["threshold"], said["thresholds"]) == (0.99, {})
        assert client.predict(jpeg())[0]["accepted"] is False


def test_an_answer_names_the_model_that_it_comes_from(colour_bundle: Path, tmp_path: Path) -> None:
    """Though another one was there when the request began."""
    bundle = tmp_path / "bundle"
    shutil.copytree(colour_bundle, bundle)
    with serving(bundle) as running:
        before = running.service.model.sha256
        body = jpeg()
        with socket.create_connection(("127.0.0.1", running.port), 30) as connection:
            connection.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n"
                b"Expect: 100-continue\r\n\r\n" % len(body)
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 100 ")  # it waits for the body
            recalibrate(bundle)
            swap = running.service.update(running.service.config)
            assert asyncio.run_coroutine_threadsafe(swap, running.loop).result(60)
            connection.sendall(body)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    after = running.service.model.sha256
    assert before != after
    assert after.encode() in answer
    assert before.encode() not in answer


def test_a_defect_is_a_problem_too(colour_bundle: Path) -> None:
    with serving(colour_bundle) as running:
        running.service._batcher._run_batch = lambda items: [None] * len(items)
        response = post(running, jpeg())
        refused(response, 500, "internal_error")
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        # and the connection is good for the next one
        assert requests.get(f"{running.url}/healthz", timeout=10).status_code == 200


def test_what_is_draining_says_so_and_still_answers(server: Running) -> None:
    server.door.is_draining = True
    try:
        response = requests.get(f"{server.url}/readyz", timeout=10)
        refused(response, 503, "draining")
        assert response.headers["Retry-After"]
        assert post(server, jpeg()).status_code == 200
    finally:
        server.door.is_draining = False


# ---------------------------------------------------------------------- what is refused


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
    refused(post(server, data), status, kind)


@pytest.mark.parametrize(
    ("query", "named"),
    [("top_k=0", "top_k"), ("top_k=x", "top_k"), ("threshold=1.5", "threshold")],
)
def test_a_wrong_parameter_is_named(server: Running, query: str, named: str) -> None:
    response = requests.post(f"{server.url}/v1/predict?{query}", jpeg(), timeout=10)
    assert named in str(refused(response, 400, "invalid_parameter")["detail"])


def test_bodies_of_other_kinds_are_refused(server: Running) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"url": "http://169.254.169.254/latest/meta-data"}'
    refused(post(server, body, headers=headers), 415, "unsupported_body")
    headers = {"Content-Type": "multipart/form-data"}
    refused(post(server, jpeg(), headers=headers), 400, "malformed_form")
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    refused(post(server, b"--x\r\nnonsense", headers=headers), 400, "no_image")
    form = requests.post(f"{server.url}/v1/predict", files={"a": (None, "text")}, timeout=10)
    refused(form, 400, "no_image")


def test_a_path_or_url_in_a_form_is_never_opened(server: Running) -> None:
    for value in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.jpg"):
        form = {"image": (None, value), "url": (None, value), "path": (None, value)}
        response = requests.post(f"{server.url}/v1/predict", files=form, timeout=10)
        refused(response, 400, "no_image")
    names = {"image": ("../../../../etc/passwd", jpeg())}
    row = requests.post(f"{server.url}/v1/predict", files=names, timeout=10).json()["predictions"][
        0
    ]
    assert row["status"] == "ok"


def test_a_file_name_that_is_no_text_is_told_back_as_far_as_it_is(server: Running) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="\\ud800.jpg"\r\n\r\n'
        + jpeg()
        + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    response = post(server, body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["predictions"][0]["name"] == "?.jpg"


def test_too_many_images_are_refused_and_a_large_one_is_a_row(server: Running) -> None:
    many = [("image", ("i", b"x"))] * 65
    refused(
        requests.post(f"{server.url}/v1/predict", files=many, timeout=30), 413, "too_many_images"
    )
    with Client(server.url) as client:
        rows = client.predict([jpeg(), jpeg() + bytes(2 << 20)])
    assert [row["status"] for row in rows] == ["ok", "too_large"]
    assert "more than image_bytes" in rows[1]["error"]


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2fpage.py", "/x"]
)
def test_there_is_no_file_to_be_had(server: Running, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"root:" not in answer


def test_other_methods_are_problems_too(server: Running) -> None:
    response = requests.delete(f"{server.url}/v1/model", timeout=10)
    refused(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "GET"


# ---------------------------------------------------------------------- keys


def test_without_a_key_or_with_a_wrong_one_nobody_enters(
    locked: Running, keys: dict[str, str]
) -> None:
    for method, path in (
        *(("POST", "/v1/predict"), ("GET", "/v1/model")),
        *(("POST", "/v1/model/reload"), ("GET", "/metrics")),
    ):
        url = f"{locked.url}{path}"
        response = requests.request(method, url, timeout=10)
        refused(response, 401, "key_missing")
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        wrong = {"Authorization": f"Bearer {keys['nightly']}x"}
        refused(requests.request(method, url, headers=wrong, timeout=10), 401, "key_unknown")
        odd = {"X-API-Key": "caf\xe9".encode("latin-1")}
        refused(requests.request(method, url, headers=odd, timeout=10), 401, "key_unknown")
    for path in ("/", "/healthz", "/readyz", "/openapi.json"):
        assert requests.get(f"{locked.url}{path}", timeout=10).status_code == 200


def test_scopes_are_kept_apart(locked: Running, keys: dict[str, str]) -> None:
    predict = {"X-API-Key": keys["nightly"]}
    admin = {"Authorization": f"Bearer {keys['ops']}"}
    assert post(locked, jpeg(), headers=predict).status_code == 200
    refused(post(locked, jpeg(), headers=admin), 403, "scope_missing")
    metrics = f"{locked.url}/metrics"
    refused(requests.get(metrics, headers=predict, timeout=10), 403, "scope_missing")
    said = requests.get(metrics, headers=admin, timeout=10).text
    assert re.search(
        r'imgcls_requests_total\{key="nightly",route="/v1/predict",status="200"\} [1-9]', said
    )
    url = f"{locked.url}/v1/model/reload"
    refused(requests.post(url, headers=predict, timeout=10), 403, "scope_missing")
    response = requests.post(url, headers=admin, timeout=10)
    assert (response.status_code, response.json()) == (202, {"reload": 1})
    assert not any(key in said for key in keys.values())


def test_a_key_is_refused_before_its_body_is_read(locked: Running) -> None:
    with socket.create_connection(("127.0.0.1", locked.port), 10) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
            b"Content-Length: 1000000\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_a_rate_is_kept_and_who_comes_too_soon_is_told_when_to_come(
    locked: Running, keys: dict[str, str]
) -> None:
    headers = {"X-API-Key": keys["slow"]}
    codes = [post(locked, jpeg(), headers=headers).status_code for _ in range(8)]
    assert codes.count(200) in (5, 6)  # ten seconds' worth at once, of 30 a minute
    response = post(locked, jpeg(), headers=headers)
    refused(response, 429, "too_many_requests")
    assert 1 <= int(response.headers["Retry-After"]) <= 2
    other = {"X-API-Key": keys["nightly"]}
    assert post(locked, jpeg(), headers=other).status_code == 200


def test_without_keys_only_this_machine_may_ask_by_its_own_name(server: Running) -> None:
    for host, status in (
        *(("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200)),
        *(("evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403)),
    ):
        response = requests.get(f"{server.url}/v1/model", headers={"Host": host}, timeout=10)
        assert response.status_code == status, host


@pytest.mark.parametrize(
    "header", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP"]
)
def test_without_keys_nothing_passes_that_a_proxy_asks_for_somebody(
    server: Running, header: str
) -> None:
    response = requests.get(f"{server.url}/v1/model", headers={header: "127.0.0.1"}, timeout=10)
    refused(response, 403, "keys_needed")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://localhost:3000", "Sec-Fetch-Site": "cross-site"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_without_keys_no_page_from_elsewhere_has_a_browser_ask(
    server: Running, headers: dict[str, str], status: int
) -> None:
    form = {"image": ("red.jpg", jpeg())}
    response = requests.post(f"{server.url}/v1/predict", files=form, headers=headers, timeout=30)
    assert response.status_code == status
    before = server.reloads
    url = f"{server.url}/v1/model/reload"
    assert requests.post(url, headers=headers, timeout=10).status_code in (status, status + 2)
    assert server.reloads == before + (status == 200)


def test_a_documented_nginx_opens_nothing_where_there_are_no_keys(
    server: Running, tmp_path: Path
) -> None:
    """Whatever name it is asked by: it is on this machine, and asks for who is not."""
    if shutil.which("nginx") is None:
        pytest.skip("no nginx: apt-get install nginx")
    port = service_port()
    text = (REPOSITORY / "docs" / "serving.md").read_text()
    (block,) = re.findall(r"```nginx\n(.*?)```", text, re.DOTALL)
    block = block.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    block = block.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    block = re.sub(r"\n +ssl_.*", "", block)
    folders = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {folders} {block} }}\n"
    )
    with subprocess.Popen(["nginx", "-e", f"{tmp_path}/error.log", "-c", config]) as nginx:
        try:
            url = f"http://127.0.0.1:{port}/healthz"
            wait_for(lambda: answers(url), 30)
            for host in ("labels.example.com", "localhost", "127.0.0.1"):
                response = requests.get(
                    f"http://127.0.0.1:{port}/v1/model", headers={"Host": host}, timeout=10
                )
                refused(response, 403, "keys_needed")
        finally:
            nginx.terminate()


def answers(url: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(url, timeout=10).status_code == 200
    return False


# ---------------------------------------------------------------------- too much, too slow


def test_more_than_may_wait_is_told_to_come_again(colour_bundle: Path) -> None:
    with serving(colour_bundle, limits__waiting_images=2, limits__images=2) as running:
        let_go = threading.Event()
        running.service._decode_pool.submit(let_go.wait, 60)  # the one thread that decodes
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(post, running, jpeg()) for _ in range(2)]
            deadline = time.monotonic() + 30
            while running.service.num_waiting < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            response = post(running, jpeg())
            let_go.set()
            assert [task.result().status_code for task in waiting] == [200, 200]
        refused(response, 503, "busy")
        assert int(response.headers["Retry-After"]) >= 1
        assert running.service.num_waiting == 0
        assert post(running, jpeg()).status_code == 200


def test_a_body_that_does_not_arrive_is_refused_and_stops_nobody(colour_bundle: Path) -> None:
    with serving(colour_bundle, limits__upload_seconds=4) as running:
        head = (
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            b"Content-Length: 100000\r\n\r\n\xff\xd8"
        )
        slow = []
        for place in range(200):
            connection = socket.create_connection(("127.0.0.1", running.port), 30)
            # half of them stop within the headers, the others within the body
            connection.sendall(head if place % 2 else head[:40])
            slow.append(connection)
        assert [post(running, jpeg()).status_code for _ in range(20)] == [200] * 20
        for connection in slow[1::2]:
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        for connection in slow:
            connection.close()


def test_a_body_without_an_end_is_refused_in_constant_memory(server: Running) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        block = bytes(1 << 16)
        while sent < 10 << 30:
            sent += len(block)
            yield block

    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    for kind in ("image/png", "multipart/form-data; boundary=x"):
        try:
            response = post(server, endless(), headers={"Content-Type": kind})  # type: ignore[arg-type]
            assert response.status_code in (400, 413)
        except requests.ConnectionError:
            pass  # the server has answered and hung up, and the client was still sending
    assert sent < 1 << 30
    assert process.memory_info().rss - before < 200 << 20


def test_a_picture_of_billions_of_pixels_is_refused_from_its_header(server: Running) -> None:
    bomb = png_header(50_000, 50_000)
    before = psutil.Process(os.getpid()).memory_info().rss
    for _ in range(20):
        refused(post(server, bomb), 413, "too_large")
    assert psutil.Process(os.getpid()).memory_info().rss - before < 100 << 20


# ---------------------------------------------------------------------- browsers


def test_every_answer_says_what_browsers_should_mind(server: Running) -> None:
    for path in ("/", "/v1/model", "/nothing", "/healthz"):
        headers = requests.get(f"{server.url}{path}", timeout=10).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in headers


def test_pages_from_elsewhere_may_ask_only_where_they_are_named(colour_bundle: Path) -> None:
    with serving(colour_bundle, http__cors_origins=["https://app.example.com"]) as running:
        asked = {
            "Origin": "https://app.example.com",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        url = f"{running.url}/v1/predict"
        allowed = requests.options(url, headers=asked, timeout=10)
        assert allowed.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
        other = requests.options(
            url, headers={**asked, "Origin": "https://evil.example"}, timeout=10
        )
        assert "Access-Control-Allow-Origin" not in other.headers


# ---------------------------------------------------------------------- anything


def pictures() -> st.SearchStrategy[bytes]:
    """Real pictures of several formats, damaged, and bytes of no format at all."""
    whole = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        sink = io.BytesIO()
        draw("green").save(sink, kind)
        whole.append(sink.getvalue())
    grey = io.BytesIO()
    Image.new("I;16", (9, 7), 300).save(grey, "PNG")
    whole.append(grey.getvalue())

    def damaged(data: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
        changed = bytearray(data)
        for place, value in changes:
            changed[place % len(changed)] = value
        return bytes(changed if cut is None else changed[: cut % len(changed)])

    changes = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=12)
    cut = st.none() | st.integers(0, 1 << 16)
    return st.builds(damaged, st.sampled_from(whole), changes, cut) | st.binary(max_size=300)


def check_anything(url: str, data: bytes) -> None:
    response = requests.post(
        f"{url}/v1/predict", data, headers={"Content-Type": "image/jpeg"}, timeout=60
    )
    assert response.status_code in (200, 413, 415, 422), response.text
    if response.status_code == 200:
        assert response.json()["predictions"][0]["status"] == "ok"


@given(data=pictures())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_answered(server: Running, data: bytes) -> None:
    check_anything(server.url, data)


@pytest.mark.chaos
def test_twenty_thousand_damaged_pictures_leave_no_trace(colour_bundle: Path) -> None:
    memory: list[int] = []
    command = [sys.executable, "-m", "tests.serving.app", str(colour_bundle)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()

        @given(data=pictures())
        @settings(max_examples=20_000, suppress_health_check=list(HealthCheck), database=None)
        def ask(data: bytes) -> None:
            check_anything(url, data)
            memory.append(psutil.Process(server.pid).memory_info().rss)

        ask()
        assert server.poll() is None
        server.communicate(timeout=60)
    assert len(memory) >= 20_000
    told = ", ".join(f"{memory[at] >> 20} MiB after {at:,}" for at in range(0, 20_000, 2_500))
    print(f"{told}, {memory[-1] >> 20} MiB after {len(memory):,}")
    assert memory[-1] - memory[5_000] < 32 << 20


def test_an_image_without_finite_scores_is_an_error(overflowing_bundle: Path) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (64, 48), "white").save(sink, "PNG")
    with serving(overflowing_bundle, precision="fp32") as running:
        files = [("image", ("red.jpg", jpeg())), ("image", ("white.png", sink.getvalue()))]
        answer = requests.post(f"{running.url}/v1/predict", files=files, timeout=30)
    assert answer.status_code == 200, answer.text
    red, white = answer.json()["predictions"]
    assert (red["status"], white["status"]) == ("ok", "not_finite")
    assert "gives NaN or infinity for this image" in white["error"]
    assert white["predicted_label"] is None
    assert white["confidence"] is None
    assert white["accepted"] is False
