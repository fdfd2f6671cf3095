"""Images from web servers: bounded, by URLs sent as they are written, politely."""

from __future__ import annotations

import email.utils
import gzip
import io
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls import config
from imgcls.data import image_files
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.storage import filesystem, storage_settings
from imgcls.data.storage.http import encode_url
from imgcls.data.storage.range_file import open_ranges
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import (
    ConfigError,
    StorageError,
    StorageMissing,
    StorageOptedOut,
    StorageThrottled,
    StorageTooLarge,
    StorageUnavailable,
)
from imgcls.inference.requests import read_image_size
from tests.web_server import Reply, Server, serving

MB = 1_000_000


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def settings() -> Iterator[Callable[..., None]]:
    before = storage_settings.current_settings()

    def use(**given: object) -> None:
        storage_settings.set_process_settings(StorageConfig(**given))  # type: ignore[arg-type]

    use(attempt_timeout_s=20, retry_timeout_s=20)
    yield use
    storage_settings.set_process_settings(before)


def endless() -> Iterator[bytes]:
    while True:
        yield bytes(1 << 16)


# ------------------------------------------------------------------ bounded


def test_an_endless_body_is_cut_off_at_the_limit(server: Server) -> None:
    server.replies["/endless.jpg"] = [Reply(body=endless)]
    url = f"{server.url}/endless.jpg"
    with pytest.raises(StorageTooLarge, match=r"has more bytes than the limit of 1,000,000"):
        image_files.read_image(url, MB)
    # what the sockets of both sides hold is sent and not read
    assert server.sent["/endless.jpg"] < 30 * MB
    assert len(server.lines) == 1


def test_a_declared_size_is_checked_before_anything_is_read(server: Server) -> None:
    server.replies["/x"] = [Reply(body=bytes(MB + 1))]
    with pytest.raises(StorageTooLarge, match="has 1,000,001 bytes, more than the limit"):
        image_files.read_image(f"{server.url}/x", MB)
    server.replies["/x"] = [Reply(body=bytes(MB))]
    assert image_files.read_image(f"{server.url}/x", MB) == bytes(MB)


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate"])
def test_what_a_compressed_body_holds_is_counted(server: Server, coding: str) -> None:
    pack = zlib.compress if coding == "deflate" else gzip.compress
    headers = {"Content-Encoding": coding}
    server.replies["/bomb"] = [Reply(body=pack(bytes(50 * MB)), headers=headers)]
    assert len(pack(bytes(50 * MB))) < MB
    with pytest.raises(StorageTooLarge, match="has more bytes than the limit of 1,000,000"):
        image_files.read_image(f"{server.url}/bomb", MB)
    server.replies["/fine"] = [Reply(body=pack(b"image" * 1000), headers=headers)]
    assert image_files.read_image(f"{server.url}/fine", MB) == b"image" * 1000
    assert server.heads[-1]["accept-encoding"] == "identity"


def test_a_compressed_body_that_breaks_off_is_asked_for_again(server: Server) -> None:
    whole = gzip.compress(b"image" * 100)
    headers = {"Content-Encoding": "gzip"}
    server.replies["/x"] = [Reply(body=body, headers=headers) for body in (whole[:-4], whole)]
    assert image_files.read_image(f"{server.url}/x") == b"image" * 100


def test_many_large_files_at_once_hold_no_more_than_the_budget(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "READ_AHEAD_BYTES", 3 * MB)
    for i in range(12):
        body = bytes([i]) * MB
        server.replies[f"/{i}"] = [Reply(body=body if i % 2 else lambda body=body: iter([body]))]  # type: ignore[misc]
    held = most = 0

    class Watched(image_files.ByteBudget):
        def _try_take(self, read: int, total: int) -> bool:
            nonlocal most
            taken = super()._try_take(read, total)
            most = max(most, sum(self._held.values()))
            return taken

    monkeypatch.setattr(image_files, "ByteBudget", Watched)
    urls = [f"{server.url}/{i}" for i in range(12)]
    for i, data in enumerate(image_files.read_ahead(urls, in_flight=8, max_bytes=2 * MB)):
        assert data == bytes([i]) * MB
        held += 1
    assert held == 12
    assert MB < most <= 3 * MB + 2 * MB


# ------------------------------------------------------------------ as it is written


@pytest.mark.parametrize(
    "rest",
    [
        "/a%2Fb.jpg?X-Amz-Signature=ab%2Bc%3D&X-Amz-Credential=AKIA%2F2026%2Fs3&e=1+2",
        "/a+b%20c.jpg?sig=x%2fY==&se=2026-01-01T00%3A00%3A00Z",
        "/a/./b/../c//d.jpg",
        "/%7Euser/%41~'!*();:@&=$,[].jpg?a=b?c&d=%25&e",
        "/%E7%8C%AB.jpg?q=%e7%8c%ab",
        "?only=query",
    ],
)
def test_a_url_reaches_the_server_byte_for_byte(server: Server, rest: str) -> None:
    url = f"{server.url}{rest}"
    assert list(image_files.read_ahead([url])) == [b"default"]
    assert server.lines == [rest if rest.startswith("/") else f"/{rest}"]
    with filesystem.open_read(url) as stream:
        assert stream.read() == b"default"
    assert set(server.lines[1:]) <= {server.lines[0]}


def test_what_no_request_can_hold_is_encoded_as_utf8() -> None:
    assert encode_url("http://h/猫 é.jpg?ü=1") == "http://h/%E7%8C%AB%20%C3%A9.jpg?%C3%BC=1"
    assert encode_url("http://h/a\r\nHost: evil") == "http://h/a%0D%0AHost:%20evil"
    assert encode_url("http://bücher.example/a") == "http://xn--bcher-kva.example/a"
    assert encode_url("http://h") == "http://h/"


def test_a_redirection_is_followed_to_the_letter(server: Server) -> None:
    target = "/b%2Fc.jpg?sig=a%2Bb+c"
    for place in (f"{server.url}{target}", target):
        server.replies["/a"] = [Reply(302, headers={"Location": place})]
        server.lines.clear()
        assert image_files.read_image(f"{server.url}/a") == b"default"
        assert server.lines == ["/a", target]


# ------------------------------------------------------------------ politely


def test_a_host_is_asked_again_at_the_time_that_it_named(server: Server) -> None:
    server.replies["/x"] = [Reply(429, headers={"Retry-After": "1"}), Reply(body=b"image")]
    assert image_files.read_image(f"{server.url}/x") == b"image"
    assert server.times[1] - server.times[0] >= 0.9
    named = int(time.time()) + 2
    headers = {"Retry-After": email.utils.formatdate(named, usegmt=True)}
    server.replies["/y"] = [Reply(429, headers=headers), Reply(body=b"image")]
    assert image_files.read_image(f"{server.url}/y") == b"image"
    assert time.time() >= named


def test_a_host_that_asks_for_longer_than_the_retry_time_is_left_alone(server: Server) -> None:
    server.replies["/0"] = [Reply(503, headers={"Retry-After": "3600"})]
    with pytest.raises(StorageThrottled, match="fewer requests"):
        image_files.read_image(f"{server.url}/0")
    found = list(image_files.read_ahead(f"{server.url}/{i}" for i in range(1, 20)))
    assert len(server.lines) == 1  # the others were not requested
    assert all(isinstance(each, StorageThrottled) for each in found)
    assert "asks for no request for 3600 s" in str(found[0])


def test_requests_carry_the_projects_name_or_another(
    server: Server, settings: Callable[..., None]
) -> None:
    image_files.read_image(f"{server.url}/a")
    settings(user_agent="photos/2 (ops@example.com)")
    image_files.read_image(f"{server.url}/b")
    assert [head["user-agent"] for head in server.heads] == ["imgcls", "photos/2 (ops@example.com)"]


def test_no_more_requests_than_allowed_are_under_way_to_a_host(
    server: Server, settings: Callable[..., None]
) -> None:
    settings(max_requests_per_host=3, attempt_timeout_s=0.5, retry_timeout_s=1)
    server.pause = 0.1
    # in the queue for longer than an attempt may take, and than the retry time
    found = list(image_files.read_ahead((f"{server.url}/{i}" for i in range(60)), in_flight=48))
    assert found == [b"default"] * 60
    assert server.most_under_way == 3
    assert len(server.lines) == 60


@pytest.mark.parametrize(
    ("limit", "processes", "share"), [(64, 1, 64), (64, 7, 9), (64, 64, 1), (8, 3, 2), (4, 9, 1)]
)
def test_the_workers_of_a_run_share_the_limit(limit: int, processes: int, share: int) -> None:
    assert (
        StorageConfig(max_requests_per_host=limit).split_across(processes).max_requests_per_host
        == share
    )


def test_gone_is_missing(server: Server) -> None:
    server.replies["/x"] = [Reply(410)]
    with pytest.raises(StorageMissing, match="no such file"):
        image_files.read_image(f"{server.url}/x")
    assert len(server.lines) == 1


@pytest.mark.parametrize("code", [socket.EAI_NONAME, socket.EAI_NODATA])
def test_a_host_that_does_not_exist_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    asked: list[str] = []

    def resolve(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(code, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(StorageMissing, match=r"http://gone\.example/a\.jpg: no such host"):
        image_files.read_image("http://gone.example/a.jpg")
    assert asked == ["gone.example"]


def test_a_name_server_that_does_not_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    answers = iter([socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")])
    genuine = socket.getaddrinfo

    def resolve(host: str, *more: Any, **named: Any) -> Any:
        for error in answers:
            raise error
        return genuine("127.0.0.1", *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = server.url.replace("127.0.0.1", "again.example")
    assert image_files.read_image(f"{url}/a.jpg") == b"default"


def test_a_server_that_never_ends_its_answer_is_given_up(
    server: Server, settings: Callable[..., None]
) -> None:
    def slow() -> Iterator[bytes]:
        while True:
            time.sleep(0.05)
            yield b"x"

    settings(attempt_timeout_s=0.3, retry_timeout_s=0.5)
    server.replies["/x"] = [Reply(body=slow)]
    with pytest.raises(StorageUnavailable, match="did not answer"):
        image_files.read_image(f"{server.url}/x")


# ------------------------------------------------------------------ opt-outs


def test_an_image_whose_owner_opted_out_is_refused_on_request(
    server: Server, settings: Callable[..., None]
) -> None:
    server.replies["/x"] = [Reply(body=b"image", headers={"X-Robots-Tag": "otherbot: a, noai"})]
    server.replies["/y"] = [Reply(body=b"image", headers={"X-Robots-Tag": "nofollow, noai"})]
    assert image_files.read_image(f"{server.url}/y") == b"image"  # not requested
    settings(robots_opt_outs=("noai",))
    assert image_files.read_image(f"{server.url}/x") == b"image"
    with pytest.raises(StorageOptedOut, match=r"/y: .*\(X-Robots-Tag: noai\)") as caught:
        image_files.read_image(f"{server.url}/y")
    assert caught.value.status == "opted_out"
    assert len(server.lines) == 3  # it was not tried again
    assert filesystem.read(f"{server.url}/y") == b"image"  # no image: a manifest or a bundle


def test_wrong_directives_and_cache_folders_are_refused() -> None:
    with pytest.raises(ConfigError, match="noimageai"):
        config.build(StorageConfig, {"robots_opt_outs": "noai,nothing"})
    with pytest.raises(ConfigError, match="http_cache: must be a folder on a disk, not a URL"):
        config.build(StorageConfig, {"http_cache": "s3://bucket/cache"})
    built = config.build(StorageConfig, {"robots_opt_outs": "noai,noindex", "http_cache": "c"})
    assert built.robots_opt_outs == ("noai", "noindex")
    assert built.http_cache == os.path.abspath("c")


# ------------------------------------------------------------------ cache


def test_an_image_is_requested_once_with_a_cache(
    server: Server, settings: Callable[..., None], tmp_path: Path
) -> None:
    settings(http_cache=str(tmp_path))
    body = b"\xff\xd8\xff image"
    server.replies["/x"] = [Reply(body=body, headers={"X-Robots-Tag": "noai"})]
    for _ in range(2):
        assert image_files.read_image(f"{server.url}/x") == body
    assert server.lines == ["/x"]
    with pytest.raises(StorageTooLarge):
        image_files.read_image(f"{server.url}/x", 5)
    settings(http_cache=str(tmp_path), robots_opt_outs=("noai",))
    with pytest.raises(StorageOptedOut):  # also for an entry of an earlier pass
        image_files.read_image(f"{server.url}/x")
    assert server.lines == ["/x"]
    (entry,) = (path for path in tmp_path.rglob("*") if path.is_file())
    entry.write_bytes(entry.read_bytes()[:-1])
    settings(http_cache=str(tmp_path))
    assert image_files.read_image(f"{server.url}/x") == body  # damaged, so fetched again
    assert server.lines == ["/x", "/x"]


def test_pages_and_errors_are_not_cached(
    server: Server, settings: Callable[..., None], tmp_path: Path
) -> None:
    settings(http_cache=str(tmp_path), robots_opt_outs=("noai",))
    page = Reply(body=b"<html>try again later</html>")
    image = Reply(body=b"GIF89a image")
    server.replies["/x"] = [page, Reply(404), image]
    url = f"{server.url}/x"
    assert image_files.read_image(url) == page.body
    with pytest.raises(StorageMissing):
        image_files.read_image(url)
    assert image_files.read_image(url) == image.body
    server.replies["/y"] = [Reply(body=b"GIF89a image", headers={"X-Robots-Tag": "noai"})]
    with pytest.raises(StorageOptedOut):
        image_files.read_image(f"{server.url}/y")
    filesystem.read(f"{server.url}/z")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_cached_image_waits_for_no_slot_of_its_host(
    server: Server, settings: Callable[..., None], tmp_path: Path
) -> None:
    settings(http_cache=str(tmp_path), retry_timeout_s=20)
    server.replies["/x"] = [Reply(body=b"GIF89a image")]
    image_files.read_image(f"{server.url}/x")
    server.replies["/y"] = [Reply(503, headers={"Retry-After": "3600"})]
    with pytest.raises(StorageThrottled):
        image_files.read_image(f"{server.url}/y")
    assert image_files.read_image(f"{server.url}/x") == b"GIF89a image"


def test_many_cached_images_hold_no_more_than_the_budget(
    server: Server,
    settings: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings(http_cache=str(tmp_path))
    monkeypatch.setattr(image_files, "READ_AHEAD_BYTES", 3 * MB)
    bodies = [b"GIF89a" + bytes([i]) * MB for i in range(12)]
    for i, body in enumerate(bodies):
        server.replies[f"/{i}"] = [Reply(body=body)]
    urls = [f"{server.url}/{i}" for i in range(12)]
    assert list(image_files.read_ahead(urls, in_flight=8, max_bytes=2 * MB)) == bodies
    requests = len(server.lines)  # some are begun again when there is room for their bytes
    assert list(image_files.read_ahead(urls, in_flight=8, max_bytes=2 * MB)) == bodies
    assert len(server.lines) == requests


# ------------------------------------------------------------------ tables


def write_table(rows: int) -> bytes:
    sink = io.BytesIO()
    paths = [f"{number}.jpg" for number in range(rows)]
    pq.write_table(pa.table({"path": paths}), sink, compression="none")
    return sink.getvalue()


@pytest.mark.parametrize("name", ["images.csv", "images.parquet"])
@pytest.mark.parametrize("has_size", [True, False])
def test_a_manifest_is_read_from_a_server_without_ranges_or_sizes(
    server: Server, name: str, has_size: bool
) -> None:
    csv = "path\n" + "".join(f"{number}.jpg\n" for number in range(1_000_000))
    body = csv.encode() if name == "images.csv" else write_table(1_000_000)
    assert len(body) > 2 * filesystem.BLOCK_BYTES
    server.replies[f"/{name}"] = [Reply(body=body if has_size else lambda: iter([body]))]
    url = f"{server.url}/{name}"
    manifest = open_manifest(ManifestConfig(path=url))
    assert sum(batch.num_rows for batch in manifest.batches()) == 1_000_000
    assert manifest.fingerprint() == blake2b(body + b"\0end of file\0", digest_size=16).hexdigest()
    # each time it is opened, for its size and then whole
    assert len(server.lines) <= 10


def test_parts_of_a_file_need_a_server_with_ranges_and_sizes(server: Server) -> None:
    server.replies["/chunked"] = [Reply(body=lambda: iter([b"0123"]))]
    for read in (filesystem.size, open_ranges):
        with pytest.raises(StorageError, match=r"does not name its size.*download the file first"):
            read(f"{server.url}/chunked")
    assert read_image_size(f"{server.url}/chunked") == 0
    server.replies["/whole"] = [Reply(body=b"0123456789")]
    opened = open_ranges(f"{server.url}/whole")
    assert opened.size == 10
    before = len(server.lines)
    with pytest.raises(StorageError, match=r"the server ignores ranges.*download the file first"):
        opened.read(2, 4)
    assert len(server.lines) == before + 1
    assert opened.read(0, 10) == b"0123456789"
