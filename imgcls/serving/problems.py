"""Error responses as problem details (RFC 9457).

A rejected image keeps the `status` that it has in the table of a batch run; the HTTP status is
derived from it.
"""

from __future__ import annotations

import http
import math
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"
_TYPE_PREFIX = "urn:imgcls:problem:"

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every response."""
DENY_ALL_POLICY = "default-src 'none'; frame-ancestors 'none'"
"""Content-Security-Policy of every response except the HTML page."""

_IMAGE_HTTP_STATUS = {"not_an_image": 415, "unsupported": 415, "too_large": 413}
"""HTTP status by image status; every other image status is a 422."""


class Problem(Exception):
    """A request that is rejected or failed, with its HTTP status.

    kind:        type of the problem, stable across versions
    retry_after: seconds after which the client may retry; None if a retry is pointless
    extra:       additional members of the response body
    """

    def __init__(
        self, status: int, kind: str, detail: str, *, retry_after: int | None = None, **extra: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.retry_after = retry_after
        self.extra = extra

    def build_response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="imgcls"'
        body = {
            "type": f"{_TYPE_PREFIX}{self.kind}",
            "title": self.kind.replace("_", " "),
            "status": self.status,
            "detail": self.detail,
            **self.extra,
        }
        return JSONResponse(body, self.status, headers, MEDIA_TYPE)


def build_image_problem(status: str, error: str) -> Problem:
    """Problem of a request whose only image was rejected, with the status and error of its row."""
    return Problem(_IMAGE_HTTP_STATUS.get(status, 422), status, error)


def build_status_problem(status: int, detail: str | None = None) -> Problem:
    """Problem named after an HTTP status, e.g. 404: `not_found`."""
    phrase = http.HTTPStatus(status).phrase
    return Problem(status, phrase.lower().replace(" ", "_"), detail or phrase)


def build_internal_error() -> Problem:
    return Problem(500, "internal_error", "internal error; the service's log has the traceback")


def build_too_large_problem(limit: int) -> Problem:
    return Problem(413, "too_many_bytes", f"the request body exceeds the limit of {limit:,} bytes")


def build_busy_problem(seconds: float) -> Problem:
    """Problem of a full queue.

    seconds: estimate of the time until there is room
    """
    return Problem(
        503,
        "busy",
        "the queue of images is full; retry later",
        retry_after=max(1, math.ceil(seconds)),
    )


def build_out_of_memory_problem(batch_size: int) -> Problem:
    """Problem of images for which a GPU has no memory.

    batch_size: number of images in the smallest forward pass that was tried
    """
    return Problem(
        503,
        "out_of_memory",
        f"the GPU has not enough memory for a batch of {batch_size}. Set a smaller --batch-size of "
        "the service, or use a GPU with more memory",
        retry_after=5,
    )


def build_device_failure_problem() -> Problem:
    """Problem of a replica whose GPU has failed, and which another one replaces."""
    return Problem(
        503,
        "device_failure",
        "the GPU of this replica failed; the replica is being replaced, retry later",
        retry_after=5,
    )


def can_exceed_limit(scope: Scope, max_bytes: int) -> bool:
    """Whether the request body is, or may turn out to be, longer than `max_bytes`.

    The HTTP server reads the rest of such a body after the response unless the response closes the
    connection.
    """
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    is_known = length.isdigit() and int(length) <= max_bytes
    return b"transfer-encoding" in headers or not is_known
