"""Read files from web servers: bounded, with unchanged URLs, and a request limit per host.

A URL is sent as it is in the manifest, because a signed URL becomes invalid by re-encoding. A
process sends at most `max_requests_per_host` concurrent requests to a host, and none before the
time that the host has named in a Retry-After.
"""

from __future__ import annotations

import asyncio
import functools
import urllib.parse
import weakref
import zlib
from collections.abc import AsyncIterator
from typing import Any

from imgcls.data.error_details import get_http_status, shorten_url
from imgcls.data.host_limiter import HostLimiter
from imgcls.data.readahead import BodyBuffer, ReadAllowance, too_large_error
from imgcls.data.storage_settings import StorageConfig
from imgcls.data.store import ReadObject, Store
from imgcls.errors import StorageChanged, StorageError, StorageUnavailable

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 10
_PIECE_BYTES = 1 << 16
"""Bytes that are read from a connection, or from a compressed body, at a time."""


class HttpStore(Store):
    """Web servers: read over HTTP; there is no listing but that of the driver."""

    protocols = ("http", "https")

    def __init__(self, protocol: str, settings: StorageConfig, account: str | None = None) -> None:
        super().__init__(protocol, settings, account)
        self._reader = _build_reader(settings)

    def build_file_system(self, protocol: str, settings: StorageConfig, account: str | None) -> Any:
        import fsspec

        client = {"headers": {"User-Agent": settings.user_agent}, "requote_redirect_url": False}
        return fsspec.filesystem(
            protocol, use_listings_cache=False, encoded=True, client_kwargs=client
        )

    def get_path(self, url: str) -> str:
        return super().get_path(encode_url(url))

    def start_read(self, url: str, allowance: ReadAllowance) -> ReadObject:
        return lambda _: self._reader.read(url, allowance)

    async def read_range(self, path: str, start: int, end: int, version: str | None) -> bytes:
        # a weak ETag matches nothing in If-Match (RFC 9110, section 13.1.1)
        can_match = version is not None and not version.startswith("W/")
        headers = {"If-Match": f'"{version}"'} if can_match else {}
        try:
            data: bytes = await self.file_system._cat_file(
                path, start=start, end=end, headers=headers
            )
        except Exception as error:
            if get_http_status(error) == "412":
                raise StorageChanged(f"{shorten_url(path)}: was replaced") from error
            raise
        return data

    def get_host_limiter(self, url: str) -> HostLimiter:
        return self._reader.get_limiter(url)

    @classmethod
    def describe_permission(cls, permission: str) -> str:
        return "; a signed URL may have expired"


@functools.cache
def _build_reader(settings: StorageConfig) -> HttpReader:
    """One reader for http:// and https://."""
    return HttpReader(
        settings.max_requests_per_host, settings.user_agent, settings.attempt_timeout_s
    )


class HttpReader:
    """Reads whole files over HTTP, on one event loop."""

    def __init__(self, max_requests_per_host: int, user_agent: str, connect_seconds: float) -> None:
        self._host_requests = max_requests_per_host
        self._user_agent = user_agent
        self._connect_seconds = connect_seconds
        self._hosts: dict[str, HostLimiter] = {}
        self._session: Any = None

    def get_limiter(self, url: str) -> HostLimiter:
        """The limiter of a URL's host: scheme, name and port."""
        scheme, _, rest = url.partition("://")
        name = f"{scheme}://{rest.partition('/')[0].partition('?')[0].rpartition('@')[2]}".lower()
        return self._hosts.setdefault(name, HostLimiter(name, self._host_requests))

    async def read(self, url: str, allowance: ReadAllowance) -> bytes:
        """Read a file, decompressed where the server compressed it for the transfer.

        Raises StorageTooLarge, BudgetFull, StorageUnavailable for an incomplete response, and
        aiohttp's errors, with the response headers, for any other response.
        """
        import aiohttp
        import yarl
        from fsspec.implementations.http import HTTPFileSystem

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_seconds),
                headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity"},
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            loop = asyncio.get_running_loop()
            weakref.finalize(self, HTTPFileSystem.close_session, loop, self._session)
        place = url
        for _ in range(_MAX_REDIRECTS):
            target = yarl.URL(encode_url(place), encoded=True)
            async with self._session.get(target, allow_redirects=False) as answer:
                if answer.status not in _REDIRECTS or "Location" not in answer.headers:
                    return await self._read_body(url, answer, allowance)
                location = answer.headers["Location"]
            whole = location.startswith(("http://", "https://"))
            place = location if whole else urllib.parse.urljoin(place, location)
            if not place.startswith(("http://", "https://")):
                raise StorageError(
                    f"{shorten_url(url)}: is redirected to {shorten_url(place)}, no web URL"
                )
        raise StorageError(f"{shorten_url(url)}: is redirected more than {_MAX_REDIRECTS} times")

    async def _read_body(self, url: str, answer: Any, allowance: ReadAllowance) -> bytes:
        from aiohttp import ClientResponseError

        if answer.status != 200:
            error = ClientResponseError(
                answer.request_info, (), status=answer.status, message=answer.reason or "",
                headers=answer.headers,
            )  # fmt: skip
            self.get_limiter(url).note_retry_after(error)
            raise error
        coding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        length = answer.content_length  # as sent; the content is at least as long
        if length is not None and coding != "identity" and allowance.is_exceeded_by(length):
            raise too_large_error(url, allowance.max_bytes)
        with BodyBuffer(url, allowance, length) as body:
            async for part in _decompress(url, coding, answer.content.iter_chunked(_PIECE_BYTES)):
                body.append(part)
            return body.join()


def encode_url(url: str) -> str:
    """Encode the characters of a URL that no request may contain, and leave the others unchanged.

    White space, control characters and non-ASCII characters are percent-encoded as UTF-8, a
    non-ASCII host name by IDNA. Everything else is kept: %2F is not /, + is not %20.
    """
    scheme, _, rest = url.partition("://")
    end = next((i for i, letter in enumerate(rest) if letter in "/?#"), len(rest))
    host, path = rest[:end], rest[end:]
    if not host.isascii():
        host = host.encode("idna").decode()
    if not path.startswith("/"):
        path = "/" + path
    kept = "".join(
        letter
        if "!" <= letter <= "~"
        else urllib.parse.quote(letter, safe="", errors="surrogateescape")
        for letter in path
    )
    return f"{scheme}://{host}{kept}"


async def _decompress(url: str, coding: str, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Decompress a body, in pieces of bounded size.

    Raises StorageUnavailable for an incomplete or damaged body, StorageError for an unknown coding.
    """
    if coding in ("identity", ""):
        async for piece in pieces:
            yield piece
        return
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise StorageError(f"{shorten_url(url)}: has the unknown Content-Encoding {coding!r}")
    unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32 if coding != "deflate" else 15)
    try:
        async for piece in pieces:
            while piece:
                yield unpack.decompress(piece, _PIECE_BYTES)
                piece = unpack.unconsumed_tail
    except zlib.error as error:
        raise StorageUnavailable(f"{shorten_url(url)}: arrived damaged ({error})") from error
    if not unpack.eof:
        raise StorageUnavailable(f"{shorten_url(url)}: the {coding} data is incomplete")
