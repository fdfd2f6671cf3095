"""Images from web servers: bounded, by URLs sent as they are written, politely."""

from __future__ import annotations

import email.utils
import gzip
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from imgcls.data import filesystem, image_files, storage_settings
from imgcls.data.http import encode_url
from imgcls.data.storage_settings import StorageConfig
from imgcls.errors import StorageMissing, StorageThrottled, StorageTooLarge, StorageUnavailable

MB = 1_000_000


@dataclass
class Reply:
    """One answer; `body` makes pieces that are sent as chunks, or is sent whole."""

    status: int = 200
    body: bytes | Callable[[], Iterator[bytes]] = b""
    headers: dict[str, str] = field(default_factory=dict)


class Server(ThreadingHTTPServer):
    """Answers each path as a test has set it up, and records the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        self.replies: dict[str, list[Reply]] = {}
        self.lines: list[str] = []
        self.times: list[float] = []
        self.heads: list[dict[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.under_way = self.most_under_way = 0
        self.pause = 0.0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.lines.append(self.raw_requestline.split(b" ")[1].decode("latin-1"))
            server.times.append(time.monotonic())
            server.heads.append({name.lower(): value for name, value in self.headers.items()})
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            replies = server.replies.get(self.path, [Reply(body=b"default")])
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        time.sleep(server.pause)
        with server.lock:
            server.under_way -= 1
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        try:
            if isinstance(reply.body, bytes):
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in reply.body():
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                server.sent[self.path] += len(piece)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True  # the client has had enough

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


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

    class Watched(filesystem.ByteBudget):
        def _try_take(self, read: int, total: int) -> bool:
            nonlocal most
            taken = super()._try_take(read, total)
            most = max(most, sum(self._held.values()))
            return taken

    monkeypatch.setattr(filesystem, "ByteBudget", Watched)
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
    for value in ("1", email.utils.formatdate(time.time() + 2.0, usegmt=True)):
        server.times.clear()
        headers = {"Retry-After": value}
        server.replies["/x"] = [Reply(429, headers=headers), Reply(body=b"image")]
        assert image_files.read_image(f"{server.url}/x") == b"image"
        assert server.times[1] - server.times[0] >= 0.9


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
