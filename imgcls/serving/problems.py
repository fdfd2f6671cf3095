"""What goes wrong in a request, as problem details (RFC 9457).

A bad image has the status that it has in the table of a labelling run; the HTTP status follows.
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
"""What browsers should mind with every answer."""
DENY_ALL_POLICY = "default-src 'none'; frame-ancestors 'none'"
"""The Content-Security-Policy of all but the page."""

_IMAGE_HTTP_STATUS = {"not_an_image": 415, "unsupported": 415, "too_large": 413}
"""HTTP status by status of an image; 422 for all the others."""


class Problem(Exception):
    """A request that cannot be answered as it was meant.

    kind:        names the type of problem; stays the same in all versions
    retry_after: whole seconds after which it may be tried again
    """

    def __init__(
        self, status: int, kind: str, detail: str, *, retry_after: int | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.retry_after = retry_after
        self.extra = more

    def build_response(self) -> JSONResponse:
        """As it goes over the wire."""
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
    """The problem of a request whose one image cannot be used, in the words of its row."""
    return Problem(_IMAGE_HTTP_STATUS.get(status, 422), status, error)


def build_status_problem(status: int, detail: str | None = None) -> Problem:
    """A problem that needs no more than HTTP's own words."""
    phrase = http.HTTPStatus(status).phrase
    return Problem(status, phrase.lower().replace(" ", "_"), detail or phrase)


def build_internal_error() -> Problem:
    return Problem(500, "internal_error", "this is a defect; the log has more")


def build_too_large_problem(limit: int) -> Problem:
    return Problem(
        413, "too_many_bytes", f"the body has more than {limit:,} bytes, which is the most here"
    )


def build_busy_problem(seconds: float) -> Problem:
    """No room for more images now."""
    return Problem(
        503,
        "busy",
        "as many images as may wait are waiting; try again later",
        retry_after=max(1, math.ceil(seconds)),
    )


def can_exceed_limit(scope: Scope, most: int) -> bool:
    """Whether a body was announced that is longer than any is allowed to be, or may be.

    The server would go on reading it after the answer, unless the connection is closed.
    """
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    known = length.isdigit() and int(length) <= most
    return b"transfer-encoding" in headers or not known
