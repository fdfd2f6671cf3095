"""Images on a disk: read no further than allowed, never waited for, created exclusively."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls.data import image_files
from imgcls.data.storage import disk, filesystem
from imgcls.data.storage.readahead import ReadAllowance
from imgcls.errors import (
    OutputLocked,
    StorageError,
    StorageForbidden,
    StorageMissing,
    StorageTooLarge,
)
from imgcls.runs.lease import Lease
from tests.data.storage.test_filesystem import unprivileged


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def bound_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return path


def linked(path: Path) -> Path:
    path.symlink_to(path)
    return path


def locked(path: Path) -> Path:
    path.write_bytes(b"secret")
    path.chmod(0)
    return path


def sparse(path: Path) -> Path:
    with path.open("wb") as stream:
        stream.truncate(10 << 30)
    return path


NO_IMAGES: dict[str, tuple[Callable[[Path], Path], type[StorageError], str, str]] = {
    "fifo": (fifo, StorageError, "unreadable", "is a FIFO, not a regular file"),
    "socket": (bound_socket, StorageError, "unreadable", "is a socket, not a regular file"),
    "zero": (
        lambda _: Path("/dev/zero"), StorageError, "unreadable",
        "is a character device, not a regular file",
    ),
    "random": (
        lambda _: Path("/dev/random"), StorageError, "unreadable",
        "is a character device, not a regular file",
    ),
    "folder": (lambda path: path.parent, StorageError, "unreadable", "is a folder, not a file"),
    "loop": (linked, StorageError, "unreadable", "Too many levels of symbolic links"),
    "locked": (locked, StorageForbidden, "forbidden", "access is refused (Permission denied)"),
    "sparse": (
        sparse, StorageTooLarge, "too_large",
        "has 10,737,418,240 bytes, more than the limit of 1,000; raise max_bytes to read it",
    ),
    "kcore": (lambda _: Path("/proc/kcore"), StorageTooLarge, "too_large", "the limit of 1,000"),
    "long": (
        lambda path: path.parent / ("x" * 300), StorageError, "unreadable", "File name too long",
    ),
    "gone": (lambda path: path, StorageMissing, "missing", "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_file_is_one_error_at_once(tmp_path: Path, name: str) -> None:
    make, kind, status, words = NO_IMAGES[name]
    tmp_path.chmod(0o755)
    path = make(tmp_path / "image.jpg")
    good = tmp_path / "good.jpg"
    good.write_bytes(b"good")
    good.chmod(0o644)
    if name == "kcore" and not path.exists():
        pytest.skip("no /proc/kcore here")
    with unprivileged() if name == "locked" else contextlib.nullcontext():
        with pytest.raises(StorageError) as caught:
            image_files.read_image(str(path), max_bytes=1000)
        assert type(caught.value) is kind
        assert caught.value.status == status
        assert str(path) in str(caught.value) or len(str(path)) > 300
        assert words in str(caught.value)
        first, second = image_files.read_ahead([str(path), str(good)], max_bytes=1000)
    assert type(first) is kind
    assert second == b"good" or name == "locked"


def test_a_file_of_just_the_limit_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    for size in (0, 1, 999, 1000):
        (tmp_path / "file").write_bytes(b"x" * size)
        assert image_files.read_image(str(tmp_path / "file"), max_bytes=1000) == b"x" * size
    (tmp_path / "file").write_bytes(b"x" * 1001)
    with pytest.raises(StorageTooLarge, match="has 1,001 bytes"):
        image_files.read_image(str(tmp_path / "file"), max_bytes=1000)


def test_a_file_whose_size_is_not_known_before_is_counted_as_it_is_read() -> None:
    """Those in /proc have content, and 0 bytes."""
    path = "/proc/self/maps"
    assert os.stat(path).st_size == 0
    assert b"/" in image_files.read_image(path)
    with pytest.raises(StorageTooLarge, match="has more bytes than the limit of 100"):
        image_files.read_image(path, max_bytes=100)


def test_a_file_that_grows_while_it_is_read_is_cut_off_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.jpg"
    path.write_bytes(b"x" * 10)
    took = 0

    def growing(file: int, size: int) -> bytes:
        nonlocal took
        with path.open("ab") as stream:
            stream.write(b"y" * (1 << 20))
        data = real(file, size)
        took += len(data)
        return data

    real = os.read
    monkeypatch.setattr(os, "read", growing)
    with pytest.raises(StorageTooLarge):
        disk.read_local_file(str(path), ReadAllowance(5 << 20))
    assert took <= 7 << 20


@pytest.mark.parametrize("name", [b"\xff\xfe.jpg", b"caf\xe9.jpg"])
def test_a_name_that_is_not_utf8_is_a_row_that_is_missing(tmp_path: Path, name: bytes) -> None:
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"x")
    (listed,) = filesystem.walk(str(tmp_path))
    assert listed == name.decode("utf-8", "replace")
    assert [
        f.path for page in filesystem.iter_pages(str(tmp_path), deep=True) for f in page.files
    ] == [f"{tmp_path}/{listed}"]
    assert filesystem.list_names(str(tmp_path)) == [listed]
    (found,) = image_files.read_ahead([f"{tmp_path}/{listed}"])
    assert isinstance(found, StorageMissing)


def test_a_long_name_of_wide_letters_can_be_written(tmp_path: Path) -> None:
    path = str(tmp_path / ("猫" * 80 + ".txt"))
    filesystem.write(path, b"one")
    assert filesystem.create(path, b"two") is False
    assert filesystem.read(path) == b"one"


# ------------------------------------------------------------------ without hard links


@pytest.fixture(params=["EPERM", "ENOSYS", "EOPNOTSUPP"])
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system whose link(2) fails, as SMB, exFAT and FUSE object stores have it."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(getattr(errno, request.param), os.strerror(getattr(errno, request.param)))

    monkeypatch.setattr(os, "link", refused)
    return str(request.param)


def test_without_hard_links_a_file_is_created_once_and_whole(tmp_path: Path, no_links: str) -> None:
    path = tmp_path / "lease" / "000001.json"
    assert filesystem.create(str(path), b"first") is True
    assert filesystem.create(str(path), b"second") is False
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["000001.json"]


def test_without_hard_links_one_driver_has_the_output(tmp_path: Path, no_links: str) -> None:
    lease = Lease.acquire(str(tmp_path), 1.0)
    with pytest.raises(OutputLocked):
        Lease.acquire(str(tmp_path), 1.0)
    lease.release()
    Lease.acquire(str(tmp_path), 1.0).release()


def test_a_lease_left_empty_by_a_killed_driver_is_taken_over(tmp_path: Path, no_links: str) -> None:
    record = tmp_path / "_lease" / "000001.json"
    record.parent.mkdir()
    record.touch()
    Lease.acquire(str(tmp_path), 0.5).release()


_RIVAL = """
import errno, os, sys, time
from imgcls.data.storage import filesystem
def refused(*_, **__):
    raise OSError(errno.EOPNOTSUPP, "no links")
os.link = refused
folder, me = sys.argv[1:]
filesystem.write(f"{folder}/ready-{me}", b"")
while not os.path.exists(f"{folder}/go"):
    time.sleep(0.001)
print([i for i in range(200) if filesystem.create(f"{folder}/prize-{i}", me.encode() * 1000)])
"""


def test_without_hard_links_of_four_rivals_exactly_one_creates_a_file(tmp_path: Path) -> None:
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", _RIVAL, str(tmp_path), str(me)],
            stdout=subprocess.PIPE, text=True,
        )
        for me in range(4)
    ]  # fmt: skip
    waited = threading.Event()
    while len(list(tmp_path.glob("ready-*"))) < 4:
        waited.wait(0.01)
    (tmp_path / "go").touch()
    won = [eval(rival.communicate()[0]) for rival in rivals]
    assert sorted(i for each in won for i in each) == list(range(200))
    for me, prizes in enumerate(won):
        for i in prizes:
            assert (tmp_path / f"prize-{i}").read_bytes() == str(me).encode() * 1000
