"""The table of stores: which adapter serves a URL, and a new adapter takes a class and its line."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.memory import MemoryFileSystem

from imgcls.data import image_files
from imgcls.data.storage import filesystem, object_store, registry
from imgcls.data.storage.azure import AzureStore
from imgcls.data.storage.gcs import GCSStore
from imgcls.data.storage.http import HttpStore
from imgcls.data.storage.readahead import ReadAllowance
from imgcls.data.storage.s3 import S3Store
from imgcls.data.storage.storage_errors import translate_error
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
    Store,
)
from imgcls.errors import StorageCredentials, StorageForbidden, StorageMissing


@pytest.mark.parametrize(
    ("kind", "protocols"),
    [
        (S3Store, ("s3", "s3a")), (GCSStore, ("gs", "gcs")), (AzureStore, ("az", "abfs", "abfss")),
        (HttpStore, ("http", "https")), (Store, ("memory", "sftp", "file")),
    ],
)  # fmt: skip
def test_the_protocol_of_a_url_determines_its_store(
    kind: type[Store], protocols: tuple[str, ...]
) -> None:
    for protocol in protocols:
        assert registry.find_store(f"{protocol}://photos/a.jpg") is kind
    assert registry.find_store("/photos/a.jpg") is Store


@pytest.mark.parametrize(
    ("url", "needs", "remedy"),
    [
        ("s3a://b/x", GET, "; the request needs the permission s3:GetObject (or the file is "
         "missing, which a store reports only with s3:ListBucket)"),
        ("s3://b/x", PUT, "; the request needs the permission s3:PutObject"),
        ("gs://b/x", GET, "; the request needs the permission storage.objects.get"),
        ("gcs://b/x", DELETE, "; the request needs the permission storage.objects.delete"),
        ("abfss://c@a.dfs.core.windows.net/x", LIST,
         "; the request needs the role Storage Blob Data Reader"),
        ("az://c/x", PUT, "; the request needs the role Storage Blob Data Contributor"),
        ("https://host/x", GET, "; a signed URL may have expired"),
        ("memory://x", GET, ""), ("/disk/x", "", ""), ("s3://b/x", "", ""),
    ],
)  # fmt: skip
def test_a_refusal_names_what_the_request_needs_in_the_words_of_the_store(
    url: str, needs: str, remedy: str
) -> None:
    error = translate_error(url, PermissionError("no"), needs)
    assert type(error) is StorageForbidden
    assert str(error) == f"{url}: access is refused (no){remedy}"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("gs://b/x", StorageCredentials), ("abfs://b/x", StorageCredentials),
        ("s3://b/x", StorageForbidden), ("https://host/x", StorageForbidden),
    ],
)  # fmt: skip
def test_status_401_concerns_the_credentials_of_a_cloud_and_one_page_of_a_server(
    url: str, kind: type[Exception]
) -> None:
    class Answer(Exception):
        status = 401

    assert type(translate_error(url, Answer("no"))) is kind


class Drawers(BucketStore):
    """A store of a new kind, in memory, whose listings have pages of two."""

    protocols = ("drawer",)
    title = "Drawers"
    attempts = 0

    def build_file_system(self, protocol: str, settings: StorageConfig, account: str | None) -> Any:
        return AsyncFileSystemWrapper(MemoryFileSystem(), asynchronous=False)

    def get_path(self, url: str) -> str:
        return "/" + url.partition("://")[2]

    def start_read(self, url: str, allowance: ReadAllowance) -> ReadObject:
        async def read(path: str) -> bytes:
            await asyncio.sleep(0)
            Drawers.attempts += 1
            if Drawers.attempts == 1:
                raise ConnectionError("once")
            data: bytes = await self.file_system._cat_file(path)
            return data

        return read

    def start_listing(self, url: str, path: str, *, deep: bool) -> ListPage:
        async def list_page(token: int | None) -> tuple[ListingPage, int | None]:
            found = sorted(await self.file_system._find(path))
            start = token or 0
            files = [
                FileInfo(self.build_key_url(url, each.split("/", 2)[2]), None, None, None)
                for each in found[start : start + 2]
            ]
            return ListingPage([], files), start + 2 if start + 2 < len(found) else None

        return list_page


def test_a_new_store_is_a_class_and_a_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.find_store("drawer://top/a") is Store
    monkeypatch.setitem(registry.STORES, "drawer", Drawers)
    urls = [f"drawer://top/in/{name}" for name in "abcde"]
    for url in urls:
        filesystem.write(url, url.encode())
    assert filesystem.create(urls[0], b"other") is False
    assert list(image_files.read_ahead(urls)) == [url.encode() for url in urls]
    assert Drawers.attempts == len(urls) + 2  # a transient error, and the read by `create`
    assert filesystem.read("drawer://top/./in/./b") == urls[1].encode()
    with pytest.raises(StorageMissing):
        filesystem.read("drawer://top/in/f")
    pages = list(filesystem.iter_pages("drawer://top/in", deep=True))
    assert [[file.path for file in page.files] for page in pages] == [
        urls[:2],
        urls[2:4],
        urls[4:],
    ]
    store, _ = object_store.resolve_store(urls[0])
    assert store is object_store.resolve_store(urls[1])[0]
    filesystem.remove("drawer://top/in")
    assert not filesystem.exists(urls[0])
