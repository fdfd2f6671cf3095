"""Azure Blob Storage through adlfs: bounded reads, paged listings, names without escapes.

Azure's client retries silently for minutes; its retries are turned off here, and `retries` decides
as for every other store.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from imgcls.data.readahead import ReadAllowance
from imgcls.data.storage_errors import too_large_error
from imgcls.errors import StorageError

_PAGE_SIZE = 1000
FIRST_REQUEST_BYTES = 4 << 20
"""Bytes that the first request reads, which also returns the blob's size; most photographs fit."""
_PART_BYTES = 32 << 20
_HOSTS = (".dfs.core.windows.net", ".blob.core.windows.net")


def build_azure_file_system(account: str | None, *, anon: bool, seconds: float) -> Any:
    """adlfs without its own retries.

    account: of the URL; None for the environment's (AZURE_STORAGE_ACCOUNT_NAME,
        AZURE_STORAGE_CONNECTION_STRING)
    seconds: timeout of connecting and of reading
    """
    from azure.storage.blob.aio import BlobServiceClient

    named = {"account_name": account} if account else {}
    fs = _get_file_system_class()(
        use_listings_cache=False, skip_instance_cache=True, anon=anon or None, **named
    )
    usual = fs.service_client
    fs.service_client = BlobServiceClient(
        usual.url,
        credential=usual.credential,
        retry_total=0,
        connection_timeout=seconds,
        read_timeout=seconds,
        max_single_get_size=FIRST_REQUEST_BYTES,
        max_chunk_get_size=_PART_BYTES,
    )
    return fs


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


def get_account(url: str) -> str | None:
    """The account in abfs://container@account.dfs.core.windows.net/name; None without one."""
    host = url.partition("://")[2].partition("/")[0].partition("@")[2]
    suffix = next((each for each in _HOSTS if host.endswith(each)), None)
    if host and suffix is None:
        raise StorageError(f"{url}: the host {host} is not an Azure storage account")
    return host.removesuffix(suffix) if suffix else None


async def read_azure_blob(fs: Any, path: str, allowance: ReadAllowance) -> bytes:
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


async def list_azure_page(
    fs: Any, path: str, *, deep: bool, token: str | None
) -> tuple[list[Any], Any]:
    """A page of a listing, and the token of the next page; items without a size are folders.

    path: container/prefix, of a folder
    """
    container, name, _ = fs.split_path(path)
    prefix = f"{name.rstrip('/')}/" if name else None
    async with fs.service_client.get_container_client(container) as client:
        if deep:
            found = client.list_blobs(prefix, include=["metadata"], results_per_page=_PAGE_SIZE)
        else:
            found = client.walk_blobs(
                prefix, include=["metadata"], delimiter="/", results_per_page=_PAGE_SIZE
            )
        pages = found.by_page(continuation_token=token)
        with contextlib.suppress(StopAsyncIteration):
            items = [each async for each in await anext(pages)]
            return items, pages.continuation_token
        return [], None


def iter_file_items(items: list[Any]) -> Iterator[Any]:
    """The files among a page's items, without the empty blobs that mark folders."""
    for item in items:
        marks = item.get("metadata") or {}
        folder = any(marks.get(mark) == "true" for mark in ("is_directory", "hdi_isfolder"))
        if item.get("size") is not None and not folder:
            yield item
