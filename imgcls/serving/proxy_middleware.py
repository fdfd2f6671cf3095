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
    NOTHING,
    SAFE_HEADERS,
    Problem,
    may_be_endless,
    of_status,
    too_many_bytes,
)

CALLBACK = f"{__name__}:middlewares"
"""What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH must say where Ray is started."""
BODY_BYTES = 64 << 20
DOOR_BYTES = 512 << 20
_BODY, _DOOR = "IMGCLS_BODY_BYTES", "IMGCLS_DOOR_BYTES"

_DISCONNECT: Message = {"type": "http.disconnect"}
_RAYS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}
"""Headers by which anyone could have a request never end; they are for proxies of Ray's own."""
_WORDS = {
    404: "nothing is served under this path",
    408: "it was not answered within the time that a request has",
    503: "no replica takes this request now; try again later",
}
"""Of Ray's own answers, by HTTP status."""
_RETRY_SECONDS = 2

logger = logging.getLogger("ray.serve")


def settings(body_bytes: int, door_bytes: int) -> dict[str, str]:
    """The bounds, as the environment of Ray's processes must have them."""
    return {_BODY: str(body_bytes), _DOOR: str(door_bytes)}


def middlewares() -> list[Middleware]:
    """For Ray Serve, which calls it by name in each process that listens."""
    body_bytes = int(os.environ.get(_BODY, BODY_BYTES))
    door_bytes = int(os.environ.get(_DOOR, DOOR_BYTES))
    return [Middleware(Gate, body_bytes, door_bytes)]


class Gate:
    """Counts the bytes of bodies from their arrival until their request is answered.

    body_bytes: of one; more is refused with 413
    door_bytes: of all that are under way in this process; more is refused with 503
    """

    def __init__(self, app: ASGIApp, body_bytes: int, door_bytes: int) -> None:
        self.app = app
        self.body_bytes = body_bytes
        self.door_bytes = door_bytes
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = [pair for pair in scope["headers"] if pair[0] not in _RAYS]
        await _Passage(self, {**scope, "headers": headers}, receive, send).go()


class _Passage:
    """One request on its way in, and its answer on the way out."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self._gate = gate
        self._scope = scope
        self._receive = receive
        self._send = send
        self._held = 0
        self._whole = False
        self._started = False
        self._shut = False

    async def go(self) -> None:
        gate = self._gate
        length = dict(self._scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > gate.body_bytes:
            await self._answer(too_many_bytes(gate.body_bytes))
            return
        try:
            await gate.app(self._scope, self._hear, self._say)
        except Exception:
            if self._started:
                raise
            logger.exception("a request failed before a replica had it")
        finally:
            gate.held -= self._held
        if not self._started:
            # a replica that died of this request is told by the same silence: nobody is asked to
            # send it again
            await self._answer(
                Problem(500, "internal_error", "what was to answer has ended; the log has more")
            )

    async def _hear(self) -> Message:
        """What has arrived; once it is too much, that nobody is there any more."""
        if self._shut:
            return _DISCONNECT
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        gate, count = self._gate, len(message.get("body", b""))
        self._held += count
        gate.held += count
        self._whole = not message.get("more_body", False)
        if self._held > gate.body_bytes:
            await self._answer(too_many_bytes(gate.body_bytes))
        elif gate.held > gate.door_bytes:
            await self._answer(_full())
        else:
            return message
        return _DISCONNECT

    async def _say(self, message: Message) -> None:
        if self._shut:
            return
        if message["type"] == "http.response.start":
            problem = _of_ray(message)
            if problem is not None:
                await self._answer(problem)
                return
            self._started = True
        await self._send(message)

    async def _answer(self, problem: Problem) -> None:
        """Answer in the place of what is behind, and let nothing more through, either way."""
        if self._shut:
            return
        self._shut = True
        if self._started:
            return
        self._started = True
        response = problem.response()
        response.headers.update(SAFE_HEADERS)
        response.headers["Content-Security-Policy"] = NOTHING
        if not self._whole and may_be_endless(self._scope, self._gate.body_bytes):
            response.headers["Connection"] = "close"
        await response(self._scope, self._receive, self._send)


def _full() -> Problem:
    return Problem(
        503,
        "busy",
        "as many bytes as may wait here are waiting; try again later",
        retry_after=_RETRY_SECONDS,
    )


def _of_ray(start: Message) -> Problem | None:
    """The problem that an answer of Ray's own is; None for answers of an application.

    What Ray says itself is plain text without a length.
    """
    headers = dict(map(tuple, start["headers"]))
    plain = headers.get(b"content-type", b"").startswith(b"text/plain")
    if start["status"] < 400 or not plain or b"content-length" in headers:
        return None
    problem = of_status(start["status"], _WORDS.get(start["status"]))
    if problem.status == 503:
        after = headers.get(b"retry-after", b"")
        problem.retry_after = max(1, int(after)) if after.isdigit() else _RETRY_SECONDS
    return problem
