"""The gate before Ray Serve's HTTP server, over real HTTP: what it lets in, and what it says."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import requests
import uvicorn
from ray.serve._private.http_util import convert_object_to_asgi_messages
from starlette.types import ASGIApp, Receive, Scope, Send

from imgcls.serving import proxy_middleware
from imgcls.serving.config import LimitsConfig
from imgcls.serving.proxy_middleware import BodyLimitMiddleware
from tests.processes import free_port, wait_for
from tests.serving.test_api import refused

BODY, DOOR = 1 << 20, 3 << 20


@dataclass
class Greedy:
    """As Ray's proxy does while no replica is there: reads all that comes, and never answers."""

    read: int = 0
    left: int = 0
    scopes: list[Scope] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        while (message := await receive())["type"] != "http.disconnect":
            self.read += len(message["body"])
        self.left += 1


@contextlib.contextmanager
def standing(app: ASGIApp) -> Iterator[tuple[int, BodyLimitMiddleware]]:
    """A server whose gate is small; its port."""
    port = free_port()
    gate = BodyLimitMiddleware(app, BODY, DOOR)
    server = uvicorn.Server(
        uvicorn.Config(gate, port=port, lifespan="off", log_level="critical", access_log=False)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started, 30)
    try:
        yield port, gate
    finally:
        server.should_exit = True
        thread.join(30)


def sent(port: int, body: bytes) -> socket.socket:
    """A request with some of its body, of which more is to come."""
    connection = socket.create_connection(("127.0.0.1", port), 30)
    connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    with contextlib.suppress(ConnectionError):  # it was answered before all was sent
        connection.sendall(f"{len(body):x}\r\n".encode() + body + b"\r\n")
    return connection


def announced(port: int, count: int) -> str:
    """What is said to a body of so many bytes, of which none has come."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % count
        )
        return answer(connection)


def answer(connection: socket.socket) -> str:
    said = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in said and (more := connection.recv(65536)):
            said += more
    return said.decode().lower()


def test_a_body_without_an_end_is_not_read_to_it() -> None:
    app = Greedy()
    with standing(app) as (port, gate):
        with sent(port, bytes(4 * BODY)) as connection:
            head = answer(connection)
        assert head.startswith("http/1.1 413 ")
        assert "application/problem+json" in head
        assert "connection: close" in head
        assert "x-content-type-options: nosniff" in head
        wait_for(lambda: app.left == 1, 30)
        assert app.read <= BODY
        assert gate.held_bytes == 0


def test_what_is_announced_to_be_too_long_gets_no_further() -> None:
    app = Greedy()
    with standing(app) as (port, _):
        assert announced(port, BODY + 1).startswith("http/1.1 413 ")
        assert app.scopes == []


def test_all_bodies_together_have_a_bound_and_leave_room_when_they_go() -> None:
    app = Greedy()
    with standing(app) as (port, gate), contextlib.ExitStack() as stack:
        there = [stack.enter_context(sent(port, bytes(BODY))) for _ in range(3)]
        wait_for(lambda: gate.held_bytes == DOOR, 30)
        with sent(port, bytes(10)) as connection:
            head = answer(connection)
        assert head.startswith("http/1.1 503 ")
        assert "retry-after: " in head
        assert "connection: close" in head
        assert app.read == DOOR
        there[0].close()
        wait_for(lambda: gate.held_bytes == DOOR - BODY, 30)
        with sent(port, bytes(10)):
            wait_for(lambda: app.read == DOOR + 10, 30)


def test_nobody_can_have_a_request_without_a_time_limit() -> None:
    app = Greedy()
    with standing(app) as (port, _):
        headers = {"X-Request-Timeout-Seconds": "-1", "X-Request-Disconnect-Disabled": "?1"}
        with contextlib.suppress(requests.Timeout):
            requests.get(f"http://127.0.0.1:{port}/", headers=headers, timeout=1)
        names = [name for name, _ in app.scopes[0]["headers"]]
        assert b"host" in names
        assert not any(name.startswith(b"x-request") for name in names)


@pytest.mark.parametrize(
    ("status", "kind", "headers", "after"),
    [
        (404, "not_found", [], None),
        (408, "request_timeout", [], None),
        (503, "service_unavailable", [], "2"),
        (503, "service_unavailable", [(b"retry-after", b"7")], "7"),
    ],
)
def test_what_ray_says_itself_is_a_problem(
    status: int, kind: str, headers: list[tuple[bytes, bytes]], after: str | None
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in convert_object_to_asgi_messages("some words", status, headers):
            await send(message)

    with standing(app) as (port, _):
        response = requests.get(f"http://127.0.0.1:{port}/", timeout=10)
        refused(response, status, kind)
        assert response.headers.get("Retry-After") == after


def test_what_is_not_answered_at_all_is_a_problem_that_nobody_is_asked_to_repeat() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("on purpose")

    for app in (silent, broken):
        with standing(app) as (port, _):
            response = requests.get(f"http://127.0.0.1:{port}/", timeout=10)
            refused(response, 500, "internal_error")
            assert "Retry-After" not in response.headers


def test_answers_of_applications_pass_as_they_are() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/-/healthz":
            for message in convert_object_to_asgi_messages("success", 200):
                await send(message)
            return
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": b"no"})

    with standing(app) as (port, _):
        for path, status, text in (("/", 400, "no"), ("/-/healthz", 200, "success")):
            response = requests.get(f"http://127.0.0.1:{port}{path}", timeout=10)
            assert (response.status_code, response.text) == (status, text)


def test_its_bounds_come_from_the_environment_and_are_those_of_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = LimitsConfig()
    (standard,) = proxy_middleware.build_middlewares()
    assert standard.args == (limits.body_bytes, limits.proxy_bytes)
    for name, value in proxy_middleware.build_environment(5, 7).items():
        monkeypatch.setenv(name, value)
    (middleware,) = proxy_middleware.build_middlewares()
    assert middleware.args == (5, 7)
