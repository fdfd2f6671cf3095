"""Who may come in, and how often: API keys where there are some, else this machine alone.

Knows nothing of Ray: what replicas have in common comes as a `Shared`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.requests import Request

from imgcls.serving.api_keys import Key, Keyring, Scope
from imgcls.serving.problems import Problem
from imgcls.serving.rate_limit import Pocket

_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
_OF_PROXIES = ("forwarded", "x-real-ip")
"""Headers by which a proxy says whom it asks for, beside those that begin with x-forwarded-."""


class Shared(Protocol):
    """What the replicas of a service have in common."""

    async def reload(self) -> int:
        """Have all replicas load their bundle again."""

    async def metrics(self) -> bytes:
        """The counts of all replicas, as Prometheus reads them."""


class Door:
    """What an application needs beside its service; `draining` is set when the end is near.

    origins: of web pages from elsewhere that may ask
    """

    def __init__(
        self, keys: Keyring | None, pocket: Pocket, shared: Shared, origins: Sequence[str] = ()
    ) -> None:
        self.keys = keys
        self.pocket = pocket
        self.shared = shared
        self.origins = origins
        self.draining = False

    def enter(self, presented: str | None, scope: Scope, request: Request) -> Key | None:
        """Whose key was presented; None where keys are not asked for.

        Raises the Problem of who may not enter.
        """
        if self.keys is None:
            _check_local(request, self.origins)
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

    async def pay(self, key: Key | None, images: int) -> None:
        """Count images against a key's rate; raises a Problem when it has sent too many."""
        if key is None or key.images_per_minute is None:
            return
        wait = await self.pocket.spend(key.name, key.images_per_minute, images)
        if wait:
            raise Problem(
                429,
                "too_many_requests",
                f"this API key may send {key.images_per_minute:g} images a minute",
                retry_after=wait,
            )


def _check_local(request: Request, origins: Sequence[str]) -> None:
    """Without keys only this machine may ask, by its own name and for itself.

    A web page from elsewhere that has its name point here (DNS rebinding) does not pass, nor one
    that has a browser on this machine ask, nor does what a proxy on this machine passes on.
    """
    client = request.client.host if request.client else ""
    passed_on = any(
        name in _OF_PROXIES or name.startswith("x-forwarded-") for name in request.headers
    )
    host = _name(request.headers.get("host", ""))
    if client not in ("127.0.0.1", "::1") or host not in _LOCAL_HOSTS or passed_on:
        raise Problem(
            403, "keys_needed", "without API keys it can be asked from its own machine only"
        )
    origin = request.headers.get("origin")
    if origin in origins:
        return
    if origin is not None:
        foreign = _name(origin.partition("://")[2]) not in _LOCAL_HOSTS
    else:
        foreign = request.headers.get("sec-fetch-site") == "cross-site"
    if foreign:
        raise Problem(403, "keys_needed", "without API keys no web page from elsewhere may ask")


def _name(host: str) -> str:
    """A host without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
