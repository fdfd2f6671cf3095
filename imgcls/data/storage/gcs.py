"""Google Cloud Storage through gcsfs: bounded, verified reads and paged listings.

gcsfs retries silently for a minute; its retries are turned off here, and `retries` decides as for
every other store.
"""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
from typing import Any

from imgcls.data.storage.error_details import get_http_status
from imgcls.data.storage.readahead import BodyBuffer, ReadAllowance
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.data.storage.store import (
    DELETE,
    GET,
    LIST,
    PUT,
    BucketStore,
    FileInfo,
    ListingPage,
    ListPage,
    ReadObject,
)
from imgcls.errors import StorageChanged, StorageUnavailable

_PAGE_SIZE = 1000
_PIECE_BYTES = 1 << 16


class GCSStore(BucketStore):
    """Google Cloud Storage."""

    protocols = ("gs", "gcs")
    title = "GCS"
    rejects_with_401 = True
    permission_names = {
        GET: "storage.objects.get",
        PUT: "storage.objects.create",
        LIST: "storage.objects.list",
        DELETE: "storage.objects.delete",
    }

    def build_file_system(self, protocol: str, settings: StorageConfig, account: str | None) -> Any:
        """gcsfs without its own retries, whose errors carry the headers of the response."""
        # not the class that fsspec uses for gs://, which queries another API for each bucket's type
        return _get_file_system_class()(
            use_listings_cache=False,
            skip_instance_cache=True,
            requester_pays=settings.requester_pays,
            **({"token": "anon"} if settings.anon else {}),
        )

    def start_read(self, url: str, allowance: ReadAllowance) -> ReadObject:
        return functools.partial(_read_object, self.file_system, allowance=allowance)

    async def read_range(self, path: str, start: int, end: int, version: str | None) -> bytes:
        fs = self.file_system
        more = {} if version is None else {"ifGenerationMatch": version}
        headers = {"Range": f"bytes={start}-{end - 1}"}
        try:
            answer, data = await fs._call("GET", fs.url(path), headers=headers, **more)
        except Exception as error:
            if get_http_status(error) == "412":
                raise StorageChanged(f"gs://{path}: was replaced") from error
            raise
        # some servers with the API of GCS ignore the condition
        if version is not None and answer.get("X-Goog-Generation", version) != version:
            raise StorageChanged(f"gs://{path}: was replaced")
        return bytes(data)

    def start_listing(self, url: str, path: str, *, deep: bool) -> ListPage:
        bucket, key, _ = self.file_system.split_path(path)

        async def list_page(token: str | None) -> tuple[ListingPage, str | None]:
            answer = await self.file_system._call_list_objects(
                bucket,
                prefix=f"{key.rstrip('/')}/" if key else None,
                delimiter=None if deep else "/",
                maxResults=_PAGE_SIZE,
                pageToken=token,
            )
            folders = [
                self.build_key_url(url, prefix.rstrip("/")) for prefix in answer.get("prefixes", [])
            ]
            files = [
                FileInfo(
                    self.build_key_url(url, each["name"]),
                    int(each["size"]),
                    datetime.datetime.fromisoformat(each["updated"]),
                    each["generation"],
                )
                for each in answer.get("items", [])
                if not each["name"].endswith("/")
            ]
            return ListingPage(folders, files), answer.get("nextPageToken")

        return list_page


@functools.cache
def _get_file_system_class() -> Any:
    from gcsfs.core import GCSFileSystem
    from gcsfs.retry import validate_response

    class _GCS(GCSFileSystem):  # type: ignore[misc]
        async def _request(
            self, method: str, path: str, *args: Any, headers: Any = None, json: Any = None,
            data: Any = None, cache_type: Any = None, cache_source: Any = None, **params: Any,
        ) -> tuple[int, Any, Any, bytes]:  # fmt: skip
            await self._set_session()
            async with self.session.request(
                method=method,
                url=self._format_path(path, args),
                params=self._get_params(params),
                json=json,
                headers=self._get_headers(headers),
                data=data,
            ) as answer:
                content = await answer.read()
                try:
                    validate_response(answer.status, content, path, args)
                except Exception as error:
                    if answer.status == 403:  # for which gcsfs has no class
                        error = PermissionError(*error.args)
                    error.headers = answer.headers  # type: ignore[attr-defined]
                    raise error
                return answer.status, answer.headers, answer.request_info, content

    return _GCS


async def _read_object(fs: Any, path: str, allowance: ReadAllowance) -> bytes:
    """Read an object, and verify its bytes by its MD5, which all but composed objects have.

    Raises StorageTooLarge and BudgetFull before more is read than is allowed, StorageUnavailable
    for damaged bytes, and aiohttp's ClientResponseError for any other response.
    """
    import yarl
    from aiohttp import ClientResponseError

    await fs._set_session()
    request = fs.session.get(
        yarl.URL(fs.url(path), encoded=True).update_query(fs._get_params({})),
        headers=fs._get_headers(
            {"Accept-Encoding": "gzip"}
        ),  # otherwise the store decompresses the object
    )
    async with request as answer:
        if answer.status != 200:
            raise ClientResponseError(
                answer.request_info, (), status=answer.status, message=answer.reason or "",
                headers=answer.headers,
            )  # fmt: skip
        with BodyBuffer(f"gs://{path}", allowance, answer.content_length) as body:
            async for part in answer.content.iter_chunked(_PIECE_BYTES):
                body.append(part)
            data = body.join()
        checksum = _get_md5(answer.headers)
        packed = "Content-Encoding" in answer.headers
        if checksum is not None and not packed and checksum != _compute_md5(data):
            raise StorageUnavailable(f"gs://{path}: arrived damaged (its checksum does not match)")
        return data


def _compute_md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _get_md5(headers: Any) -> str | None:
    """The MD5 in a response's checksums, in base64; composed objects have none."""
    for field in headers.getall("x-goog-hash", []):
        for each in field.split(","):
            name, _, value = each.strip().partition("=")
            if name == "md5":
                return str(value)
    return None
