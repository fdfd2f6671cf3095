"""Requests are retried until the deadline, and the error names what kept them from succeeding."""

from __future__ import annotations

import asyncio

import pytest

from imgcls.data.storage.retries import retry_async
from imgcls.data.storage.storage_settings import StorageConfig, use_settings
from imgcls.errors import StorageUnavailable


def test_an_attempt_that_the_deadline_ends_hides_no_earlier_error() -> None:
    attempts = 0

    async def request() -> bytes:
        nonlocal attempts
        attempts += 1
        if attempts > 1:
            await asyncio.sleep(60)
        raise StorageUnavailable("s3://b/a: the store asks for fewer requests")

    settings = StorageConfig(retry_timeout_s=0.4, attempt_timeout_s=30.0)
    with (
        use_settings(settings),
        pytest.raises(StorageUnavailable, match="fewer requests") as caught,
    ):
        asyncio.run(retry_async("s3://b/a", request, "read"))
    assert attempts == 2
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_a_request_that_never_answers_is_an_error_of_its_own() -> None:
    async def request() -> bytes:
        await asyncio.sleep(60)
        return b""

    with (
        use_settings(StorageConfig(retry_timeout_s=0.4, attempt_timeout_s=30.0)),
        pytest.raises(StorageUnavailable, match="did not answer"),
    ):
        asyncio.run(retry_async("s3://b/a", request, "read"))
