"""What reaches us through a network that fails: every object whole and right, or a typed error."""

from __future__ import annotations

import email.utils
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import boto3  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.config import Config

from imgcls.data import image_files
from imgcls.data.storage import filesystem, object_store, storage_settings
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import (
    OutputError,
    StorageBucketMissing,
    StorageClockSkew,
    StorageCredentials,
    StorageError,
    StorageForbidden,
    StorageMissing,
    StorageThrottled,
    StorageTooLarge,
    StorageUnavailable,
)
from imgcls.runs.lease import Lease
from imgcls.serving.labeling.store import DecisionStore
from tests.faults import KINDS, Proxy, refusal
from tests.s3 import BUCKET, REAL, forget_connections, keys, url

MIX = dict.fromkeys(KINDS, 0.03) | {"slow_down": 0.05}
QUICK = {"attempt_timeout_s": 1.0, "retry_timeout_s": 40.0}
# a busy machine may take more than a second to answer: no request is made a second time
PATIENT = {"attempt_timeout_s": 60.0, "retry_timeout_s": 60.0}


@pytest.fixture
def network(
    s3: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Proxy]]:
    """Puts a failing network between us and the store."""
    before = storage_settings.current_settings()
    with ExitStack() as stack:

        def put(share: dict[str, float], seed: int = 0, **settings: Any) -> Proxy:
            proxy = stack.enter_context(Proxy(endpoint, share, seed=seed).running())
            given = QUICK | settings
            storage_settings.set_process_settings(StorageConfig(endpoint_url=proxy.url, **given))
            return proxy

        yield put
        storage_settings.set_process_settings(before)
        forget_connections()


def objects(s3: Any, count: int) -> dict[str, bytes]:
    """`count` objects, put there by another client over a sound network."""
    rng = np.random.default_rng(0)
    made = {url(f"in/{i:03d}.jpg"): rng.bytes(int(rng.integers(20, 3000))) for i in range(count)}
    for place, data in made.items():
        s3.put_object(Bucket=BUCKET, Key=place.split("/", 3)[3], Body=data)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_object_arrives_as_it_was_stored(
    s3: Any, network: Callable[..., Proxy], kind: str
) -> None:
    made = objects(s3, 30)
    proxy = network({kind: 0.3})
    assert list(image_files.read_ahead(made)) == list(made.values())
    assert proxy.met[kind] > 3


def test_reading_ahead_asks_once_for_each_object_and_for_nothing_else(
    s3: Any, network: Callable[..., Proxy]
) -> None:
    made = objects(s3, 25)
    proxy = network({}, **PATIENT)
    assert list(image_files.read_ahead(made)) == list(made.values())
    assert proxy.requests == {"GET": 25}
    filesystem.write(url("out/one"), b"x" * (8 << 20))
    with filesystem.open_write(url("out/two")) as stream:
        stream.write(b"y" * (8 << 20))
    assert proxy.requests == {"GET": 25, "PUT": 2}


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 25_300])
def test_the_blocks_of_an_object_are_read_once_each_and_arrive_in_order(
    s3: Any, network: Callable[..., Proxy], size: int
) -> None:
    data = np.random.default_rng(size).bytes(size)
    s3.put_object(Bucket=BUCKET, Key="in/blocks", Body=data)
    proxy = network({}, **PATIENT)
    blocks = list(filesystem.iter_blocks(url("in/blocks"), 1000))
    assert b"".join(blocks) == data
    assert [len(block) for block in blocks[:-1]] == [1000] * (len(blocks) - 1)
    wanted = {"HEAD": 1} | ({"GET": len(blocks)} if size else {})
    assert proxy.requests == wanted


def test_blocks_that_a_network_damages_or_that_are_missing_raise_or_are_read_again(
    s3: Any, network: Callable[..., Proxy]
) -> None:
    data = np.random.default_rng(1).bytes(60_000)
    s3.put_object(Bucket=BUCKET, Key="in/blocks", Body=data)
    proxy = network(MIX)
    assert b"".join(filesystem.iter_blocks(url("in/blocks"), 1000)) == data
    assert proxy.met.total() > 3
    with pytest.raises(StorageMissing, match="in/none"):
        list(filesystem.iter_blocks(url("in/none")))


def test_what_botocore_asked_first_is_asked_without_it_from_then_on(
    s3: Any, network: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = objects(s3, 25)
    seen: list[str] = []
    proxy = network({}, requester_pays=True)
    proxy.respond = lambda head: seen.append(head.lower())  # type: ignore[func-returns-value]
    assert list(image_files.read_ahead(made)) == list(made.values())
    fs = object_store.resolve_store(url(""))[0].file_system
    long_way: list[str] = []
    call = fs._call_s3

    async def spy(method: str, **arguments: Any) -> Any:
        long_way.append(method)
        return await call(method, **arguments)

    monkeypatch.setattr(fs, "_call_s3", spy)
    assert list(image_files.read_ahead(made)) == list(made.values())
    assert long_way == []
    lines = [{line.partition(":")[0] for line in head.split("\r\n")[1:] if line} for head in seen]
    assert all("x-amz-request-payer" in names and "authorization" in names for names in lines)
    # the same headers, but for what makes a call of botocore's known to itself
    own = {"amz-sdk-invocation-id", "amz-sdk-request"}
    assert {frozenset(names - own) for names in lines} == {frozenset(lines[0] - own)}


def test_a_version_of_an_object_can_be_named(s3: Any, network: Callable[..., Proxy]) -> None:
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    versions = [
        s3.put_object(Bucket=BUCKET, Key="in/x.jpg", Body=body)["VersionId"]
        for body in (b"old", b"new")
    ]
    network({})
    try:
        for _ in range(2):
            found = [filesystem.read(url(f"in/x.jpg?versionId={each}")) for each in versions]
            assert found == [b"old", b"new"]
            assert filesystem.read(url("in/x.jpg")) == b"new"
    finally:
        for each in versions:
            s3.delete_object(Bucket=BUCKET, Key="in/x.jpg", VersionId=each)


def test_a_public_bucket_is_read_without_credentials(
    s3: Any, network: Callable[..., Proxy]
) -> None:
    made = objects(s3, 20)
    for place in made:
        s3.put_object_acl(Bucket=BUCKET, Key=place.split("/", 3)[3], ACL="public-read")
    proxy = network({}, anon=True)
    seen: list[str] = []
    proxy.respond = lambda head: seen.append(head.lower())  # type: ignore[func-returns-value]
    for _ in range(2):
        assert list(image_files.read_ahead(made)) == list(made.values())
    assert not [head for head in seen if "authorization:" in head]


def test_a_bucket_in_another_region_is_found_there(s3: Any, network: Callable[..., Proxy]) -> None:
    made = objects(s3, 20)

    def elsewhere(head: str) -> bytes | None:
        """The answer of S3 to a request that was signed for another region than the bucket's."""
        if "/eu-north-1/s3/aws4_request" in head:
            return None
        return refusal(
            *(301, "PermanentRedirect", "The bucket must be addressed elsewhere."),
            head="x-amz-bucket-region: eu-north-1\r\n",
        )

    proxy = network({})
    proxy.respond = elsewhere
    for _ in range(2):
        assert list(image_files.read_ahead(made)) == list(made.values())
    filesystem.write(url("out/x"), b"x")
    assert filesystem.read(url("out/x")) == b"x"


@pytest.mark.parametrize(
    ("code", "status", "kind", "words"),
    [
        ("AccessDenied", 403, StorageForbidden, "the request needs the permission s3:GetObject"),
        ("NoSuchKey", 404, StorageMissing, "no such file"),
        ("NoSuchBucket", 404, StorageBucketMissing, "no such bucket"),
        ("ExpiredToken", 400, StorageCredentials, "check the credentials"),
        ("InvalidAccessKeyId", 403, StorageCredentials, "check the credentials"),
        ("SlowDown", 503, StorageThrottled, "fewer requests"),
        ("InternalError", 500, StorageUnavailable, "did not answer"),
        ("InvalidObjectState", 403, StorageError, "is archived; restore it in the store"),
        ("RequestTimeTooSkewed", 403, StorageClockSkew, "synchronize the clock (NTP)"),
        ("SomethingNew", 403, StorageForbidden, "the request needs the permission s3:GetObject"),
        ("SomethingNew", 503, StorageThrottled, "fewer requests"),
    ],
)
def test_a_refusal_of_a_store_is_the_same_first_and_later(
    s3: Any, network: Callable[..., Proxy], code: str, status: int, kind: type[StorageError],
    words: str,
) -> None:  # fmt: skip
    made = list(objects(s3, 2))
    # what may pass is tried until the deadline; all else must not depend on it
    deadline = 3 if issubclass(kind, StorageUnavailable) else 60
    proxy = network({}, retry_timeout_s=deadline, attempt_timeout_s=10)
    answer = refusal(status, code, "An answer of the store.")
    for before in (False, True):
        if before:
            proxy.respond = None
            assert filesystem.read(made[0])
        proxy.respond = lambda head: answer
        with pytest.raises(StorageError) as caught:
            filesystem.read(made[1])
        assert type(caught.value) is kind
        assert words in str(caught.value)


def test_a_wrong_clock_is_reported_with_the_difference_and_ends_the_read(
    s3: Any, network: Callable[..., Proxy]
) -> None:
    made = list(objects(s3, 2))
    proxy = network({}, retry_timeout_s=5)
    behind = email.utils.formatdate(time.time() + 3600, usegmt=True)
    answer = refusal(403, "RequestTimeTooSkewed", "The difference is too large.",
                     head=f"Date: {behind}\r\n")  # fmt: skip
    proxy.respond = lambda head: answer
    with pytest.raises(StorageClockSkew, match=r"clock is (1:00:00|0:59:5\d) behind the store's"):
        list(image_files.read_ahead(made))
    assert proxy.requests.total() <= 2  # a wrong clock does not pass


def test_more_bytes_than_allowed_are_not_read(s3: Any, network: Callable[..., Proxy]) -> None:
    s3.put_object(Bucket=BUCKET, Key="in/large.jpg", Body=bytes(2_000_000))
    place = url("in/large.jpg")
    network({})
    for _ in range(2):  # by botocore, and without it
        with pytest.raises(StorageTooLarge, match=r"has 2,000,000 bytes, more than the limit of 1"):
            image_files.read_image(place, 1_999_999)
        assert len(image_files.read_image(place, 2_000_000)) == 2_000_000


def test_an_endless_answer_is_cut_off_at_the_limit(s3: Any, network: Callable[..., Proxy]) -> None:
    made = list(objects(s3, 2))
    proxy = network({}, attempt_timeout_s=20)
    body = b"".join(b"10000\r\n" + bytes(1 << 16) + b"\r\n" for _ in range(200))
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body  # without its end
    for first in (False, True):
        if first:
            proxy.respond = None
            assert filesystem.read(made[0])
        proxy.respond = lambda head: answer
        with pytest.raises(StorageTooLarge, match="has more bytes than the limit of 100,000"):
            image_files.read_image(made[1], 100_000)


def test_a_path_may_have_a_dot_as_on_a_disk(s3: Any, network: Callable[..., Proxy]) -> None:
    s3.put_object(Bucket=BUCKET, Key="in/a.jpg", Body=b"a")
    s3.put_object(Bucket=BUCKET, Key="in/./own.jpg", Body=b"the one with a dot")
    s3.put_object(Bucket=BUCKET, Key="in/own.jpg", Body=b"the one without")
    network({})
    for _ in range(2):
        assert image_files.read_image(url("in/./a.jpg")) == b"a"
        assert image_files.read_image(url("./in/././a.jpg")) == b"a"
        # a key that has one is that key
        assert image_files.read_image(url("in/./own.jpg")) == b"the one with a dot"


@pytest.mark.parametrize("seed", range(3))
def test_writing_creating_and_listing_come_out_right(
    s3: Any, network: Callable[..., Proxy], seed: int
) -> None:
    network(MIX, seed)
    table = pa.table({"n": np.arange(30_000), "text": [f"row {i}" for i in range(30_000)]})
    for i in range(6):
        filesystem.write(url(f"out/{i}"), b"%d" % i)
        assert filesystem.create(url(f"made/{i}"), b"mine %d" % i)
        assert not filesystem.create(url(f"made/{i}"), b"theirs")
    with filesystem.open_write(url("out/table.parquet")) as stream:
        pq.write_table(table, stream, row_group_size=5_000)
    with filesystem.open_read(url("out/table.parquet")) as stream:
        assert pq.read_table(stream).equals(table)
    assert filesystem.list_names(url("out")) == [*(str(i) for i in range(6)), "table.parquet"]
    assert [filesystem.read(url(f"made/{i}")) for i in range(6)] == [
        b"mine %d" % i for i in range(6)
    ]
    assert filesystem.size(url("out/0")) == 1
    filesystem.remove(url("out"))
    assert keys(s3, "out/") == []


def test_a_create_whose_answer_was_lost_is_known_to_be_ours(
    s3: Any, network: Callable[..., Proxy]
) -> None:
    proxy = network({"lost": 0.5})
    for i in range(12):
        assert filesystem.create(url(f"lease/{i}"), b"%d" % i)
    assert proxy.met["lost"] > 3


def test_a_lasting_fault_differs_from_a_missing_object(
    s3: Any, network: Callable[..., Proxy]
) -> None:
    made = objects(s3, 4)
    for kind, word in (("slow_down", "fewer requests"), ("reset", "did not answer")):
        network({kind: 1.0}, retry_timeout_s=2.0)
        found = list(image_files.read_ahead(made))
        assert all(isinstance(each, StorageUnavailable) for each in found)
        assert all(word in str(each) for each in found)


def test_bytes_that_never_match_their_etag_are_taken_when_they_come_twice_alike(
    s3: Any, network: Callable[..., Proxy]
) -> None:
    """As on stores whose ETag is no MD5: the same half of an object each time looks complete."""
    plain = boto3.client("s3", config=Config(request_checksum_calculation="when_required"))
    plain.put_object(Bucket=BUCKET, Key="in/000.jpg", Body=b"0123456789")
    proxy = network({"damage": 1.0})
    assert filesystem.read(url("in/000.jpg")) == b"01234"
    assert proxy.requests == {"GET": 2}


def test_credentials_that_are_refused_end_the_reading_with_one_error(
    s3: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = objects(s3, 1)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_connections()
    for _ in range(5):  # some of the reads fail while they are canceled
        with pytest.raises(StorageCredentials, match="check the credentials, which come from"):
            list(image_files.read_ahead([*made] * 100, 64))
    gc.collect()
    assert not [each for each in caplog.records if each.name == "asyncio"]


@pytest.mark.skipif(REAL is not None, reason="a real store checks the signature of all headers")
def test_a_store_that_overwrites_what_it_should_create_is_refused(
    s3: Any, network: Callable[..., Proxy]
) -> None:
    network({}).drop = "if-none-match"
    with pytest.raises(
        OutputError,
        match="ignores If-None-Match, so two drivers could write at once; pass another --output",
    ):
        Lease.acquire(url("out"))
    with pytest.raises(OutputError, match=r"two replicas could .* another --labeling\.output"):
        DecisionStore.open(url("out"), several=False)
    assert keys(s3, "out/") == []


def test_a_store_that_cannot_create_atomically_is_refused() -> None:
    with pytest.raises(StorageError, match="has no atomic create-if-absent"):
        filesystem.create("memory://out/lease", json.dumps({}).encode())
