"""Request bodies over real HTTP: too large, too slow, without an end, damaged."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imgcls.client import Client
from tests.conftest import REPOSITORY, draw
from tests.serving.app import Running, assert_problem, jpeg, png_header, post, serving


def test_a_path_or_url_in_a_form_is_never_opened(server: Running) -> None:
    for value in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.jpg"):
        form = {"image": (None, value), "url": (None, value), "path": (None, value)}
        response = requests.post(f"{server.url}/v1/predict", files=form, timeout=10)
        assert_problem(response, 400, "no_image")
    names = {"image": ("../../../../etc/passwd", jpeg())}
    row = requests.post(f"{server.url}/v1/predict", files=names, timeout=10).json()["predictions"][
        0
    ]
    assert row["status"] == "ok"


def test_a_file_name_that_is_not_valid_unicode_is_returned_cleaned(server: Running) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="\\ud800.jpg"\r\n\r\n'
        + jpeg()
        + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    response = post(server, body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["predictions"][0]["name"] == "?.jpg"


def build_part(headers: bytes, data: bytes) -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + headers + b"\r\n\r\n" + data + b"\r\n"


FORM = {"Content-Type": "multipart/form-data; boundary=x"}
FILE = b'name="image"; filename="%d.jpg"\r\nContent-Type: image/jpeg'


def test_a_form_that_was_cut_off_is_rejected(server: Running) -> None:
    end = b"--x--"
    form = b"".join(build_part(FILE % number, jpeg()) for number in range(3)) + end
    for ending in (b"", b"\r\n", b"\r\nepilogue"):
        response = post(server, form + ending, headers=FORM)
        assert [row["name"] for row in response.json()["predictions"]] == [
            "0.jpg", "1.jpg", "2.jpg",
        ]  # fmt: skip
    for cut in (1, 2, len(end), len(end) + 10, len(jpeg()) // 2, len(jpeg()) + 200):
        problem = assert_problem(post(server, form[:-cut], headers=FORM), 400, "malformed_form")
        assert "ends without the closing boundary" in problem["detail"]


@pytest.mark.parametrize(
    ("headers", "data", "status"),
    [
        (b'name="image"', b"some text", 400),  # curl -F 'image=<a.jpg'
        (b'name="photo"\r\nContent-Type: image/jpeg', b"some text", 400),
        (b'name="photo"\r\nContent-Type: application/octet-stream', b"some text", 400),
        (b'name="p"\r\nContent-Type: image/png\r\nContent-Type: text/plain', b"some text", 400),
        (b'name="photo"', jpeg(), 400),
        (b'name="comment"', b"some text", 200),
        (b'name="comment"', "caf\u00e9".encode("latin-1"), 200),
        (b'name="comment"\r\nContent-Type: text/plain', b"some text", 200),
        (b'name="comment"\r\nContent-Type: application/json', b"{}", 200),
    ],
)
def test_an_image_without_a_file_name_is_rejected_and_a_text_field_is_not(
    server: Running, headers: bytes, data: bytes, status: int
) -> None:
    parts = [build_part(headers, data), build_part(FILE % 1, jpeg())]
    for order in (parts, parts[::-1]):
        response = post(server, b"".join(order) + b"--x--\r\n", headers=FORM)
        if status == 400:
            problem = assert_problem(response, 400, "malformed_form")
            assert "is an image without a file name" in problem["detail"]
        else:
            assert [row["name"] for row in response.json()["predictions"]] == ["1.jpg"]


def test_too_many_images_are_rejected_and_a_large_one_is_a_row(server: Running) -> None:
    many = [("image", ("i", b"x"))] * 65
    assert_problem(
        requests.post(f"{server.url}/v1/predict", files=many, timeout=30), 413, "too_many_images"
    )
    with Client(server.url) as client:
        rows = client.predict([jpeg(), jpeg() + bytes(2 << 20)])
    assert [row["status"] for row in rows] == ["ok", "too_large"]
    assert "more than image_bytes" in rows[1]["error"]


# ---------------------------------------------------------------------- too much, too slow


def test_a_full_queue_answers_503_with_retry_after(color_bundle: Path) -> None:
    with serving(color_bundle, limits__waiting_images=2, limits__images=2) as running:
        release = threading.Event()
        running.service._decode_pool.submit(release.wait, 60)  # occupies the only decoding thread
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(post, running, jpeg()) for _ in range(2)]
            deadline = time.monotonic() + 30
            while running.service.num_waiting < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            response = post(running, jpeg())
            release.set()
            assert [task.result().status_code for task in waiting] == [200, 200]
        assert_problem(response, 503, "busy")
        assert int(response.headers["Retry-After"]) >= 1
        assert running.service.num_waiting == 0
        assert post(running, jpeg()).status_code == 200


def test_a_body_that_does_not_arrive_is_rejected_and_delays_no_other(color_bundle: Path) -> None:
    with serving(color_bundle, limits__upload_timeout_s=4) as running:
        head = (
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            b"Content-Length: 100000\r\n\r\n\xff\xd8"
        )
        slow = []
        for place in range(200):
            connection = socket.create_connection(("127.0.0.1", running.port), 30)
            # half of them stop in the headers, the others in the body
            connection.sendall(head if place % 2 else head[:40])
            slow.append(connection)
        assert [post(running, jpeg()).status_code for _ in range(20)] == [200] * 20
        for connection in slow[1::2]:
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        for connection in slow:
            connection.close()


def test_an_endless_body_is_rejected_in_constant_memory(server: Running) -> None:
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
            pass  # the server has answered and closed the connection while the client was sending
    assert sent < 1 << 30
    assert process.memory_info().rss - before < 200 << 20


def test_an_image_of_billions_of_pixels_is_rejected_by_its_header(server: Running) -> None:
    bomb = png_header(50_000, 50_000)
    before = psutil.Process(os.getpid()).memory_info().rss
    for _ in range(20):
        assert_problem(post(server, bomb), 413, "too_large")
    assert psutil.Process(os.getpid()).memory_info().rss - before < 100 << 20


# ---------------------------------------------------------------------- anything


def image_bytes() -> st.SearchStrategy[bytes]:
    """Damaged images of several formats, and random bytes."""
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


def check_any_bytes(url: str, data: bytes) -> None:
    response = requests.post(
        f"{url}/v1/predict", data, headers={"Content-Type": "image/jpeg"}, timeout=60
    )
    assert response.status_code in (200, 413, 415, 422), response.text
    if response.status_code == 200:
        assert response.json()["predictions"][0]["status"] == "ok"


@given(data=image_bytes())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_answered(server: Running, data: bytes) -> None:
    check_any_bytes(server.url, data)


@pytest.mark.chaos
def test_twenty_thousand_damaged_images_do_not_leak_memory(color_bundle: Path) -> None:
    memory: list[int] = []
    command = [sys.executable, "-m", "tests.serving.app", str(color_bundle)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()

        @given(data=image_bytes())
        @settings(max_examples=20_000, suppress_health_check=list(HealthCheck), database=None)
        def ask(data: bytes) -> None:
            check_any_bytes(url, data)
            memory.append(psutil.Process(server.pid).memory_info().rss)

        ask()
        assert server.poll() is None
        server.communicate(timeout=60)
    assert len(memory) >= 20_000
    samples = ", ".join(f"{memory[at] >> 20} MiB after {at:,}" for at in range(0, 20_000, 2_500))
    print(f"{samples}, {memory[-1] >> 20} MiB after {len(memory):,}")
    assert memory[-1] - memory[5_000] < 32 << 20
