"""An object store over real HTTP, as any fsspec store is used, in a bucket of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data import image_files
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.storage import filesystem
from imgcls.data.storage.s3 import S3Reader
from imgcls.errors import (
    ManifestError,
    StorageBucketMissing,
    StorageCredentials,
    StorageError,
    StorageForbidden,
    StorageMissing,
)
from tests.s3 import BUCKET, REAL, checking_permissions, forget_connections, keys, url, user


def fails(kind: type[StorageError], call: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_back(s3: Any) -> None:
    for data in (b"", b"one", bytes(range(256)) * 999):
        filesystem.write(url("a/b.bin"), data)
        assert filesystem.read(url("a/b.bin")) == data
        assert filesystem.size(url("a/b.bin")) == len(data)
        assert s3.get_object(Bucket=BUCKET, Key="a/b.bin")["Body"].read() == data
    assert filesystem.exists(url("a/b.bin"))
    assert filesystem.is_folder(url("a"))
    assert not filesystem.is_folder(url("a/b.bin"))
    filesystem.check_writable(url("fresh"))
    assert keys(s3) == ["a/b.bin"]


@pytest.mark.parametrize(
    "name", ["with space", "50%", "%20", "a#b", "who?x=1", "ü→猫", "star*", "[1]", "a+b", "a&b=c"]
)
def test_any_key_is_taken_as_it_is(s3: Any, name: str) -> None:
    place = filesystem.join(url("folder"), name, f"{name}.txt")
    filesystem.write(place, b"one")
    assert keys(s3) == [f"folder/{name}/{name}.txt"]
    assert filesystem.read(place) == b"one"
    assert filesystem.size(place) == 3
    assert filesystem.exists(place)
    assert filesystem.list_names(url(f"folder/{name}")) == [f"{name}.txt"]
    assert list(filesystem.walk(url("folder"))) == [f"{name}/{name}.txt"]
    assert filesystem.create(place, b"two") is False
    filesystem.remove(place)
    assert keys(s3) == []
    filesystem.remove(place)


def test_what_is_not_there_is_missing(s3: Any) -> None:
    for call in (filesystem.read, filesystem.size):
        assert fails(StorageMissing, lambda call=call: call(url("none"))) == (  # type: ignore[misc]
            f"s3://{BUCKET}/none: no such file"
        )
    assert filesystem.list_names(url("none")) == []
    assert list(filesystem.walk(url("none"))) == []
    assert filesystem.glob(url("none/*")) == []
    assert not filesystem.exists(url("none"))
    assert not filesystem.is_folder(url("none"))
    found = list(image_files.read_ahead([url("none"), None]))
    assert [type(f) for f in found] == [StorageMissing, StorageMissing]


def test_a_bucket_that_is_not_there_is_named_as_such(s3: Any) -> None:
    for call in (
        lambda: filesystem.read("s3://no-bucket/x"),
        lambda: filesystem.write("s3://no-bucket/x", b""),
        lambda: filesystem.create("s3://no-bucket/x", b""),
    ):
        assert fails(StorageBucketMissing, call) == "s3://no-bucket/x: no such bucket"


def test_wrong_or_no_credentials_are_forbidden_at_once(
    s3: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem.write(url("x"), b"kept")
    with monkeypatch.context() as changed:
        changed.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        forget_connections()
        with checking_permissions(endpoint):
            assert "access is refused" in fails(
                StorageCredentials, lambda: filesystem.read(url("x"))
            )
            fails(StorageCredentials, lambda: filesystem.write(url("y"), b""))
            fails(StorageCredentials, lambda: filesystem.create(url("y"), b""))
        changed.delenv("AWS_ACCESS_KEY_ID")
        changed.delenv("AWS_SECRET_ACCESS_KEY")
        forget_connections()
        message = fails(StorageCredentials, lambda: filesystem.read(url("x")))
        assert "Unable to locate credentials" in message


@pytest.mark.skipif(REAL is not None, reason="makes users by moto's IAM")
@pytest.mark.parametrize(
    ("allowed", "denied"),
    [
        (("s3:GetObject",), {"list": "s3:ListBucket", "write": "s3:PutObject"}),
        (("s3:ListBucket",), {"read": "s3:GetObject", "create": "s3:PutObject"}),
        (("s3:PutObject",), {"read": "s3:GetObject", "list": "s3:ListBucket"}),
    ],
)
def test_the_permission_that_is_missing_is_named(
    s3: Any,
    endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    allowed: tuple[str, ...],
    denied: dict[str, str],
) -> None:
    s3.put_object(Bucket=BUCKET, Key="in/x", Body=b"kept")
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: filesystem.read(url("in/x")),
        "list": lambda: filesystem.list_names(url("in")),
        "write": lambda: filesystem.write(url("y"), b""),
        "create": lambda: filesystem.create(url("z"), b""),
    }
    needs = dict(zip(calls, ("s3:GetObject", "s3:ListBucket", *2 * ["s3:PutObject"]), strict=True))
    with user(endpoint, allowed, monkeypatch), checking_permissions(endpoint):
        for name, call in calls.items():
            if name in denied:
                assert f"the request needs the permission {denied[name]}" in fails(
                    StorageForbidden, call
                )
            elif needs[name] in allowed:
                call()


def test_of_many_rivals_one_creates_an_object(s3: Any) -> None:
    filesystem.write(url("warm"), b"")
    with ThreadPoolExecutor(8) as pool:
        for i in range(10):
            won = pool.map(
                lambda me, i=i: filesystem.create(url(f"prize-{i}"), b"%d" % me), range(8)
            )
            winners = [me for me, first in enumerate(won) if first]
            assert len(winners) == 1
            assert filesystem.read(url(f"prize-{i}")) == b"%d" % winners[0]


def test_listings_show_files_only_and_what_others_wrote_since(s3: Any) -> None:
    def listed() -> tuple[object, ...]:
        return (
            filesystem.list_names(url("in")),
            list(filesystem.walk(url("in"))),
            filesystem.glob(url("in/*")),
            filesystem.exists(url("in/late.jpg")),
        )

    for key in ("in/b.jpg", "in/a/1.jpg", "in/a-b/1.jpg", "in/_x/1.jpg", "in/.y/1.jpg", "inn/x"):
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"")
    walked = ["_x/1.jpg", "a/1.jpg", "a-b/1.jpg", "b.jpg"]
    assert listed() == (["b.jpg"], walked, [url("in/b.jpg")], False)
    s3.put_object(Bucket=BUCKET, Key="in/late.jpg", Body=b"new")
    assert listed() == (
        ["b.jpg", "late.jpg"],
        [*walked, "late.jpg"],
        [url("in/b.jpg"), url("in/late.jpg")],
        True,
    )
    assert filesystem.size(url("in/late.jpg")) == 3
    s3.delete_object(Bucket=BUCKET, Key="in/late.jpg")
    assert listed() == (["b.jpg"], walked, [url("in/b.jpg")], False)
    assert filesystem.glob(url("in/**/1.jpg")) == [
        url(f"in/{name}/1.jpg") for name in (".y", "_x", "a-b", "a")
    ]


def test_removing_takes_an_object_or_a_folder_and_nothing_next_to_it(s3: Any) -> None:
    every = [
        "m/a*/1", "m/ab/1", "m/part-1", "m/part-10", "m/run1/_SUCCESS", "m/run[1]/_SUCCESS",
        "m/run[1]/deep/x",
    ]  # fmt: skip
    for key in every:
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"")
    for place, gone in (
        ("m/part-1", {"m/part-1"}),
        ("m/run[1]/_SUCCESS", {"m/run[1]/_SUCCESS"}),
        ("m/a*", {"m/a*/1"}),
        ("m/none", set()),
        ("m/run[1]", {"m/run[1]/deep/x"}),
    ):
        filesystem.remove(url(place))
        every = [key for key in every if key not in gone]
        assert keys(s3) == every
    filesystem.remove(url("m"))
    assert keys(s3) == []


def test_a_table_streams_out_and_in(s3: Any) -> None:
    table = pa.table({"path": [f"{i}.jpg" for i in range(5000)], "n": range(5000)})
    with filesystem.open_write(url("rows.parquet")) as stream:
        pq.write_table(table, stream, row_group_size=512)
        assert keys(s3) == []
    with filesystem.open_read(url("rows.parquet")) as stream:
        assert pq.read_table(stream).equals(table)


@pytest.mark.parametrize("size", [100, 60 << 20], ids=["one part", "several parts"])
def test_an_error_while_writing_leaves_no_object(s3: Any, size: int) -> None:
    def broken() -> None:
        with filesystem.open_write(url("half")) as stream:
            stream.write(bytes(size))
            raise KeyError("half")

    with pytest.raises(KeyError):
        broken()
    gc.collect()
    assert keys(s3) == []
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=BUCKET)


def test_a_stream_into_nowhere_is_a_storage_error(s3: Any) -> None:
    def stream(size: int) -> None:
        with filesystem.open_write("s3://no-bucket/x") as out:
            out.write(bytes(size))

    for size in (10, 60 << 20):
        fails(StorageBucketMissing, lambda size=size: stream(size))  # type: ignore[misc]


def test_a_manifest_may_lie_on_a_store_in_any_form(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="lists/rows.csv", Body=b"path,label\na/1.jpg,cat\n")
    for key in ("pets/cat/1.jpg", "pets/dog/2.png", "pets/dog/notes.txt"):
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"pixels")
    table = pa.table({"path": ["s3://other/1.jpg"], "label": ["cat"]})
    for i in range(2):
        with filesystem.open_write(url(f"parts/{i}.parquet")) as stream:
            pq.write_table(table, stream)
    s3.put_object(Bucket=BUCKET, Key="parts/_SUCCESS", Body=b"")

    def rows(path: str) -> list[dict[str, Any]]:
        manifest = open_manifest(ManifestConfig(path=path))
        found = [row for batch in manifest.batches() for row in batch.to_pylist()]
        return [row | {"path": manifest.resolve(row["path"])} for row in found]

    assert rows(url("lists/rows.csv")) == [{"path": url("lists/a/1.jpg"), "label": "cat"}]
    for pets in (url("pets"), url("pets/")):
        assert rows(pets) == [
            {"path": url("pets/cat/1.jpg"), "label": "cat"},
            {"path": url("pets/dog/2.png"), "label": "dog"},
        ]
    assert rows(url("pets/*/*.png")) == [{"path": url("pets/dog/2.png")}]
    for parts in (url("parts"), url("parts/*.parquet")):
        assert rows(parts) == table.to_pylist() * 2
    before = open_manifest(ManifestConfig(path=url("pets"))).fingerprint()
    s3.put_object(Bucket=BUCKET, Key="pets/dog/3.jpg", Body=b"")
    assert open_manifest(ManifestConfig(path=url("pets"))).fingerprint() != before
    for missing in ("none", "none.csv", "none/*.csv"):
        with pytest.raises(ManifestError, match=r"no such|no file"):
            open_manifest(ManifestConfig(path=url(missing)))


def test_the_endpoint_of_the_environment_is_used(s3: Any, endpoint: str) -> None:
    filesystem.write(url("x"), b"")
    assert urlsplit(s3.meta.endpoint_url).port == urlsplit(endpoint).port


class SlowStore:
    """A file system of S3 whose objects named slow/... arrive after all others are sent."""

    def __init__(self) -> None:
        self.meta = self.events = self
        self.others_are_read = asyncio.Event()

    def register(self, event: str, handler: Callable[..., None]) -> None:
        self.handler = handler

    async def set_session(self) -> None:
        pass

    async def get_s3(self, bucket: str) -> SlowStore:
        return self

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    async def _call_s3(self, method: str, *, Bucket: str, Key: str) -> dict[str, Any]:
        self.handler(request=SimpleNamespace(url=f"http://store/{Bucket}/{Key}", headers={}))
        if Key.startswith("slow/"):
            await self.others_are_read.wait()
        answer = SimpleNamespace(read=self._read, close=lambda: None)
        body = contextlib.nullcontext(SimpleNamespace(raw_stream=answer))
        return {"ResponseMetadata": {"HTTPHeaders": {"content-length": "1"}}, "Body": body}

    async def _read(self) -> bytes:
        return b"x"


async def read_at_once(store: SlowStore, reader: S3Reader) -> None:
    slow = [asyncio.ensure_future(reader.read(path, set())) for path in ("b/slow/1", "c/slow/1")]
    await asyncio.sleep(0)
    await asyncio.gather(*(reader.read(path, set()) for path in ("b/1", "c/1")))
    store.others_are_read.set()
    await asyncio.gather(*slow)


def test_a_template_is_made_of_the_request_for_the_same_object() -> None:
    store = SlowStore()
    reader = S3Reader(store)
    asyncio.run(read_at_once(store, reader))
    prefixes = {bucket: each and each.url_prefix for bucket, each in reader._buckets.items()}
    assert prefixes == {"b": "http://store/b/", "c": "http://store/c/"}
