"""Reads of an archive in a store: members next to each other share requests."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from imgcls.data.containers import archive_file
from imgcls.data.containers.archive_file import ArchiveFile
from imgcls.data.storage import object_store
from tests.s3 import BUCKET, url

BLOCK_BYTES = 100_000
SIZE = 5 * BLOCK_BYTES + 1000
MEMBER = 3000


@pytest.fixture
def content(s3: Any, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(archive_file, "BLOCK_BYTES", BLOCK_BYTES)
    data = random.Random(0).randbytes(SIZE)
    s3.put_object(Bucket=BUCKET, Key="file", Body=data)
    return data


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each request."""
    sent: list[int] = []
    get = object_store.get_range

    def count(url: str, start: int, end: int, version: str | None = None) -> bytes:
        sent.append(end - start)
        return get(url, start, end, version)

    monkeypatch.setattr(object_store, "get_range", count)
    return sent


def test_parts_in_order_share_few_requests(content: bytes, requests: list[int]) -> None:
    file = ArchiveFile(url("file"))
    starts = range(0, SIZE, MEMBER)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: file.read(at, min(SIZE, at + MEMBER)), starts))
    assert b"".join(found) == content
    assert len(requests) <= 6 + 1
    assert sum(requests) <= SIZE + MEMBER


def test_parts_in_random_order_are_read_alone(content: bytes, requests: list[int]) -> None:
    file = ArchiveFile(url("file"))
    for start in (4 * BLOCK_BYTES, 10, 2 * BLOCK_BYTES):
        assert file.read(start, start + 5) == content[start : start + 5]
    assert requests == [5, 5, 5]


def test_a_large_part_is_one_request(content: bytes, requests: list[int]) -> None:
    file = ArchiveFile(url("file"))
    assert file.read(0, 1) == content[:1]
    assert file.read(10, 3 * BLOCK_BYTES) == content[10 : 3 * BLOCK_BYTES]
    assert requests == [1, 3 * BLOCK_BYTES - 10]
