"""Azure Blob Storage through adlfs: bounded reads, paged listings, names without escapes.

Azure's client retries silently for minutes; its retries are turned off here, and `retries` decides
as for every other store.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from imgcls.data.storage.readahead import ReadAllowance, too_large_error
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
from imgcls.errors import StorageChanged, StorageError

_PAGE_SIZE = 1000
FIRST_REQUEST_BYTES = 4 << 20
"""Bytes that the first request reads, which also returns the blob's size; most photographs fit."""
_PART_BYTES = 32 << 20
_HOSTS = (".dfs.core.windows.net", ".blob.core.windows.net")


class AzureStore(BucketStore):
    """Azure Blob Storage; its permissions are roles."""

    protocols = ("az", "abfs", "abfss")
    title = "Azure"
    rejects_with_401 = True
    permission_kind = "role"
    permission_names = {
        GET: "Storage Blob Data Reader",
        LIST: "Storage Blob Data Reader",
        PUT: "Storage Blob Data Contributor",
        DELETE: "Storage Blob Data Contributor",
    }

    def build_file_system(self, protocol: str, settings: StorageConfig, account: str | None) -> Any:
        """adlfs without its own retries.

        account: None for the environment's (AZURE_STORAGE_ACCOUNT_NAME,
            AZURE_STORAGE_CONNECTION_STRING)
        """
        from azure.storage.blob.aio import BlobServiceClient

        named = {"account_name": account} if account else {}
        fs = _get_file_system_class()(
            use_listings_cache=False, skip_instance_cache=True, anon=settings.anon or None, **named
        )
        usual = fs.service_client
        fs.service_client = BlobServiceClient(
            usual.url,
            credential=usual.credential,
            retry_total=0,
            connection_timeout=settings.attempt_timeout_s,
            read_timeout=settings.attempt_timeout_s,
            max_single_get_size=FIRST_REQUEST_BYTES,
            max_chunk_get_size=_PART_BYTES,
        )
        return fs

    def start_read(self, url: str, allowance: ReadAllowance) -> ReadObject:
        return functools.partial(_read_blob, self.file_system, allowance=allowance)

    async def read_range(self, path: str, start: int, end: int, version: str | None) -> bytes:
        from azure.core import MatchConditions
        from azure.core.exceptions import ResourceModifiedError

        more: dict[str, Any] = {}
        if version is not None:
            more = {"etag": f'"{version}"', "match_condition": MatchConditions.IfNotModified}
        container, name, _ = self.file_system.split_path(path)
        async with self.file_system.service_client.get_blob_client(container, name) as blob:
            try:
                stream = await blob.download_blob(start, end - start, max_concurrency=1, **more)
                data: bytes = await stream.readall()
            except ResourceModifiedError as error:
                raise StorageChanged(f"az://{path}: was replaced") from error
            return data

    def start_listing(self, url: str, path: str, *, deep: bool) -> ListPage:
        container, name, _ = self.file_system.split_path(path)
        prefix = f"{name.rstrip('/')}/" if name else None

        async def list_page(token: Any) -> tuple[ListingPage, Any]:
            service = self.file_system.service_client
            async with service.get_container_client(container) as client:
                items, following = await _list_items(client, prefix, deep=deep, token=token)
            folders = [
                self.build_key_url(url, each["name"].rstrip("/"))
                for each in items
                if each["name"].endswith("/")
            ]
            files = [
                FileInfo(
                    self.build_key_url(url, each.name),
                    each.size,
                    each.last_modified,
                    each.etag.strip('"'),
                )
                for each in _iter_file_items(items)
            ]
            return ListingPage(folders, files), following

        return list_page

    @classmethod
    def get_account(cls, url: str) -> str | None:
        """The account in abfs://container@account.dfs.core.windows.net/name; None without one."""
        host = url.partition("://")[2].partition("/")[0].partition("@")[2]
        suffix = next((each for each in _HOSTS if host.endswith(each)), None)
        if host and suffix is None:
            raise StorageError(f"{url}: the host {host} is not an Azure storage account")
        return host.removesuffix(suffix) if suffix else None


@functools.cache
def _get_file_system_class() -> Any:
    from adlfs import AzureBlobFileSystem

    class _Azure(AzureBlobFileSystem):  # type: ignore[misc]
        @classmethod
        def _strip_protocol(cls, path: Any) -> Any:
            """container/name; adlfs itself parses # and ? in a name as parts of a URL."""
            if isinstance(path, list):
                return [cls._strip_protocol(each) for each in path]
            container, separator, name = path.rpartition("://")[2].partition("/")
            return container.partition("@")[0] + separator + name.rstrip("/")

        def split_path(self, path: str, *_: Any, **__: Any) -> tuple[str, str, None]:
            container, _, name = self._strip_protocol(path).lstrip("/").partition("/")
            return container, name, None

    return _Azure


async def _read_blob(fs: Any, path: str, allowance: ReadAllowance) -> bytes:
    """Read a blob; a large one by several requests, all for the same version of it.

    Raises StorageTooLarge and BudgetFull before more is read than is allowed.
    """
    container, name, _ = fs.split_path(path)
    allowance.reserve(FIRST_REQUEST_BYTES)
    async with fs.service_client.get_blob_client(container, name) as blob:
        stream = await blob.download_blob(max_concurrency=1)
        if allowance.is_exceeded_by(stream.size):
            raise too_large_error(f"az://{path}", allowance.max_bytes, stream.size)
        allowance.reserve(stream.size)
        data: bytes = await stream.readall()
        return data


async def _list_items(
    client: Any, prefix: str | None, *, deep: bool, token: Any
) -> tuple[list[Any], Any]:
    """A page of a container's listing, and the token of the next page; None after the last one."""
    options = {"include": ["metadata"], "results_per_page": _PAGE_SIZE}
    found = (
        client.list_blobs(prefix, **options)
        if deep
        else client.walk_blobs(prefix, delimiter="/", **options)
    )
    pages = found.by_page(continuation_token=token)
    with contextlib.suppress(StopAsyncIteration):
        items = [each async for each in await anext(pages)]
        return items, pages.continuation_token or None
    return [], None


def _iter_file_items(items: list[Any]) -> Iterator[Any]:
    """The files among a page's items: those with a size, except blobs that mark folders."""
    for item in items:
        marks = item.get("metadata") or {}
        folder = any(marks.get(mark) == "true" for mark in ("is_directory", "hdi_isfolder"))
        if item.get("size") is not None and not folder and not item["name"].endswith("/"):
            yield item
