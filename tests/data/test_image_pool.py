"""Reads that are processed as they complete: every one once, within a budget of bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgcls.data import image_files, image_pool
from imgcls.data.image_pool import ImagePool
from imgcls.data.storage import storage_settings
from imgcls.data.storage.readahead import ByteBudget
from imgcls.data.storage.storage_settings import StorageConfig, use_settings
from imgcls.errors import StorageCredentials, StorageError, StorageMissing, StorageTooLarge
from tests.web_server import Reply, Server, serving

MB = 1_000_000


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running, use_settings(StorageConfig(retry_timeout_s=20)):
        yield running


def take_all(pool: ImagePool[int, object]) -> dict[int, object]:
    results: dict[int, object] = {}
    while pool.num_pending:
        taken = pool.take(0.2)
        if taken is not None:
            assert taken[0] not in results
            results[taken[0]] = taken[1]
    return results


def test_results_come_as_they_complete(server: Server) -> None:
    released = threading.Event()

    def wait() -> Iterator[bytes]:
        assert released.wait(60)
        yield b"slow"

    server.replies["/0"] = [Reply(body=wait)]
    with ImagePool(lambda key, data: data, 4, MB) as pool:
        for number in range(4):
            pool.submit(number, f"{server.url}/{number}")
        assert pool.is_full
        taken: dict[int, object] = {}
        while len(taken) < 3:
            result = pool.take(0.2)
            taken |= {} if result is None else dict([result])
        assert taken == {1: b"default", 2: b"default", 3: b"default"}
        released.set()
        assert take_all(pool) == {0: b"slow"}


def test_errors_of_a_file_are_results(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(11))
    urls = [None, str(tmp_path / "b"), str(tmp_path / "a"), f"{server.url}/x"]
    server.replies["/x"] = [Reply(404)]
    with ImagePool(lambda key, data: data, 4, 10) as pool:
        for number, url in enumerate(urls):
            pool.submit(number, url)
        results = take_all(pool)
    kinds = [StorageMissing, StorageMissing, StorageTooLarge, StorageMissing]
    assert [type(results[number]) for number in range(4)] == kinds


def test_an_error_that_concerns_all_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, allowance: object) -> None:
        raise StorageCredentials("expired")

    monkeypatch.setattr(image_files.filesystem, "start_read", refuse)
    with ImagePool(lambda key, data: data, 2, MB) as pool:
        pool.submit(0, "s3://bucket/a.jpg")
        with pytest.raises(StorageCredentials, match="expired"):
            take_all(pool)


def test_an_error_of_the_processing_is_raised(tmp_path: Path) -> None:
    def fail(key: int, data: bytes | StorageError) -> None:
        raise ZeroDivisionError

    pool = ImagePool(fail, 2, MB)
    with pool:
        pool.submit(0, str(tmp_path / "a"))
        with pytest.raises(ZeroDivisionError):
            take_all(pool)


@pytest.mark.parametrize("limit", [2 * MB, 5 * MB])
def test_many_large_files_hold_no_more_than_the_budget(
    server: Server, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(image_files, "READ_AHEAD_BYTES", 3 * MB)
    most = 0

    class Watched(ByteBudget):
        def _try_take(self, read: int, total: int) -> bool:
            nonlocal most
            taken = super()._try_take(read, total)
            most = max(most, sum(self._held.values()))
            return taken

    monkeypatch.setattr(image_pool, "ByteBudget", Watched)
    for number in range(12):
        body = bytes([number]) * (limit if number == 7 else MB)
        chunked = lambda body=body: iter([body])  # noqa: E731
        server.replies[f"/{number}"] = [Reply(body=body if number % 2 else chunked)]
    with ImagePool(lambda key, data: data, 8, limit) as pool:
        for number in range(12):
            pool.submit(number, f"{server.url}/{number}")
        results = take_all(pool)
    sizes = {number: limit if number == 7 else MB for number in range(12)}
    assert results == {number: bytes([number]) * size for number, size in sizes.items()}
    assert MB < most <= max(3 * MB, limit)


@pytest.mark.parametrize(("size", "reads"), [(10, 8), (MB, 3), (5 * MB, 1)])
def test_fewer_large_files_are_read_at_a_time_than_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, reads: int
) -> None:
    """Reads that wait for the budget make their requests twice."""
    monkeypatch.setattr(image_files, "READ_AHEAD_BYTES", 0)
    (tmp_path / "a").write_bytes(bytes(size))
    with ImagePool(lambda key, data: None, 8, 6 * MB) as pool:
        for number in range(80):
            pool.submit(number, str(tmp_path / "a"))
            take_all(pool)
        while not pool.is_full:
            pool.submit(pool.num_pending, str(tmp_path / "a"))
        assert pool.num_pending == reads
        take_all(pool)


def test_the_settings_of_the_job_apply_in_all_threads(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with (
        use_settings(StorageConfig(region="eu-north-1")),
        ImagePool(lambda key, data: storage_settings.current_settings().region, 2, MB) as pool,
    ):
        pool.submit(0, str(tmp_path / "a"))
        assert take_all(pool) == {0: "eu-north-1"}
