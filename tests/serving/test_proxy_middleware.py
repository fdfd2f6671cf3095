"""The middleware of Ray Serve's HTTP proxy, over real HTTP: limits on bodies, Ray's own errors."""

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
from tests.serving.app import announce_body, assert_problem, read_head

BODY_BYTES, PROXY_BYTES = 1 << 20, 3 << 20


@dataclass
class Greedy:
    """An application that reads everything and never answers, as Ray's proxy without a replica."""

    read: int = 0
    left: int = 0
    scopes: list[Scope] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        while (message := await receive())["type"] != "http.disconnect":
            self.read += len(message["body"])
        self.left += 1


@contextlib.contextmanager
def running(app: ASGIApp) -> Iterator[tuple[int, BodyLimitMiddleware]]:
    """Run a server with low limits; yields its port and the middleware."""
    port = free_port()
    middleware = BodyLimitMiddleware(app, BODY_BYTES, PROXY_BYTES)
    server = uvicorn.Server(
        uvicorn.Config(
            middleware, port=port, lifespan="off", log_level="critical", access_log=False
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started, 30)
    try:
        yield port, middleware
    finally:
        server.should_exit = True
        thread.join(30)


def start_body(port: int, body: bytes) -> socket.socket:
    """Send a request with the first part of its body."""
    connection = socket.create_connection(("127.0.0.1", port), 30)
    connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    with contextlib.suppress(ConnectionError):  # the response came before everything was sent
        connection.sendall(f"{len(body):x}\r\n".encode() + body + b"\r\n")
    return connection


def test_an_endless_body_is_not_read_further_than_the_limit() -> None:
    app = Greedy()
    with running(app) as (port, middleware):
        with start_body(port, bytes(4 * BODY_BYTES)) as connection:
            head = read_head(connection)
        assert head.startswith("http/1.1 413 ")
        assert "application/problem+json" in head
        assert "connection: close" in head
        assert "x-content-type-options: nosniff" in head
        wait_for(lambda: app.left == 1, 30)
        assert app.read <= BODY_BYTES
        assert middleware.held_bytes == 0


def test_a_body_announced_as_too_long_is_rejected_unread() -> None:
    app = Greedy()
    with running(app) as (port, _):
        assert announce_body(port, BODY_BYTES + 1).startswith("http/1.1 413 ")
        assert app.scopes == []


def test_all_bodies_together_are_limited_until_their_requests_end() -> None:
    app = Greedy()
    with running(app) as (port, middleware), contextlib.ExitStack() as stack:
        connections = [stack.enter_context(start_body(port, bytes(BODY_BYTES))) for _ in range(3)]
        wait_for(lambda: middleware.held_bytes == PROXY_BYTES, 30)
        with start_body(port, bytes(10)) as connection:
            head = read_head(connection)
        assert head.startswith("http/1.1 503 ")
        assert "retry-after: " in head
        assert "connection: close" in head
        assert app.read == PROXY_BYTES
        connections[0].close()
        wait_for(lambda: middleware.held_bytes == PROXY_BYTES - BODY_BYTES, 30)
        with start_body(port, bytes(10)):
            wait_for(lambda: app.read == PROXY_BYTES + 10, 30)


def test_no_client_can_disable_the_request_timeout() -> None:
    app = Greedy()
    with running(app) as (port, _):
        headers = {"X-Request-Timeout-Seconds": "-1", "X-Request-Disconnect-Disabled": "?1"}
        with contextlib.suppress(requests.Timeout):
            requests.get(f"http://127.0.0.1:{port}/", headers=headers, timeout=0.3)
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
def test_errors_of_ray_become_problems(
    status: int, kind: str, headers: list[tuple[bytes, bytes]], after: str | None
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in convert_object_to_asgi_messages("some text", status, headers):
            await send(message)

    with running(app) as (port, _):
        response = requests.get(f"http://127.0.0.1:{port}/", timeout=10)
        assert_problem(response, status, kind)
        assert response.headers.get("Retry-After") == after


def test_a_request_without_a_response_is_a_problem_without_retry_after() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("on purpose")

    for app in (silent, broken):
        with running(app) as (port, _):
            response = requests.get(f"http://127.0.0.1:{port}/", timeout=10)
            assert_problem(response, 500, "internal_error")
            assert "Retry-After" not in response.headers


def test_responses_of_applications_pass_unchanged() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/-/healthz":
            for message in convert_object_to_asgi_messages("success", 200):
                await send(message)
            return
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": b"no"})

    with running(app) as (port, _):
        for path, status, text in (("/", 400, "no"), ("/-/healthz", 200, "success")):
            response = requests.get(f"http://127.0.0.1:{port}{path}", timeout=10)
            assert (response.status_code, response.text) == (status, text)


def test_the_limits_come_from_the_environment_and_default_to_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = LimitsConfig()
    (standard,) = proxy_middleware.build_middlewares()
    assert standard.args == (limits.body_bytes, limits.proxy_bytes)
    for name, value in proxy_middleware.build_environment(5, 7).items():
        monkeypatch.setenv(name, value)
    (middleware,) = proxy_middleware.build_middlewares()
    assert middleware.args == (5, 7)
