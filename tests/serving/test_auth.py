"""API keys, scopes, rate limits and the loopback rule over real HTTP."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import requests

from tests.conftest import REPOSITORY
from tests.processes import service_port, wait_for
from tests.serving.app import Running, assert_problem, jpeg, post, serving


def test_a_missing_or_wrong_key_is_rejected(locked: Running, keys: dict[str, str]) -> None:
    for method, path in (
        *(("POST", "/v1/predict"), ("GET", "/v1/model")),
        *(("POST", "/v1/model/reload"), ("GET", "/metrics")),
    ):
        url = f"{locked.url}{path}"
        response = requests.request(method, url, timeout=10)
        assert_problem(response, 401, "key_missing")
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        wrong = {"Authorization": f"Bearer {keys['nightly']}x"}
        assert_problem(requests.request(method, url, headers=wrong, timeout=10), 401, "key_unknown")
        odd = {"X-API-Key": "caf\xe9".encode("latin-1")}
        assert_problem(requests.request(method, url, headers=odd, timeout=10), 401, "key_unknown")
    for path in ("/", "/healthz", "/readyz", "/openapi.json"):
        assert requests.get(f"{locked.url}{path}", timeout=10).status_code == 200


def test_a_key_is_limited_to_its_scopes(locked: Running, keys: dict[str, str]) -> None:
    predict = {"X-API-Key": keys["nightly"]}
    admin = {"Authorization": f"Bearer {keys['ops']}"}
    assert post(locked, jpeg(), headers=predict).status_code == 200
    assert_problem(post(locked, jpeg(), headers=admin), 403, "scope_missing")
    metrics = f"{locked.url}/metrics"
    assert_problem(requests.get(metrics, headers=predict, timeout=10), 403, "scope_missing")
    text = requests.get(metrics, headers=admin, timeout=10).text
    assert re.search(
        r'imgcls_requests_total\{key="nightly",route="/v1/predict",status="200"\} [1-9]', text
    )
    url = f"{locked.url}/v1/model/reload"
    assert_problem(requests.post(url, headers=predict, timeout=10), 403, "scope_missing")
    response = requests.post(url, headers=admin, timeout=10)
    assert (response.status_code, response.json()) == (202, {"reload": 1})
    assert not any(key in text for key in keys.values())


def test_a_request_without_a_key_is_rejected_before_its_body_is_read(locked: Running) -> None:
    with socket.create_connection(("127.0.0.1", locked.port), 10) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
            b"Content-Length: 1000000\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_a_rate_limit_answers_429_with_the_time_to_wait(
    locked: Running, keys: dict[str, str]
) -> None:
    headers = {"X-API-Key": keys["slow"]}
    codes = [post(locked, jpeg(), headers=headers).status_code for _ in range(8)]
    assert codes.count(200) in (5, 6)  # a burst of ten seconds at 30 per minute
    response = post(locked, jpeg(), headers=headers)
    assert_problem(response, 429, "too_many_requests")
    assert 1 <= int(response.headers["Retry-After"]) <= 2
    other = {"X-API-Key": keys["nightly"]}
    assert post(locked, jpeg(), headers=other).status_code == 200


def test_without_keys_only_loopback_host_names_are_allowed(server: Running) -> None:
    for host, status in (
        *(("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200)),
        *(("evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403)),
    ):
        response = requests.get(f"{server.url}/v1/model", headers={"Host": host}, timeout=10)
        assert response.status_code == status, host


@pytest.mark.parametrize(
    "header", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP"]
)
def test_without_keys_forwarded_requests_are_rejected(server: Running, header: str) -> None:
    response = requests.get(f"{server.url}/v1/model", headers={header: "127.0.0.1"}, timeout=10)
    assert_problem(response, 403, "keys_needed")


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
def test_without_keys_pages_of_other_sites_are_rejected(
    server: Running, headers: dict[str, str], status: int
) -> None:
    form = {"image": ("red.jpg", jpeg())}
    response = requests.post(f"{server.url}/v1/predict", files=form, headers=headers, timeout=30)
    assert response.status_code == status
    before = server.reloads
    url = f"{server.url}/v1/model/reload"
    assert requests.post(url, headers=headers, timeout=10).status_code in (status, status + 2)
    assert server.reloads == before + (status == 200)


def test_the_documented_nginx_does_not_open_a_service_without_keys(
    server: Running, tmp_path: Path
) -> None:
    """For any host name: nginx runs on this machine and forwards requests of other machines."""
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
            wait_for(lambda: is_up(url), 30)
            for host in ("labels.example.com", "localhost", "127.0.0.1"):
                response = requests.get(
                    f"http://127.0.0.1:{port}/v1/model", headers={"Host": host}, timeout=10
                )
                assert_problem(response, 403, "keys_needed")
        finally:
            nginx.terminate()


def is_up(url: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(url, timeout=10).status_code == 200
    return False


def test_cors_allows_the_configured_origins_only(color_bundle: Path) -> None:
    with serving(color_bundle, http__cors_origins=["https://app.example.com"]) as running:
        preflight = {
            "Origin": "https://app.example.com",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        url = f"{running.url}/v1/predict"
        allowed = requests.options(url, headers=preflight, timeout=10)
        assert allowed.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
        other = requests.options(
            url, headers={**preflight, "Origin": "https://evil.example"}, timeout=10
        )
        assert "Access-Control-Allow-Origin" not in other.headers
