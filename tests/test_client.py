"""The client against a server with scripted responses."""

from __future__ import annotations

import datetime
import email.utils
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from imgcls.client import Client, ServiceError
from imgcls.errors import RequestError


@dataclass
class Script:
    """The keys that were received, and the responses to the next requests."""

    url: str = ""
    keys: list[str | None] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    body: bytes = b'{"sha256": "0"}'


@pytest.fixture
def server() -> Iterator[Script]:
    script = Script()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            script.keys.append(self.headers["Authorization"])
            status, headers = script.answers.pop(0) if script.answers else (200, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(script.body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        script.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield script
        running.shutdown()
        thread.join()


def date(seconds: float) -> str:
    """The HTTP date this many seconds from now; for bodies of tests, not for parameters."""
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return email.utils.format_datetime(when, usegmt=True)


@pytest.mark.parametrize(
    "after", ["0", "1", -60.0, 1.0, "-0000"], ids=["0", "1", "past", "soon", "no zone"]
)
def test_a_busy_service_is_retried_after_retry_after(server: Script, after: str | float) -> None:
    if after == "-0000":
        after = date(1).replace("GMT", "-0000")
    after = date(after) if isinstance(after, float) else after
    server.answers = [(503, {"Retry-After": after}), (429, {"Retry-After": after})]
    with Client(server.url) as client:
        assert client.model() == {"sha256": "0"}
    assert len(server.keys) == 3


@pytest.mark.parametrize(
    "after",
    ["", "soon", "-5", "nan", "1e3", "9" * 400, 3600.0, "3600"],
    ids=["blank", "word", "negative", "nan", "float", "huge", "date", "seconds"],
)
def test_a_late_or_invalid_retry_after_is_not_waited_for(
    server: Script, after: str | float
) -> None:
    after = date(after) if isinstance(after, float) else after
    server.answers = [(503, {"Retry-After": after})]
    with Client(server.url) as client, pytest.raises(ServiceError, match="503"):
        client.model()
    assert len(server.keys) == 1


def test_netrc_does_not_replace_the_key(
    server: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(file))
    monkeypatch.delenv("IMGCLS_API_KEY", raising=False)
    for key in ("imgcls_x", None):
        with Client(server.url, key) as client:
            client.model()
    monkeypatch.setenv("IMGCLS_API_KEY", "imgcls_y")
    with Client(server.url) as client:
        client.model()
    assert server.keys == ["Bearer imgcls_x", None, "Bearer imgcls_y"]


def test_white_space_around_a_key_is_not_sent(
    server: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGCLS_API_KEY", " imgcls_y\r\n")
    for key in ("imgcls_x\n", None):
        with Client(server.url, key) as client:
            client.model()
    monkeypatch.setenv("IMGCLS_API_KEY", "\n")
    with Client(server.url) as client:
        client.model()
    assert server.keys == ["Bearer imgcls_x", "Bearer imgcls_y", None]


@pytest.mark.parametrize("key", ["imgcls_\n_x", "imgcls_\u20ac", "imgcls_ x", "imgcls_\x7f"])
def test_a_key_that_no_header_can_have_is_refused_and_not_repeated(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=r"^key: contains a character") as caught:
        Client("http://127.0.0.1:1", key)
    assert "imgcls_" not in str(caught.value)
    monkeypatch.setenv("IMGCLS_API_KEY", key)
    with pytest.raises(RequestError, match=r"^IMGCLS_API_KEY: contains a character"):
        Client("http://127.0.0.1:1")


@pytest.mark.parametrize("body", [b"<html>Sign in</html>", b"", b"[]", b'"x"', b"\xff"])
def test_a_response_that_is_not_one_of_the_service_is_an_error_of_the_client(
    server: Script, body: bytes
) -> None:
    server.body = body
    with Client(server.url) as client:
        for call in (client.model, lambda: client.predict(b"image")):
            with pytest.raises(ServiceError, match="200 OK: the response is not one of `imgcls"):
                call()


def test_a_response_without_predictions_is_an_error_of_the_client(server: Script) -> None:
    with Client(server.url) as client, pytest.raises(ServiceError, match="has no predictions"):
        client.predict(b"image")
