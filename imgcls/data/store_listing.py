"""Listings of a store's folders, a page at a time, with the size, time and version of each file."""

from __future__ import annotations

import asyncio
import datetime
import functools
from collections.abc import Callable, Iterator
from typing import Any

from imgcls.data import azure, gcs
from imgcls.data.object_store import (
    AZURE,
    GCS,
    S3,
    File,
    Page,
    ask,
    attempted,
    protocol_of,
    store,
    url_of,
)
from imgcls.data.storage_errors import LIST


def pages(url: str, *, deep: bool) -> Iterator[Page]:
    """What lies in a folder, a page at a time: files and folders, or, if `deep`, all files.

    Raises StorageMissing for a bucket that is not there.
    """
    protocol = protocol_of(url)
    if protocol in S3:
        return _pages_of_s3(url, deep)
    if protocol in GCS:
        return _pages_of_gcs(url, deep)
    if protocol in AZURE:
        return _pages_of_azure(url, deep)
    return _only_page(url, deep)


def _asked(url: str, call: Callable[[], Any]) -> Any:
    fs, _ = store(url)
    return asyncio.run_coroutine_threadsafe(attempted(url, call, LIST), fs.loop).result()


def _pages_of_s3(url: str, deep: bool) -> Iterator[Page]:
    fs, path = store(url)
    bucket, key, _ = fs.split_path(path)
    whole = functools.partial(_joined, url, bucket)
    request = {"Bucket": bucket, "Prefix": f"{key.rstrip('/')}/" if key else ""}
    if not deep:
        request["Delimiter"] = "/"
    while True:
        answer = _asked(url, functools.partial(fs._call_s3, "list_objects_v2", **request))
        yield Page(
            [whole(each["Prefix"]) for each in answer.get("CommonPrefixes", [])],
            [
                File(
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


def _pages_of_gcs(url: str, deep: bool) -> Iterator[Page]:
    fs, path = store(url)
    whole = functools.partial(_joined, url, path.partition("/")[0])
    token = None
    while True:
        answer = _asked(url, functools.partial(gcs.page, fs, path, deep=deep, token=token))
        yield Page(
            [whole(prefix) for prefix in answer.get("prefixes", [])],
            [
                File(
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


def _pages_of_azure(url: str, deep: bool) -> Iterator[Page]:
    fs, path = store(url)
    whole = functools.partial(_joined, url, path.partition("/")[0])
    token = None
    while True:
        call = functools.partial(azure.page, fs, path, deep=deep, token=token)
        items, token = _asked(url, call)
        yield Page(
            [whole(each["name"]) for each in items if each["name"].endswith("/")],
            [
                File(whole(each.name), each.size, each.last_modified, each.etag.strip('"'))
                for each in azure.files_of(items)
                if not each["name"].endswith("/")
            ],
        )
        if not token:
            return


def _only_page(url: str, deep: bool) -> Iterator[Page]:
    """By a driver that knows no more than fsspec asks of it."""
    found = ask(url, "find" if deep else "ls", needs=LIST, long=True, detail=True)
    infos = list(found.values()) if isinstance(found, dict) else found
    yield Page(
        [url_of(url, each["name"].rstrip("/")) for each in infos if each["type"] == "directory"],
        [
            File(url_of(url, each["name"]), each.get("size"), None, None)
            for each in infos
            if each["type"] == "file"
        ],
    )


def _joined(url: str, bucket: str, key: str) -> str:
    return url_of(url, f"{bucket}/{key.rstrip('/')}")
