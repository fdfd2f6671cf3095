"""Authentication and rate limiting: API keys, or loopback only when none are configured."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from imgcls.serving.api_keys import ApiKey, Keyring, KeyScope
from imgcls.serving.problems import Problem
from imgcls.serving.rate_limit import LocalAllowance

_LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "::1"}
_PROXY_HEADERS = ("forwarded", "x-real-ip")
"""Headers that reverse proxies add, besides those that begin with `x-forwarded-`."""


class AccessControl:
    """Checks who may send a request, and how many images.

    keys:            the accepted API keys; None to accept requests from this machine only
    allowance:       rate limits of the keys
    allowed_origins: origins of web pages on other hosts that may send requests without a key
    """

    def __init__(
        self,
        keys: Keyring | None,
        allowance: LocalAllowance,
        allowed_origins: Sequence[str] = (),
    ) -> None:
        self.keys = keys
        self.allowance = allowance
        self.allowed_origins = allowed_origins

    def authorize(self, secret: str | None, scope: KeyScope, request: Request) -> ApiKey | None:
        """Find the key of a request; None if the service has no keys.

        secret: the API key that the request carries
        Raises a Problem (401 or 403) if the request is not allowed.
        """
        if self.keys is None:
            _check_local_request(request, self.allowed_origins)
            return None
        if not secret:
            raise Problem(401, "key_missing", "no API key. Send it as Authorization: Bearer KEY")
        key = self.keys.find(secret)
        if key is None:
            raise Problem(401, "key_unknown", "the API key is unknown or expired")
        request.state.key = key.name
        if scope not in key.scopes:
            raise Problem(403, "scope_missing", f"the API key does not have the scope {scope!r}")
        return key

    async def charge(self, key: ApiKey | None, images: int, paid: int = 0) -> None:
        """Count images against the key's rate limit; raises a Problem (429) above it.

        paid: images that were counted before for the same request
        """
        if key is None or key.images_per_minute is None:
            return
        wait = await self.allowance.spend(key.name, key.images_per_minute, images, paid)
        if wait:
            raise Problem(
                429,
                "too_many_requests",
                f"the rate limit of this API key is {key.images_per_minute:g} images per minute",
                retry_after=wait,
            )


def _check_local_request(request: Request, allowed_origins: Sequence[str]) -> None:
    """Without keys, allow only requests from this machine, addressed to a loopback name.

    Rejects a web page whose host name resolves to this machine (DNS rebinding), a page of another
    host opened in a browser on this machine, and requests forwarded by a proxy on this machine.
    """
    client = request.client.host if request.client else ""
    is_forwarded = any(
        name in _PROXY_HEADERS or name.startswith("x-forwarded-") for name in request.headers
    )
    host = _strip_port(request.headers.get("host", ""))
    if client not in ("127.0.0.1", "::1") or host not in _LOOPBACK_HOSTS or is_forwarded:
        raise Problem(
            403, "keys_needed", "without API keys only requests from the same machine are allowed"
        )
    origin = request.headers.get("origin")
    if origin in allowed_origins:
        return
    if origin is not None:
        is_foreign = _strip_port(origin.partition("://")[2]) not in _LOOPBACK_HOSTS
    else:
        is_foreign = request.headers.get("sec-fetch-site") == "cross-site"
    if is_foreign:
        raise Problem(
            403, "keys_needed", "without API keys requests from other websites are rejected"
        )


def _strip_port(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
