"""Around every request: counts it, answers HEAD, adds the headers that browsers should mind."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imgcls.serving.config import ServeConfig
from imgcls.serving.problems import (
    DENY_ALL_POLICY,
    SECURITY_HEADERS,
    build_internal_error,
    can_exceed_limit,
)
from imgcls.serving.service import Service

logger = logging.getLogger(__name__)


class AppMiddleware:
    """Around every request: counts it, and sends with its answer what browsers should mind."""

    def __init__(self, app: ASGIApp, service: Service, config: ServeConfig) -> None:
        self._app = app
        self._service = service
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
        began = time.perf_counter()
        status = 500
        started = ended = False
        endless = can_exceed_limit(scope, self._max_bytes)
        headers_only = scope["method"] == "HEAD"
        if headers_only:  # as GET, without the body (RFC 9110, 9.3.2)
            scope = {**scope, "method": "GET"}

        async def heard() -> Message:
            nonlocal endless
            message = await receive()
            if not message.get("more_body", False):
                endless = False
            return message

        async def guarded(message: Message) -> None:
            nonlocal status, started, ended
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                present = {name for name, _ in message["headers"]}
                added = [*self._headers]
                if b"content-security-policy" not in present:
                    added.append((b"content-security-policy", DENY_ALL_POLICY.encode()))
                if endless:  # else the server would go on reading what nobody wants
                    added.append((b"connection", b"close"))
                message = {**message, "headers": [*message["headers"], *added]}
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
                if headers_only:
                    message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, heard, guarded)
        except ClientDisconnect:
            status = _CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            status = status if started else _CLIENT_CLOSED_REQUEST
            raise
        except Exception:
            logger.exception("a request failed")
            if started and not ended:
                raise
            if not started:
                await build_internal_error().build_response()(scope, receive, guarded)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            telemetry = self._service.metrics
            telemetry.requests.labels(
                route=route, status=str(status), key=scope.get("state", {}).get("key", "")
            ).inc()
            telemetry.request_timeout_s.labels(route=route).observe(time.perf_counter() - began)


_CLIENT_CLOSED_REQUEST = 499
"""In the counts, for who did not wait for an answer; nginx' number."""
