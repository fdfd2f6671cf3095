"""An object store over real HTTP: moto's server, or the store that IMGCLS_TEST_S3_ENDPOINT names.

A real store also needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from imgcls.data import stores

BUCKET = "imgcls-tests"
REAL = os.environ.get("IMGCLS_TEST_S3_ENDPOINT")


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The endpoint. It answers one request at a time: moto's create-if-absent is open to races."""
    if REAL is not None:
        yield REAL
        return
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.contextmanager
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket, seen as another client sees it; the environment leads all others there."""
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"] if REAL else "key-of-moto",
        "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"] if REAL else "hush-of-moto",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for key in list(os.environ):
        if key.startswith("AWS_"):
            monkeypatch.delenv(key)
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    forget_connections()
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    forget_connections()
    for key in keys(client):
        client.delete_object(Bucket=BUCKET, Key=key)
    client.delete_bucket(Bucket=BUCKET)


def forget_connections() -> None:
    stores._file_system.cache_clear()
    stores._reader.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def url(key: str) -> str:
    return f"s3://{BUCKET}/{key}"


def keys(client: Any, prefix: str = "") -> list[str]:
    """All keys below a prefix."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]
