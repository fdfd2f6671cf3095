"""Local files and small stores: typed errors, whole files or none, one winner among rivals."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcls.data import image_files
from imgcls.data.storage import filesystem, retries, storage_settings
from imgcls.errors import (
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageMissing,
    StorageThrottled,
    StorageUnavailable,
)
from tests.processes import wait_for

ODD_NAMES = [
    "plain.txt", "with space.txt", "50%.txt", "%20.txt", "a#b.txt", "who?.txt", "ü→猫.txt",
    "star*.txt", "[1].txt", "a'b\"c.txt", "back\\slash.txt", "-dash.txt", "~tilde.txt", "a&b=c.txt",
    "line\nbreak.txt", "semi;colon.txt", "x" * 240 + ".txt",
]  # fmt: skip


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Within it, permissions of files count, also for root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def fails(kind: type[StorageError], call: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    return str(caught.value)


def writes(url: str) -> list[Callable[[], object]]:
    """Every way to write a file."""

    def stream() -> None:
        with filesystem.open_write(url) as out:
            out.write(b"new")

    return [
        lambda: filesystem.write(url, b"new"), lambda: filesystem.create(url, b"new"), stream,
    ]  # fmt: skip


# ------------------------------------------------------------------ error messages


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone" / "file.txt")
    for call in (filesystem.read, filesystem.size, filesystem.open_read):
        message = fails(StorageMissing, lambda call=call: call(gone))  # type: ignore[misc]
        assert message == f"{gone}: no such file"
    assert not filesystem.exists(gone)
    assert not filesystem.is_folder(gone)
    assert filesystem.list_names(gone) == []
    filesystem.remove(gone)
    fails(StorageMissing, lambda: list(filesystem.walk(gone)))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "is a folder, not a file" in fails(StorageError, lambda: filesystem.read(str(tmp_path)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    fails(StorageError, lambda: filesystem.write(str(tmp_path / "folder"), b""))
    assert filesystem.create(str(tmp_path / "folder"), b"") is False
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    below = str(tmp_path / "file" / "below")
    for call in (
        lambda: filesystem.read(below),
        *writes(below),
        lambda: filesystem.list_names(below),
    ):
        fails(StorageError, call)
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_refused_access_is_forbidden(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "secret.txt").write_bytes(b"kept")
    (locked / "secret.txt").chmod(0)
    locked.chmod(0)
    tmp_path.chmod(0o755)
    path = str(locked / "secret.txt")
    try:
        with unprivileged():
            for call in (
                lambda: filesystem.read(path),
                lambda: filesystem.size(path),
                lambda: filesystem.list_names(str(locked)),
                lambda: list(filesystem.walk(str(locked))),
                lambda: filesystem.check_writable(str(locked)),
                lambda: filesystem.remove(path),
                *writes(path),
            ):
                message = fails(StorageForbidden, call)
                assert str(locked) in message
                assert "access is refused (Permission denied)" in message
    finally:
        locked.chmod(0o755)
    assert os.listdir(locked) == ["secret.txt"]


@pytest.mark.parametrize("path", ["x" * 300, "nul\0byte", "\ud800"], ids=["long", "nul", "bytes"])
def test_an_impossible_name_is_a_storage_error(tmp_path: Path, path: str) -> None:
    fails(StorageError, lambda: filesystem.read(str(tmp_path / path)))


def test_a_long_url_is_shortened_in_messages() -> None:
    url = "data:image/png;base64," + "A" * 5001
    assert len(fails(StorageError, lambda: filesystem.read(url))) < 400


@pytest.mark.parametrize(
    "url",
    ["nosuch://x/y.jpg", "ftp://host/x.jpg", "github://a/b.jpg", "zip://x.jpg", "hdfs://x/y.jpg"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_store_that_cannot_be_used_is_a_storage_error(url: str) -> None:
    protocol = url.partition("://")[0]
    assert f"no file system for {protocol}://" in fails(StorageError, lambda: filesystem.read(url))
    (found,) = image_files.read_ahead([url])
    assert isinstance(found, StorageError)


# ------------------------------------------------------------------ reading and naming


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    folder = str(tmp_path)
    for place in (filesystem.join(folder, name), "file://" + filesystem.join(folder, name)):
        filesystem.write(place, b"one")
        assert os.listdir(folder) == [name]
        assert filesystem.read(place) == b"one"
        assert filesystem.size(place) == 3
        assert filesystem.exists(place)
        assert filesystem.list_names(folder) == [name]
        assert list(filesystem.walk(folder)) == [name]
        assert filesystem.create(place, b"two") is False
        filesystem.remove(place)
        assert filesystem.create(place, b"two") is True
        with filesystem.open_read(place) as stream:
            stream.seek(1)
            assert stream.read() == b"wo"
        filesystem.remove(place)
        assert filesystem.list_names(folder) == []


@settings(max_examples=60)
@given(data=st.binary(max_size=4000))
def test_any_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = str(tmp_path_factory.getbasetemp() / "bytes")
    filesystem.write(path, data)
    assert filesystem.read(path) == data
    quoted = base64.b64encode(data).decode()
    assert filesystem.read(f"data:application/octet-stream;base64,{quoted}") == data


def test_folders_are_listed_sorted_and_without_hidden_or_unfinished_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a-b/1.txt", "a/1.txt", "c.txt", ".hidden/1.txt", "a/.x"):
        filesystem.write(str(tmp_path / name), b"")
    (tmp_path / ".c.txt.0123456789ab.tmp").touch()
    assert list(filesystem.walk(str(tmp_path))) == [
        "a/1.txt", "a-b/1.txt", "b/10.txt", "b/2.txt", "c.txt",
    ]  # fmt: skip
    assert filesystem.list_names(str(tmp_path)) == ["c.txt"]
    assert filesystem.glob(f"{tmp_path}/*/1*.txt") == [
        f"{tmp_path}/a-b/1.txt", f"{tmp_path}/a/1.txt", f"{tmp_path}/b/10.txt",
    ]  # fmt: skip
    assert filesystem.glob(f"{tmp_path}/**/2.txt") == [f"{tmp_path}/b/2.txt"]
    assert filesystem.glob(f"{tmp_path}/*") == [f"{tmp_path}/c.txt"]
    assert filesystem.glob(f"{tmp_path}/none/*") == []


def test_removing_takes_a_file_or_a_folder_and_nothing_next_to_it(tmp_path: Path) -> None:
    for name in ("run/part-1", "run/part-10", "run1/part-1", "run[1]/part-1", "outside/kept"):
        filesystem.write(str(tmp_path / name), b"")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "outside")
    filesystem.remove(str(tmp_path / "run[1]" / "part-1"))
    filesystem.remove(str(tmp_path / "run" / "part-1"))
    assert filesystem.list_names(str(tmp_path / "run")) == ["part-10"]
    assert filesystem.list_names(str(tmp_path / "run1")) == ["part-1"]
    filesystem.remove(str(tmp_path / "run" / "link"))
    assert filesystem.list_names(str(tmp_path / "outside")) == ["kept"]
    filesystem.remove(str(tmp_path / "run"))
    assert sorted(os.listdir(tmp_path)) == ["outside", "run1", "run[1]"]


def test_places_are_joined_without_changing_any_part() -> None:
    assert filesystem.join("a", "b%20", "../c") == "a/b%20/../c"
    assert filesystem.join("s3://bucket/x/", "#?", "y") == "s3://bucket/x/#?/y"
    assert filesystem.join("file:///a", "b") == filesystem.join("file:/a", "b") == "/a/b"
    assert filesystem.absolute("/x/file:a.jpg") == "/x/file:a.jpg"
    assert filesystem.local_path("file:a.jpg") == "file:a.jpg"
    assert filesystem.parent("s3://bucket/x/y.csv") == "s3://bucket/x"
    assert filesystem.parent("/a/b.csv") == "/a"
    assert filesystem.absolute("s3://bucket/x") == "s3://bucket/x"
    assert filesystem.absolute("x") == f"{os.getcwd()}/x"
    urls, paths = ("s3://a", "data:,x"), ("/a", "a:b", "C:/x", "http//x")
    assert all(filesystem.is_url(path) for path in urls)
    assert not any(filesystem.is_url(path) for path in paths)
    assert filesystem.is_local("file:///a")
    assert filesystem.is_local("file:/a")


# ------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("before", [None, b"before"])
def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def broken() -> None:
        with filesystem.open_write(str(path)) as stream:
            stream.write(b"half of it")
            raise KeyError("half")

    with pytest.raises(KeyError):
        broken()
    assert (path.read_bytes() if path.exists() else None) == before
    assert os.listdir(tmp_path) == (["file"] if before else [])


_WRITER = """
import sys
from imgcls.data.storage import filesystem
with filesystem.open_write(sys.argv[1]) as stream:
    while True:
        stream.write(bytes(1 << 16))
        stream.flush()
        print("more", flush=True)
"""


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_killed_writer_leaves_no_half_file(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "out" / "file"
    path.parent.mkdir()
    if before is not None:
        path.write_bytes(before)
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        for _ in range(5):
            assert writer.stdout.readline() == b"more\n"
        writer.send_signal(signal.SIGKILL)
    expected = ["file"] if before else []
    assert filesystem.list_names(str(path.parent)) == expected
    assert list(filesystem.walk(str(path.parent))) == expected
    assert filesystem.glob(f"{path.parent}/*") == [str(path)] * len(expected)
    assert (path.read_bytes() if before else None) == before
    filesystem.write(str(path), b"after")
    assert filesystem.read(str(path)) == b"after"


_RIVAL = """
import os, sys, time
from imgcls.data.storage import filesystem
folder, me, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
filesystem.create(f"{folder}/ready-{me}", b"")
while not os.path.exists(f"{folder}/go"):
    time.sleep(0.001)
print([i for i in range(rounds) if filesystem.create(f"{folder}/prize-{i}", me.encode() * 1000)])
"""


def test_of_eight_rivals_exactly_one_creates_a_file(tmp_path: Path) -> None:
    rivals, rounds = [f"{i}" for i in range(8)], 60
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _RIVAL, str(tmp_path), name, str(rounds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in rivals
    ]
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == len(rivals))
    (tmp_path / "go").touch()
    wins = {
        name: set(eval(process.communicate()[0]))
        for name, process in zip(rivals, processes, strict=True)
    }
    assert Counter(i for won in wins.values() for i in won) == Counter(range(rounds))
    for name, won in wins.items():
        for i in won:
            assert (tmp_path / f"prize-{i}").read_bytes() == name.encode() * 1000


def test_a_folder_can_be_tried_for_writing(tmp_path: Path) -> None:
    filesystem.check_writable(str(tmp_path / "new" / "deep"))
    assert filesystem.list_names(str(tmp_path / "new" / "deep")) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here; needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_reported_and_keeps_its_files(tiny_disk: Path) -> None:
    path, data = str(tiny_disk / "file"), bytes(2 << 20)
    filesystem.write(path, b"before")

    def stream() -> None:
        with filesystem.open_write(path) as out:
            for _ in range(32):
                out.write(bytes(1 << 16))

    for call in (
        lambda: filesystem.write(path, data),
        lambda: filesystem.create(str(tiny_disk / "other"), data),
        stream,
    ):
        message = fails(StorageFull, call)
        assert "no space left; free some" in message
        assert os.listdir(tiny_disk) == ["file"]
    assert filesystem.read(path) == b"before"


# ------------------------------------------------------------------ reading ahead


@settings(max_examples=30)
@given(
    present=st.lists(st.sampled_from(["yes", "missing", "null", "folder"]), max_size=40),
    in_flight=st.integers(1, 8),
)
def test_reading_ahead_keeps_the_order_and_puts_errors_in_their_place(
    tmp_path_factory: pytest.TempPathFactory, present: list[str], in_flight: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "ahead"
    folder.mkdir(exist_ok=True)
    urls: list[str | None] = []
    for i, kind in enumerate(present):
        path = folder / f"{i}-{kind}"
        if kind == "yes":
            path.write_bytes(b"%d" % i)
        elif kind == "folder":
            path.mkdir(exist_ok=True)
        urls.append(None if kind == "null" else str(path))
    found = list(image_files.read_ahead(urls, in_flight))
    assert len(found) == len(present)
    for i, (kind, got) in enumerate(zip(present, found, strict=True)):
        if kind == "yes":
            assert got == b"%d" % i
        else:
            assert type(got) is (StorageError if kind == "folder" else StorageMissing)
    assert [str(e) for k, e in zip(present, found, strict=True) if k == "null"] == [
        "the path is null"
    ] * present.count("null")


def test_reading_ahead_goes_no_further_than_it_was_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    requested = 0

    def urls() -> Iterator[str]:
        nonlocal requested
        for _ in range(1000):
            requested += 1
            yield str(tmp_path / "file")

    reading = image_files.read_ahead(urls(), in_flight=4)
    for taken in range(1, 100):
        next(reading)
        assert requested - taken < 4
    reading.close()  # type: ignore[attr-defined]
    assert requested < 104


class Server(ThreadingHTTPServer):
    """Answers each path with a list of (status, body) of the test; the last one is repeated."""

    daemon_threads = True

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, bytes]]] = {}
        self.requested: Counter[str] = Counter()
        self.meeting: threading.Barrier | None = None
        self.under_way = 0
        self.most_under_way = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.requested[self.path] += 1
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            answers = server.answers.get(self.path, [(404, b"")])
            status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        if server.meeting is not None:
            server.meeting.wait(30)
        with server.lock:
            server.under_way -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A web server that fails on demand; no waiting between attempts."""
    monkeypatch.setattr(retries, "BACKOFF_S", 0.001)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def short_deadline() -> Iterator[None]:
    before = storage_settings.current_settings()
    storage_settings.set_process_settings(storage_settings.StorageConfig(retry_timeout_s=0.5))
    yield
    storage_settings.set_process_settings(before)


def test_reads_ahead_really_are_under_way_together(server: Server) -> None:
    server.answers = {f"/{i}": [(200, b"%d" % i)] for i in range(24)}
    server.meeting = threading.Barrier(4)  # no answer before four requests
    found = list(image_files.read_ahead([f"{server.url}/{i}" for i in range(24)], in_flight=4))
    assert found == [b"%d" % i for i in range(24)]
    assert server.most_under_way == 4


def test_a_passing_fault_is_tried_again(server: Server) -> None:
    server.answers["/x"] = [(503, b""), (429, b""), (500, b""), (200, b"at last")]
    assert filesystem.read(f"{server.url}/x") == b"at last"
    assert server.requested["/x"] == 4


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (503, StorageThrottled, "the store asks for fewer requests"),
        (500, StorageUnavailable, "the store did not answer"),
    ],
)
def test_a_lasting_fault_is_given_up_at_the_deadline(
    server: Server, short_deadline: None, status: int, kind: type[StorageError], message: str
) -> None:
    server.answers["/x"] = [(status, b"")]
    assert message in fails(kind, lambda: filesystem.read(f"{server.url}/x"))
    assert server.requested["/x"] > 2


@pytest.mark.parametrize(
    ("status", "kind"), [(404, StorageMissing), (410, StorageMissing), (403, StorageForbidden)]
)
def test_a_refusal_is_not_tried_again(
    server: Server, status: int, kind: type[StorageError]
) -> None:
    server.answers["/x"] = [(status, b"")]
    assert f"{server.url}/x" in fails(kind, lambda: filesystem.read(f"{server.url}/x"))
    assert server.requested["/x"] == 1


def test_a_server_that_is_gone_is_unavailable(short_deadline: None) -> None:
    with Server() as closed:
        url = closed.url
    fails(StorageUnavailable, lambda: filesystem.read(f"{url}/x"))


def test_only_temporary_files_of_our_own_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.parquet.0123456789ab.tmp").touch()
    foreign = [".backup.tmp", ".a.0123456789.tmp", "a.0123456789ab.tmp", ".0123456789ab.tmp.txt"]
    for name in foreign:
        (tmp_path / name).touch()
    filesystem.remove_temporary_files(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(foreign)
