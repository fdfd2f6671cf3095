"""List folders of object stores, page by page, with the size, time and version of each file."""

from __future__ import annotations

import asyncio
import datetime
import functools
from collections.abc import Callable, Iterator
from typing import Any

from imgcls.data import azure, gcs
from imgcls.data.object_store import (
    AZURE_PROTOCOLS,
    GCS_PROTOCOLS,
    S3_PROTOCOLS,
    FileInfo,
    ListingPage,
    build_url,
    call_store,
    get_protocol,
    resolve_store,
)
from imgcls.data.retries import retry_async
from imgcls.data.storage_errors import LIST


def iter_store_pages(url: str, *, deep: bool) -> Iterator[ListingPage]:
    """List a folder page by page: its files and folders, or with `deep` all files below it.

    Raises StorageBucketMissing when there is no such bucket.
    """
    protocol = get_protocol(url)
    if protocol in S3_PROTOCOLS:
        return _iter_s3_pages(url, deep)
    if protocol in GCS_PROTOCOLS:
        return _iter_gcs_pages(url, deep)
    if protocol in AZURE_PROTOCOLS:
        return _iter_azure_pages(url, deep)
    return _iter_generic_pages(url, deep)


def _call(url: str, call: Callable[[], Any]) -> Any:
    fs, _ = resolve_store(url)
    return asyncio.run_coroutine_threadsafe(retry_async(url, call, LIST), fs.loop).result()


def _iter_s3_pages(url: str, deep: bool) -> Iterator[ListingPage]:
    fs, path = resolve_store(url)
    bucket, key, _ = fs.split_path(path)
    whole = functools.partial(_build_item_url, url, bucket)
    request = {"Bucket": bucket, "Prefix": f"{key.rstrip('/')}/" if key else ""}
    if not deep:
        request["Delimiter"] = "/"
    while True:
        answer = _call(url, functools.partial(fs._call_s3, "list_objects_v2", **request))
        yield ListingPage(
            [whole(each["Prefix"]) for each in answer.get("CommonPrefixes", [])],
            [
                FileInfo(
                    whole(each["Key"]),
                    each["Size"],
                    each["LastModified"],
                    each["ETag"].strip('"'),
                )
                for each in answer.get("Contents", [])
                if not each["Key"].endswith("/")
            ],
        )
        if not answer.get("IsTruncated"):
            return
        request["ContinuationToken"] = answer["NextContinuationToken"]


def _iter_gcs_pages(url: str, deep: bool) -> Iterator[ListingPage]:
    fs, path = resolve_store(url)
    whole = functools.partial(_build_item_url, url, path.partition("/")[0])
    token = None
    while True:
        answer = _call(url, functools.partial(gcs.list_gcs_page, fs, path, deep=deep, token=token))
        yield ListingPage(
            [whole(prefix) for prefix in answer.get("prefixes", [])],
            [
                FileInfo(
                    whole(each["name"]),
                    int(each["size"]),
                    datetime.datetime.fromisoformat(each["updated"]),
                    each["generation"],
                )
                for each in answer.get("items", [])
                if not each["name"].endswith("/")
            ],
        )
        token = answer.get("nextPageToken")
        if token is None:
            return


def _iter_azure_pages(url: str, deep: bool) -> Iterator[ListingPage]:
    fs, path = resolve_store(url)
    whole = functools.partial(_build_item_url, url, path.partition("/")[0])
    token = None
    while True:
        call = functools.partial(azure.list_azure_page, fs, path, deep=deep, token=token)
        items, token = _call(url, call)
        yield ListingPage(
            [whole(each["name"]) for each in items if each["name"].endswith("/")],
            [
                FileInfo(whole(each.name), each.size, each.last_modified, each.etag.strip('"'))
                for each in azure.iter_file_items(items)
                if not each["name"].endswith("/")
            ],
        )
        if not token:
            return


def _iter_generic_pages(url: str, deep: bool) -> Iterator[ListingPage]:
    """List through the generic fsspec interface, in one page."""
    found = call_store(url, "find" if deep else "ls", needs=LIST, long=True, detail=True)
    infos = list(found.values()) if isinstance(found, dict) else found
    yield ListingPage(
        [build_url(url, each["name"].rstrip("/")) for each in infos if each["type"] == "directory"],
        [
            FileInfo(build_url(url, each["name"]), each.get("size"), None, None)
            for each in infos
            if each["type"] == "file"
        ],
    )


def _build_item_url(url: str, bucket: str, key: str) -> str:
    return build_url(url, f"{bucket}/{key.rstrip('/')}")
