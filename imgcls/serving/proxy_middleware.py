"""What stands before Ray Serve's own HTTP server, in its process: bounds on what is in its memory.

Ray's proxy reads whatever a client sends, ahead of any check, and keeps it until a replica has it.
So bodies are counted here, each and all together, and what is too much is not read. Ray's own plain
answers become problems (RFC 9457). Light on purpose, it is loaded by its name: see `CALLBACK`.
"""

from __future__ import annotations

import logging
import os

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imgcls.serving.problems import (
    DENY_ALL_POLICY,
    SECURITY_HEADERS,
    Problem,
    build_status_problem,
    build_too_large_problem,
    can_exceed_limit,
)

CALLBACK_PATH = f"{__name__}:middlewares"
"""What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH must say where Ray is started."""
DEFAULT_BODY_BYTES = 64 << 20
DEFAULT_PROXY_BYTES = 512 << 20
_BODY_BYTES_ENV, _PROXY_BYTES_ENV = "IMGCLS_BODY_BYTES", "IMGCLS_DOOR_BYTES"

_DISCONNECT: Message = {"type": "http.disconnect"}
_RAY_HEADERS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}
"""Headers by which anyone could have a request never end; they are for proxies of Ray's own."""
_RAY_ERROR_DETAILS = {
    404: "nothing is served under this path",
    408: "it was not answered within the time that a request has",
    503: "no replica takes this request now; try again later",
}
"""Of Ray's own answers, by HTTP status."""
_RETRY_AFTER_S = 2

logger = logging.getLogger("ray.serve")


def build_environment(body_bytes: int, proxy_bytes: int) -> dict[str, str]:
    """The bounds, as the environment of Ray's processes must have them."""
    return {_BODY_BYTES_ENV: str(body_bytes), _PROXY_BYTES_ENV: str(proxy_bytes)}


def build_middlewares() -> list[Middleware]:
    """For Ray Serve, which calls it by name in each process that listens."""
    body_bytes = int(os.environ.get(_BODY_BYTES_ENV, DEFAULT_BODY_BYTES))
    proxy_bytes = int(os.environ.get(_PROXY_BYTES_ENV, DEFAULT_PROXY_BYTES))
    return [Middleware(BodyLimitMiddleware, body_bytes, proxy_bytes)]


class BodyLimitMiddleware:
    """Counts the bytes of bodies from their arrival until their request is answered.

    body_bytes: of one; more is refused with 413
    proxy_bytes: of all that are under way in this process; more is refused with 503
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
    """One request on its way in, and its answer on the way out."""

    def __init__(
        self, gate: BodyLimitMiddleware, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._middleware = gate
        self._scope = scope
        self._receive = receive
        self._send = send
        self._held_bytes = 0
        self._is_complete = False
        self._is_answered = False
        self._is_closed = False

    async def run(self) -> None:
        gate = self._middleware
        length = dict(self._scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > gate.body_bytes:
            await self._send_problem(build_too_large_problem(gate.body_bytes))
            return
        try:
            await gate.app(self._scope, self._receive_bounded, self._send_checked)
        except Exception:
            if self._is_answered:
                raise
            logger.exception("a request failed before a replica had it")
        finally:
            gate.held_bytes -= self._held_bytes
        if not self._is_answered:
            # a replica that died of this request is told by the same silence: nobody is asked to
            # send it again
            await self._send_problem(
                Problem(500, "internal_error", "what was to answer has ended; the log has more")
            )

    async def _receive_bounded(self) -> Message:
        """What has arrived; once it is too much, that nobody is there any more."""
        if self._is_closed:
            return _DISCONNECT
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        gate, count = self._middleware, len(message.get("body", b""))
        self._held_bytes += count
        gate.held_bytes += count
        self._is_complete = not message.get("more_body", False)
        if self._held_bytes > gate.body_bytes:
            await self._send_problem(build_too_large_problem(gate.body_bytes))
        elif gate.held_bytes > gate.proxy_bytes:
            await self._send_problem(_build_full_problem())
        else:
            return message
        return _DISCONNECT

    async def _send_checked(self, message: Message) -> None:
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
        """Answer in the place of what is behind, and let nothing more through, either way."""
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
        "as many bytes as may wait here are waiting; try again later",
        retry_after=_RETRY_AFTER_S,
    )


def _convert_ray_error(start: Message) -> Problem | None:
    """The problem that an answer of Ray's own is; None for answers of an application.

    What Ray says itself is plain text without a length.
    """
    headers = dict(map(tuple, start["headers"]))
    plain = headers.get(b"content-type", b"").startswith(b"text/plain")
    if start["status"] < 400 or not plain or b"content-length" in headers:
        return None
    problem = build_status_problem(start["status"], _RAY_ERROR_DETAILS.get(start["status"]))
    if problem.status == 503:
        after = headers.get(b"retry-after", b"")
        problem.retry_after = max(1, int(after)) if after.isdigit() else _RETRY_AFTER_S
    return problem
