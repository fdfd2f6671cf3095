"""Outermost ASGI middleware of a replica: metrics, HEAD requests, security headers, error log."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imgcls.serving.config import ServeConfig
from imgcls.serving.metrics import ReplicaMetrics
from imgcls.serving.problems import (
    DENY_ALL_POLICY,
    SECURITY_HEADERS,
    build_internal_error,
    can_exceed_limit,
)

_CLIENT_CLOSED_REQUEST = 499
"""Status in the metrics of a request whose client disconnected; nginx uses the same number."""

logger = logging.getLogger(__name__)


class AppMiddleware:
    """Counts every request and adds security headers to every response."""

    def __init__(self, app: ASGIApp, metrics: ReplicaMetrics, config: ServeConfig) -> None:
        self._app = app
        self._metrics = metrics
        self._max_bytes = config.limits.body_bytes
        self._headers = [
            (name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()
        ]
        if config.http.certificate is not None:
            self._headers.append((b"strict-transport-security", b"max-age=31536000"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()
        status = 500
        response = _Response(
            send, self._headers, scope["method"] == "HEAD", can_exceed_limit(scope, self._max_bytes)
        )
        if response.is_head:  # handled as GET, without the body (RFC 9110, 9.3.2)
            scope = {**scope, "method": "GET"}

        async def receive_tracked() -> Message:
            message = await receive()
            if not message.get("more_body", False):
                response.has_unread_body = False
            return message

        try:
            await self._app(scope, receive_tracked, response.send)
            status = response.status or status
        except ClientDisconnect:
            status = _CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            status = response.status or _CLIENT_CLOSED_REQUEST
            raise
        except Exception:
            logger.exception("a request failed")
            status = response.status or status
            if response.status and not response.is_finished:
                raise
            if not response.status:
                await build_internal_error().build_response()(scope, receive, response.send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            key = scope.get("state", {}).get("key", "")
            self._metrics.requests.labels(route=route, status=str(status), key=key).inc()
            seconds = time.perf_counter() - started_at
            self._metrics.request_seconds.labels(route=route).observe(seconds)


class _Response:
    """The response to one request, as it is sent.

    status:          HTTP status; 0 before the response has started
    has_unread_body: the client may still be sending a body that is longer than allowed
    """

    def __init__(
        self, send: Send, headers: list[tuple[bytes, bytes]], is_head: bool, has_unread_body: bool
    ) -> None:
        self.status = 0
        self.is_finished = False
        self.is_head = is_head
        self.has_unread_body = has_unread_body
        self._send = send
        self._headers = headers

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name for name, _ in message["headers"]}
            added = [*self._headers]
            if b"content-security-policy" not in present:
                added.append((b"content-security-policy", DENY_ALL_POLICY.encode()))
            if self.has_unread_body:  # otherwise the server would read the rest of the body
                added.append((b"connection", b"close"))
            message = {**message, "headers": [*message["headers"], *added]}
        elif message["type"] == "http.response.body":
            self.is_finished = not message.get("more_body", False)
            if self.is_head:
                message = {**message, "body": b""}
        await self._send(message)
