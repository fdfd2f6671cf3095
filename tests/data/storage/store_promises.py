"""Guarantees of every object store, of any vendor: tests to be inherited.

A class that inherits them has a fixture `cloud`, a store behind a proxy that fails on request.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.curation.build import build_manifest
from imgcls.curation.config import ManifestBuildConfig
from imgcls.data import image_files
from imgcls.data.storage import filesystem, range_file, storage_settings
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import (
    OutputLocked,
    StorageBucketMissing,
    StorageCredentials,
    StorageError,
    StorageForbidden,
    StorageMissing,
    StorageThrottled,
    StorageTooLarge,
    StorageUnavailable,
)
from imgcls.runs.lease import Lease
from tests.clouds import Cloud, forget_connections
from tests.faults import Proxy


@dataclass
class Place:
    """A store seen through a proxy."""

    cloud: Cloud
    proxy: Proxy

    def url(self, key: str) -> str:
        return self.cloud.url(key)

    def answers(self, status: int, code: str, *lines: str, times: int = 10**9) -> None:
        """Have the store refuse the next requests, with these header lines."""
        left = times
        refusal = self.refusal(status, code, *lines)

        def respond(head: str) -> bytes | None:
            nonlocal left
            left -= 1
            return refusal if left >= 0 else None

        self.proxy.respond = respond

    def refusal(self, status: int, code: str, *lines: str) -> bytes:
        if self.cloud.scheme == "gs":
            body = f'{{"error": {{"code": {status}, "message": "{code}"}}}}'
            more = ["Content-Type: application/json"]
        else:
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
            more = [f"x-ms-error-code: {code}", "Content-Type: application/xml"]
        head = "\r\n".join([*more, *lines, f"Content-Length: {len(body)}"])
        return f"HTTP/1.1 {status} Refused\r\n{head}\r\n\r\n{body}".encode()


@contextmanager
def placed(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The store through a proxy, and every client led there."""
    before = storage_settings.current_settings()
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(cloud.endpoint).running())
        for name, value in cloud.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        forget_connections()
        anon = cloud.scheme == "gs"
        storage_settings.set_process_settings(
            StorageConfig(anon=anon, attempt_timeout_s=5, retry_timeout_s=20)
        )
        yield Place(cloud, proxy)
        proxy.respond = None
        proxy.share = {}
        filesystem.remove(cloud.url("t"))
        storage_settings.set_process_settings(before)
        forget_connections()


class StorePromises:
    """Tests of a store; `refusals`: (status, the store's code, our error) of its refusals."""

    @pytest.mark.parametrize(
        "name",
        ["with space", "50%", "%20", "a#b", "who?x=1", "ü→猫", "star*", "[1]", "a+b", "a&b=c"],
    )
    def test_any_name_is_taken_as_it_is(self, place: Place, name: str) -> None:
        url = filesystem.join(place.url("t/folder"), name, f"{name}.txt")
        filesystem.write(url, b"one")
        assert filesystem.read(url) == b"one"
        assert list(image_files.read_ahead([url])) == [b"one"]
        assert filesystem.size(url) == 3
        assert filesystem.exists(url)
        assert filesystem.list_names(place.url(f"t/folder/{name}")) == [f"{name}.txt"]
        assert list(filesystem.walk(place.url("t/folder"))) == [f"{name}/{name}.txt"]
        assert filesystem.create(url, b"two") is False
        filesystem.remove(url)
        assert not filesystem.exists(url)
        filesystem.remove(url)

    def test_what_is_not_there_is_missing(self, place: Place) -> None:
        gone = place.url("t/none")
        for call in (filesystem.read, filesystem.size):
            with pytest.raises(StorageMissing, match="no such file"):
                call(gone)
        assert filesystem.list_names(gone) == list(filesystem.walk(gone)) == []
        assert not filesystem.exists(gone)
        assert not filesystem.is_folder(gone)

    def test_whole_tables_are_written_and_read_in_parts(self, place: Place) -> None:
        table = pa.table({"n": range(300_000)})
        url = place.url("t/table.parquet")
        with filesystem.open_write(url) as stream:
            pq.write_table(table, stream, row_group_size=50_000)
        with filesystem.open_read(url) as stream:
            assert pq.read_table(stream).equals(table)

    def test_parts_of_an_object_are_of_one_version(self, place: Place) -> None:
        url = place.url("t/archive#1.tar")
        filesystem.write(url, b"old content")
        file = range_file.open_ranges(url)
        assert (file.size, file.read(4, 11), file.read(0, 1)) == (11, b"content", b"o")
        filesystem.write(url, b"new content")
        assert range_file.open_ranges(url).version not in (None, file.version)
        with pytest.raises(StorageMissing, match="has changed since it was opened"):
            file.read(4, 11)

    def test_a_listing_has_size_time_and_version_and_a_replaced_object_another_version(
        self, place: Place
    ) -> None:
        began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=2)
        for name in ("a.jpg", "deep/b.jpg"):
            filesystem.write(place.url(f"t/{name}"), b"12345")

        def listed(*, deep: bool) -> tuple[list[str], dict[str, Any]]:
            pages = list(filesystem.iter_pages(place.url("t"), deep=deep))
            return [f for page in pages for f in page.folders], {
                file.path: file for page in pages for file in page.files
            }

        folders, files = listed(deep=False)
        assert folders == [place.url("t/deep")]
        assert list(files) == [place.url("t/a.jpg")]
        _, files = listed(deep=True)
        assert sorted(files) == [place.url("t/a.jpg"), place.url("t/deep/b.jpg")]
        for file in files.values():
            assert file.size == 5
            assert file.mtime is not None
            assert began <= file.mtime <= datetime.datetime.now(datetime.UTC)
        filesystem.write(place.url("t/a.jpg"), b"54321")  # as many bytes, within the same second
        _, now = listed(deep=True)
        assert now[place.url("t/a.jpg")].etag != files[place.url("t/a.jpg")].etag
        assert now[place.url("t/deep/b.jpg")].etag == files[place.url("t/deep/b.jpg")].etag

    def test_a_listing_goes_on_from_page_to_page(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(self.module, "_PAGE_SIZE", 3)  # type: ignore[attr-defined]
        urls = [place.url(f"t/{i:02d}.jpg") for i in range(10)]
        for url in urls:
            filesystem.write(url, b"x")
        pages = list(filesystem.iter_pages(place.url("t"), deep=True))
        assert [file.path for page in pages for file in page.files] == urls
        assert len(pages) > 1

    def test_a_manifest_is_built_of_a_bucket(self, place: Place, tmp_path: Path) -> None:
        for name in ("cat/1.jpg", "dog/2.png", "dog/notes.txt"):
            filesystem.write(place.url(f"t/{name}"), b"x")
        config = ManifestBuildConfig(source=place.url("t"), output=str(tmp_path / "m"), labels=True)
        assert build_manifest(config) == 2
        rows = pq.read_table(tmp_path / "m").sort_by("path").to_pylist()
        assert [(row["path"], row["label"]) for row in rows] == [
            (place.url("t/cat/1.jpg"), "cat"),
            (place.url("t/dog/2.png"), "dog"),
        ]
        assert all(row["etag"] and row["mtime"] for row in rows)

    def test_more_bytes_than_allowed_are_not_read(self, place: Place) -> None:
        url = place.url("t/large.jpg")
        filesystem.write(url, bytes(20 << 20))
        assert len(image_files.read_image(url)) == 20 << 20
        for limit in (1000, (20 << 20) - 1):
            with pytest.raises(StorageTooLarge, match="has 20,971,520 bytes, more than the limit"):
                image_files.read_image(url, limit)
        found = list(image_files.read_ahead([url] * 3, max_bytes=1000))
        assert [each.status for each in found if isinstance(each, StorageError)] == [
            "too_large"
        ] * 3

    def test_one_driver_has_the_output_and_the_next_one_after_it(self, place: Place) -> None:
        output = place.url("t/out")
        lease = Lease.acquire(output, 1.0)
        with pytest.raises(OutputLocked):
            Lease.acquire(output, 1.0)
        lease.release()
        second = Lease.acquire(output, 1.0)
        second.check()
        second.release()

    def test_a_create_whose_answer_was_lost_is_known_to_be_ours(self, place: Place) -> None:
        place.proxy.share = {"lost": 0.4}
        for i in range(6):
            assert filesystem.create(place.url(f"t/made/{i}"), b"mine %d" % i)
        place.proxy.share = {}
        for i in range(6):
            assert filesystem.create(place.url(f"t/made/{i}"), b"theirs") is False
            assert filesystem.read(place.url(f"t/made/{i}")) == b"mine %d" % i

    @pytest.mark.parametrize("kind", ["reset", "truncate", "slow_down"])
    def test_every_object_arrives_as_it_was_stored(self, place: Place, kind: str) -> None:
        made = {place.url(f"t/{i}.jpg"): b"%d" % i * (100 + i) for i in range(12)}
        for url, data in made.items():
            filesystem.write(url, data)
        place.proxy.share = {kind: 0.3}
        assert list(image_files.read_ahead(made)) == list(made.values())
        assert place.proxy.met[kind] > 1

    def test_refusals_have_different_errors(self, place: Place) -> None:
        filesystem.write(place.url("t/x.jpg"), b"x")
        storage_settings.set_process_settings(
            storage_settings.current_settings().model_copy(update={"retry_timeout_s": 0.3})
        )
        expected: dict[int, type[StorageError]] = {
            401: StorageCredentials, 403: StorageForbidden, 404: StorageMissing,
            429: StorageThrottled, 500: StorageUnavailable, 503: StorageThrottled,
        }  # fmt: skip
        by_code = {"ContainerNotFound": StorageBucketMissing}
        for status, code in self.refusals:  # type: ignore[attr-defined]
            place.answers(status, code)
            calls: list[Callable[[], object]] = [
                lambda: filesystem.read(place.url("t/x.jpg")),
                lambda: filesystem.write(place.url("t/y"), b"y"),
                lambda: list(filesystem.iter_pages(place.url("t"), deep=True)),
            ]
            for call in calls:
                with pytest.raises(StorageError) as caught:
                    call()
                assert type(caught.value) is by_code.get(code, expected[status]), (status, code)
            place.proxy.respond = None

    def test_a_store_that_asks_for_time_gets_it(self, place: Place) -> None:
        filesystem.write(place.url("t/x.jpg"), b"x")
        place.answers(503, "ServerBusy", "Retry-After: 1", times=1)
        began = time.monotonic()
        assert filesystem.read(place.url("t/x.jpg")) == b"x"
        assert time.monotonic() - began >= 1

    def test_a_store_that_asks_for_too_much_time_is_left_alone(self, place: Place) -> None:
        place.answers(503, "ServerBusy", "Retry-After: 3600")
        place.proxy.requests.clear()
        for call in (
            lambda: filesystem.read(place.url("t/x.jpg")),
            lambda: filesystem.write(place.url("t/x.jpg"), b"x"),
        ):
            with pytest.raises(StorageThrottled):
                call()
        assert place.proxy.requests.total() == 2
