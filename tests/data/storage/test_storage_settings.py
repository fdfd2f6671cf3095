"""Storage settings apply to one job: its thread and everything that it starts, nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data import image_files
from imgcls.data.storage import filesystem, object_store, storage_settings
from imgcls.data.storage.storage_settings import StorageConfig, use_settings
from imgcls.errors import ConfigError
from imgcls.models.bundle import load_bundle_weights
from imgcls.models.classifier import Classifier
from imgcls.runs.lease import Lease
from tests.s3 import BUCKET, REAL, boto3, forget_connections, serving, url

ROUNDS = 5


@pytest.fixture
def stores(s3: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Two stores, by endpoint, each with its client; the environment leads to neither."""
    if REAL is not None:
        pytest.skip("takes a second store")
    with serving() as other:
        client = boto3.client("s3", endpoint_url=other)
        client.create_bucket(Bucket=BUCKET)
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        forget_connections()
        yield {endpoint: s3, other: client}
        forget_connections()


def test_two_jobs_in_two_threads_use_two_stores(stores: dict[str, Any]) -> None:
    together = threading.Barrier(2)

    def job(endpoint: str) -> list[bytes]:
        with use_settings(StorageConfig(endpoint_url=endpoint)):
            for number in range(ROUNDS):
                together.wait()
                filesystem.write(url(f"{number}"), endpoint.encode())
            lease = Lease.acquire(url("out"), term=0.5)  # renewed by a thread of its own
            together.wait()
            found = [filesystem.read(url(f"{number}")) for number in range(ROUNDS)]
            ahead = image_files.read_ahead([url(f"{number}") for number in range(ROUNDS)])
            found += [each for each in ahead if isinstance(each, bytes)]
            with storage_settings.create_thread_pool(2, "read") as pool:
                found += pool.map(filesystem.read, [url("0"), url("1")])
            lease.check()
            lease.release()
            return found

    with ThreadPoolExecutor(2) as pool:
        results = pool.map(job, stores)
    for endpoint, found in zip(stores, results, strict=True):
        assert found == [endpoint.encode()] * (2 * ROUNDS + 2)
    for endpoint, client in stores.items():
        body = client.get_object(Bucket=BUCKET, Key="0")["Body"].read()
        assert body == endpoint.encode()


def test_threads_of_arrow_read_with_the_settings_of_the_stream(stores: dict[str, Any]) -> None:
    table = pa.table({name: list(range(2000)) for name in "abcd"})
    with use_settings(StorageConfig(endpoint_url=next(iter(stores)))):
        with filesystem.open_write(url("table.parquet")) as stream:
            pq.write_table(table, stream, row_group_size=100)
        stream = filesystem.open_read(url("table.parquet"))
    with stream:
        assert pq.ParquetFile(stream, pre_buffer=True).read(use_threads=True).equals(table)


def test_settings_end_with_their_block_and_travel_with_a_bound_function(
    stores: dict[str, Any],
) -> None:
    endpoint = next(iter(stores))
    before = storage_settings.current_settings()
    settings = StorageConfig(endpoint_url=endpoint, region="eu-north-1", requester_pays=True)
    with use_settings(settings):
        fs = object_store.resolve_store(url("x"))[0].file_system
        filesystem.write(url("x"), b"1")
        assert (fs.s3.meta.region_name, fs.req_kw) == ("eu-north-1", {"RequestPayer": "requester"})
        read = storage_settings.bind_settings(lambda at: (filesystem.read(at), region()))
    assert storage_settings.current_settings() == before
    assert read(url("x")) == (b"1", "eu-north-1")
    with ThreadPoolExecutor(1) as pool:  # as in a process that was started later
        assert pool.submit(read, url("x")).result() == (b"1", "eu-north-1")
    assert storage_settings.current_settings() == before


def test_settings_apply_to_an_iterator_that_another_thread_reads() -> None:
    with use_settings(StorageConfig(region="eu-north-1")):
        items = storage_settings.bind_iterator(region() for _ in range(3))
        assert next(items) == "eu-north-1"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(list, items).result() == ["eu-north-1"] * 2
    assert region() is None


def region() -> str | None:
    return storage_settings.current_settings().region


def test_processes_share_the_limit_of_requests_per_host() -> None:
    with use_settings(StorageConfig(max_requests_per_host=64)):
        call = storage_settings.bind_settings_split(4, storage_settings.current_settings)
    assert call().max_requests_per_host == 16


def test_a_classifier_is_loaded_from_the_store_that_its_settings_name(
    stores: dict[str, Any], color_bundle: Path
) -> None:
    endpoint = list(stores)[1]
    for file in color_bundle.iterdir():
        stores[endpoint].upload_file(str(file), BUCKET, f"bundle/{file.name}")
    classifier = Classifier.load(url("bundle"), storage={"endpoint_url": endpoint})
    assert load_bundle_weights(classifier.bundle)  # also later, without the settings
    with pytest.raises(ConfigError, match="did you mean endpoint_url"):
        Classifier.load(url("bundle"), storage={"endpoint": endpoint})
