"""Who may come in, and how often: API keys where there are some, else this machine alone.

Knows nothing of Ray: what replicas have in common comes as a `Shared`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.requests import Request

from imgcls.serving.api_keys import ApiKey, Keyring, KeyScope
from imgcls.serving.problems import Problem
from imgcls.serving.rate_limit import LocalAllowance

_LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "::1"}
_PROXY_HEADERS = ("forwarded", "x-real-ip")
"""Headers by which a proxy says whom it asks for, beside those that begin with x-forwarded-."""


class ServiceControl(Protocol):
    """What the replicas of a service have in common."""

    async def request_reload(self) -> int:
        """Have all replicas load their bundle again."""

    async def render_metrics(self) -> bytes:
        """The counts of all replicas, as Prometheus reads them."""


class AccessControl:
    """What an application needs beside its service; `draining` is set when the end is near.

    origins: of web pages from elsewhere that may ask
    """

    def __init__(
        self,
        keys: Keyring | None,
        pocket: LocalAllowance,
        shared: ServiceControl,
        origins: Sequence[str] = (),
    ) -> None:
        self.keys = keys
        self.allowance = pocket
        self.control = shared
        self.allowed_origins = origins
        self.is_draining = False

    def authorize(self, presented: str | None, scope: KeyScope, request: Request) -> ApiKey | None:
        """Whose key was presented; None where keys are not asked for.

        Raises the Problem of who may not enter.
        """
        if self.keys is None:
            _check_local_request(request, self.allowed_origins)
            return None
        if not presented:
            raise Problem(401, "key_missing", "send an API key: Authorization: Bearer KEY")
        key = self.keys.find(presented)
        if key is None:
            raise Problem(401, "key_unknown", "this API key is not known, or is no longer good")
        request.state.key = key.name
        if scope not in key.scopes:
            raise Problem(403, "scope_missing", f"this API key has no scope {scope!r}")
        return key

    async def charge(self, key: ApiKey | None, images: int) -> None:
        """Count images against a key's rate; raises a Problem when it has sent too many."""
        if key is None or key.images_per_minute is None:
            return
        wait = await self.allowance.spend(key.name, key.images_per_minute, images)
        if wait:
            raise Problem(
                429,
                "too_many_requests",
                f"this API key may send {key.images_per_minute:g} images a minute",
                retry_after=wait,
            )


def _check_local_request(request: Request, origins: Sequence[str]) -> None:
    """Without keys only this machine may ask, by its own name and for itself.

    A web page from elsewhere that has its name point here (DNS rebinding) does not pass, nor one
    that has a browser on this machine ask, nor does what a proxy on this machine passes on.
    """
    client = request.client.host if request.client else ""
    passed_on = any(
        name in _PROXY_HEADERS or name.startswith("x-forwarded-") for name in request.headers
    )
    host = _strip_port(request.headers.get("host", ""))
    if client not in ("127.0.0.1", "::1") or host not in _LOOPBACK_HOSTS or passed_on:
        raise Problem(
            403, "keys_needed", "without API keys it can be asked from its own machine only"
        )
    origin = request.headers.get("origin")
    if origin in origins:
        return
    if origin is not None:
        foreign = _strip_port(origin.partition("://")[2]) not in _LOOPBACK_HOSTS
    else:
        foreign = request.headers.get("sec-fetch-site") == "cross-site"
    if foreign:
        raise Problem(403, "keys_needed", "without API keys no web page from elsewhere may ask")


def _strip_port(host: str) -> str:
    """A host without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
