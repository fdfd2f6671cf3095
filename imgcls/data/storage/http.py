"""Read files from web servers: bounded, with unchanged URLs, and a request limit per host.

A URL is sent as it is in the manifest, because a signed URL becomes invalid by re-encoding. A
process sends at most `max_requests_per_host` concurrent requests to a host, and none before the
time that the host has named in a Retry-After. On request, images whose owner has opted out are
refused, and images are kept in a local cache.
"""

from __future__ import annotations

import asyncio
import functools
import urllib.parse
import weakref
import zlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

from imgcls.data import formats
from imgcls.data.storage.error_details import get_http_status, shorten_url
from imgcls.data.storage.host_limiter import HostLimiter
from imgcls.data.storage.http_cache import HttpCache
from imgcls.data.storage.readahead import BodyBuffer, ReadAllowance, too_large_error
from imgcls.data.storage.robots import ROBOTS_HEADER, find_opt_out
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.data.storage.store import ReadCached, ReadObject, Store
from imgcls.errors import StorageChanged, StorageError, StorageOptedOut, StorageUnavailable

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

    def start_cached_read(self, url: str, allowance: ReadAllowance) -> ReadCached | None:
        return self._reader.start_cached_read(url, allowance)

    def get_host_limiter(self, url: str) -> HostLimiter:
        return self._reader.get_limiter(url)

    @classmethod
    def describe_permission(cls, permission: str) -> str:
        return "; a signed URL may have expired"


@functools.cache
def _build_reader(settings: StorageConfig) -> HttpReader:
    """One reader for http:// and https://."""
    return HttpReader(settings)


class HttpReader:
    """Reads whole files over HTTP, on one event loop."""

    def __init__(self, settings: StorageConfig) -> None:
        self._settings = settings
        self._cache = None if settings.http_cache is None else HttpCache(settings.http_cache)
        self._hosts: dict[str, HostLimiter] = {}
        self._session: Any = None

    def get_limiter(self, url: str) -> HostLimiter:
        """The limiter of a URL's host: scheme, name and port."""
        scheme, _, rest = url.partition("://")
        name = f"{scheme}://{rest.partition('/')[0].partition('?')[0].rpartition('@')[2]}".lower()
        limit = self._settings.max_requests_per_host
        return self._hosts.setdefault(name, HostLimiter(name, limit))

    def start_cached_read(self, url: str, allowance: ReadAllowance) -> ReadCached | None:
        """The function that reads an image from the cache; None without one."""
        if self._cache is None or not allowance.is_for_image:
            return None
        return functools.partial(asyncio.to_thread, self._read_cached, url, allowance)

    def _read_cached(self, url: str, allowance: ReadAllowance) -> bytes | None:
        assert self._cache is not None
        found = self._cache.read(url, allowance)
        if found is not None:
            self._check_opt_out(url, found.robots)
        return None if found is None else found.data

    async def read(self, url: str, allowance: ReadAllowance) -> bytes:
        """Read a file, decompressed where the server compressed it for the transfer.

        Raises StorageTooLarge, BudgetFull, StorageOptedOut, StorageUnavailable for an incomplete
        response, and aiohttp's errors, with the response headers, for any other response.
        """
        import aiohttp
        import yarl
        from fsspec.implementations.http import HTTPFileSystem

        settings = self._settings
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.attempt_timeout_s),
                headers={"User-Agent": settings.user_agent, "Accept-Encoding": "identity"},
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
        robots: list[str] = answer.headers.getall(ROBOTS_HEADER, [])
        if allowance.is_for_image:
            self._check_opt_out(url, robots)
        coding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        length = answer.content_length  # as sent; the content is at least as long
        if length is not None and coding != "identity" and allowance.is_exceeded_by(length):
            raise too_large_error(url, allowance.max_bytes)
        with BodyBuffer(url, allowance, length) as body:
            async for part in _decompress(url, coding, answer.content.iter_chunked(_PIECE_BYTES)):
                body.append(part)
            data = body.join()
        is_image = formats.identify_format(data) is not None  # not an error page of status 200
        if self._cache is not None and allowance.is_for_image and is_image:
            await asyncio.to_thread(self._cache.write, url, data, robots)
        return data

    def _check_opt_out(self, url: str, robots: Iterable[str]) -> None:
        """Raise StorageOptedOut where the headers exclude an image by a directive to respect."""
        settings = self._settings
        directive = find_opt_out(robots, settings.robots_opt_outs, settings.user_agent)
        if directive is not None:
            raise StorageOptedOut(
                f"{shorten_url(url)}: its owner has opted out ({ROBOTS_HEADER}: {directive})"
            )


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
