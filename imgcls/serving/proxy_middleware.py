"""ASGI middleware of Ray Serve's HTTP proxy: limits on the memory that request bodies take.

The proxy reads whatever a client sends, before any check, and keeps it until a replica takes it.
This middleware counts the bytes of each body and of all bodies together, stops reading above a
limit, and turns Ray's own plain-text errors into problems (RFC 9457). Ray imports it by name in
the proxy's process (see `CALLBACK_PATH`), so it imports little.
"""

from __future__ import annotations

import logging
import os

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imgcls.errors import ConfigError
from imgcls.serving.problems import (
    DENY_ALL_POLICY,
    SECURITY_HEADERS,
    Problem,
    build_status_problem,
    build_too_large_problem,
    can_exceed_limit,
)

DEFAULT_BODY_BYTES = 64 << 20
DEFAULT_PROXY_BYTES = 512 << 20
_BODY_BYTES_ENV, _PROXY_BYTES_ENV = "IMGCLS_BODY_BYTES", "IMGCLS_PROXY_BYTES"

_DISCONNECT: Message = {"type": "http.disconnect"}
_RAY_HEADERS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}
"""Ray's own request headers, removed: any client could disable the request timeout with them."""
_RAY_ERROR_DETAILS = {
    404: "no application is served at this path",
    408: "the request was not answered within the request timeout",
    503: "no replica is available; retry later",
}
"""Details of Ray's own errors by HTTP status."""
_RETRY_AFTER_S = 2

logger = logging.getLogger("ray.serve")


def build_environment(body_bytes: int, proxy_bytes: int) -> dict[str, str]:
    """Environment variables that pass the limits to Ray's processes."""
    return {_BODY_BYTES_ENV: str(body_bytes), _PROXY_BYTES_ENV: str(proxy_bytes)}


def build_middlewares() -> list[Middleware]:
    """Build the middlewares; Ray Serve calls this in every proxy process."""
    if "IMGCLS_DOOR_BYTES" in os.environ:
        raise ConfigError(f"IMGCLS_DOOR_BYTES: was renamed; set {_PROXY_BYTES_ENV}")
    body_bytes = int(os.environ.get(_BODY_BYTES_ENV, DEFAULT_BODY_BYTES))
    proxy_bytes = int(os.environ.get(_PROXY_BYTES_ENV, DEFAULT_PROXY_BYTES))
    return [Middleware(BodyLimitMiddleware, body_bytes, proxy_bytes)]


CALLBACK_PATH = f"{__name__}:{build_middlewares.__name__}"
"""Value of RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH in the environment of `ray start`."""


class BodyLimitMiddleware:
    """Counts the bytes of request bodies from their arrival until the request is answered.

    body_bytes:  limit of one body; a larger one is rejected with 413
    proxy_bytes: limit of all bodies in this process; above it requests are rejected with 503
    """

    def __init__(self, app: ASGIApp, body_bytes: int, proxy_bytes: int) -> None:
        self.app = app
        self.body_bytes = body_bytes
        self.proxy_bytes = proxy_bytes
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = [pair for pair in scope["headers"] if pair[0] not in _RAY_HEADERS]
        await _Exchange(self, {**scope, "headers": headers}, receive, send).run()


class _Exchange:
    """One request and its response, as they pass through the middleware."""

    def __init__(
        self, middleware: BodyLimitMiddleware, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._middleware = middleware
        self._scope = scope
        self._receive = receive
        self._send = send
        self._held_bytes = 0
        self._is_complete = False
        self._is_answered = False
        self._is_closed = False

    async def run(self) -> None:
        middleware = self._middleware
        length = dict(self._scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > middleware.body_bytes:
            await self._send_problem(build_too_large_problem(middleware.body_bytes))
            return
        try:
            await middleware.app(self._scope, self._receive_bounded, self._send_checked)
        except Exception:
            if self._is_answered:
                raise
            logger.exception("a request failed in the HTTP proxy")
        finally:
            middleware.held_bytes -= self._held_bytes
        if not self._is_answered:
            # a replica that crashed on this request looks the same, so no Retry-After
            await self._send_problem(
                Problem(500, "internal_error", "the replica ended; the log has the reason")
            )

    async def _receive_bounded(self) -> Message:
        """Receive the next message; a disconnect once a limit is exceeded."""
        if self._is_closed:
            return _DISCONNECT
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        middleware, count = self._middleware, len(message.get("body", b""))
        self._held_bytes += count
        middleware.held_bytes += count
        self._is_complete = not message.get("more_body", False)
        if self._held_bytes > middleware.body_bytes:
            await self._send_problem(build_too_large_problem(middleware.body_bytes))
        elif middleware.held_bytes > middleware.proxy_bytes:
            await self._send_problem(_build_full_problem())
        else:
            return message
        return _DISCONNECT

    async def _send_checked(self, message: Message) -> None:
        """Send a message of the response, or a problem in place of an error of Ray's own."""
        if self._is_closed:
            return
        if message["type"] == "http.response.start":
            problem = _convert_ray_error(message)
            if problem is not None:
                await self._send_problem(problem)
                return
            self._is_answered = True
        await self._send(message)

    async def _send_problem(self, problem: Problem) -> None:
        """Answer in place of the application; pass nothing more in either direction."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._is_answered:
            return
        self._is_answered = True
        response = problem.build_response()
        response.headers.update(SECURITY_HEADERS)
        response.headers["Content-Security-Policy"] = DENY_ALL_POLICY
        if not self._is_complete and can_exceed_limit(self._scope, self._middleware.body_bytes):
            response.headers["Connection"] = "close"
        await response(self._scope, self._receive, self._send)


def _build_full_problem() -> Problem:
    return Problem(
        503,
        "busy",
        "the HTTP proxy's memory for request bodies is full; retry later",
        retry_after=_RETRY_AFTER_S,
    )


def _convert_ray_error(start: Message) -> Problem | None:
    """Convert the start of an error response of Ray's own; None for an application's response.

    Ray's own error responses are plain text without a Content-Length.
    """
    headers = dict(map(tuple, start["headers"]))
    is_plain = headers.get(b"content-type", b"").startswith(b"text/plain")
    if start["status"] < 400 or not is_plain or b"content-length" in headers:
        return None
    problem = build_status_problem(start["status"], _RAY_ERROR_DETAILS.get(start["status"]))
    if problem.status == 503:
        retry_after = headers.get(b"retry-after", b"")
        problem.retry_after = max(1, int(retry_after)) if retry_after.isdigit() else _RETRY_AFTER_S
    return problem
