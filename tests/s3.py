"""An object store over real HTTP: moto's server, or the store that IMGCLS_TEST_S3_ENDPOINT names.

A real store also needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import moto.backends
import pytest
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from imgcls.data.storage import object_store

REPOSITORY = Path(__file__).parent.parent
BUCKET = "-".join(["imgcls-tests", *filter(None, [os.environ.get("PYTEST_XDIST_WORKER")])])
"""Of its own for every test process: a real store is the same one to all."""
REAL = os.environ.get("IMGCLS_TEST_S3_ENDPOINT")


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The endpoint; moto has a process of its own."""
    if REAL is not None:
        yield REAL
        return
    command = [sys.executable, "-m", "tests.s3"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def serve() -> None:
    """Answers one request at a time: moto's create-if-absent is open to races."""
    modules = list(moto.backends.list_of_moto_modules())
    # moto lists its folder in every request: a quarter of its time
    moto.backends.list_of_moto_modules = lambda: modules
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=False)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def environment(endpoint: str) -> dict[str, str]:
    """What leads every client to the store, and to no other."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"] if REAL else "key-of-moto",
        "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"] if REAL else "hush-of-moto",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextlib.contextmanager
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket, seen as another client sees it; the environment leads all others there."""
    settings = environment(endpoint)
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
    left = [{"Key": key} for key in keys(client)]
    for start in range(0, len(left), 1000):  # at most as many in a request
        client.delete_objects(Bucket=BUCKET, Delete={"Objects": left[start : start + 1000]})
    client.delete_bucket(Bucket=BUCKET)


@contextlib.contextmanager
def checking_permissions(endpoint: str) -> Iterator[None]:
    """Within it, moto checks credentials and permissions, as a real store does."""

    def check_after(requests: str) -> None:
        if REAL is None:
            request = urllib.request.Request(
                f"{endpoint}/moto-api/reset-auth",
                data=requests.encode(),
                headers={"Content-Type": "text/plain"},
            )
            urllib.request.urlopen(request).close()

    check_after("0")
    try:
        yield
    finally:
        check_after("inf")


@contextlib.contextmanager
def user(endpoint: str, allowed: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, the environment's credentials are of a user with these permissions only."""
    iam = boto3.client("iam", endpoint_url=endpoint)
    iam.create_user(UserName="a-user")
    statement = {"Effect": "Allow", "Action": list(allowed), "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_user_policy(UserName="a-user", PolicyName="only", PolicyDocument=policy)
    key = iam.create_access_key(UserName="a-user")["AccessKey"]
    with monkeypatch.context() as changed:
        changed.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        changed.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        forget_connections()
        yield
    forget_connections()
    iam.delete_access_key(UserName="a-user", AccessKeyId=key["AccessKeyId"])
    iam.delete_user_policy(UserName="a-user", PolicyName="only")
    iam.delete_user(UserName="a-user")


def forget_connections() -> None:
    object_store.build_store.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def url(key: str) -> str:
    return f"s3://{BUCKET}/{key}"


def keys(client: Any, prefix: str = "") -> list[str]:
    """All keys below a prefix."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


if __name__ == "__main__":
    serve()
