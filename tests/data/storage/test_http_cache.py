"""The cache of images from web servers: whole entries, of the right URL, or none."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from imgcls.data.storage.http_cache import CachedImage, HttpCache
from imgcls.data.storage.readahead import ReadAllowance
from imgcls.errors import StorageTooLarge

URL = "https://example.com/a%2Fb.jpg?sig=1"
DATA = bytes(range(256)) * 400
ANY = ReadAllowance(1_000_000)


def find_entry(folder: Path) -> Path:
    (entry,) = (path for path in folder.rglob("*") if path.is_file())
    return entry


def test_an_entry_is_read_back_with_its_headers_and_only_for_its_url(tmp_path: Path) -> None:
    cache = HttpCache(str(tmp_path / "cache"))
    assert cache.read(URL, ANY) is None
    cache.write(URL, DATA, ["noindex"])
    assert HttpCache(str(tmp_path / "cache")).read(URL, ANY) == CachedImage(DATA, ("noindex",))
    assert cache.read(URL.replace("%2F", "/"), ANY) is None
    entry = find_entry(tmp_path)
    entry.write_bytes(entry.read_bytes().replace(b"sig=1", b"sig=2"))
    assert cache.read(URL, ANY) is None


@pytest.mark.parametrize("keep", [0, 5, 30, 150, -1])
def test_an_entry_that_is_cut_off_counts_as_absent(tmp_path: Path, keep: int) -> None:
    cache = HttpCache(str(tmp_path))
    cache.write(URL, DATA, [])
    entry = find_entry(tmp_path)
    entry.write_bytes(entry.read_bytes()[:keep])
    assert cache.read(URL, ANY) is None
    cache.write(URL, DATA, [])
    assert cache.read(URL, ANY) == CachedImage(DATA, ())


@pytest.mark.parametrize("place", [0, 25, -1, -50_000])
def test_an_entry_with_a_changed_byte_counts_as_absent(tmp_path: Path, place: int) -> None:
    cache = HttpCache(str(tmp_path))
    cache.write(URL, DATA, [])
    entry = find_entry(tmp_path)
    content = bytearray(entry.read_bytes())
    content[place] ^= 1
    entry.write_bytes(content)
    assert cache.read(URL, ANY) is None


def test_an_entry_with_more_bytes_counts_as_absent(tmp_path: Path) -> None:
    cache = HttpCache(str(tmp_path))
    cache.write(URL, DATA, [])
    with find_entry(tmp_path).open("ab") as stream:
        stream.write(b"x")
    assert cache.read(URL, ANY) is None


def test_the_limit_of_a_read_holds_for_the_cache(tmp_path: Path) -> None:
    cache = HttpCache(str(tmp_path))
    cache.write(URL, DATA, [])
    with pytest.raises(StorageTooLarge, match=f"has {len(DATA):,} bytes, more than the limit"):
        cache.read(URL, ReadAllowance(len(DATA) - 1))


def test_a_cache_that_cannot_be_used_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = HttpCache(str(tmp_path / "file"))  # a file in place of the folder
    with caplog.at_level(logging.WARNING, "imgcls.data"):
        for _ in range(2):
            cache.write(URL, DATA, [])
            assert cache.read(URL, ANY) is None
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage()


def _write_and_read(folder: str, seed: int) -> int:
    """Write other bytes to the same URL again and again; every read is of one writer, whole."""
    cache = HttpCache(folder)
    found = 0
    for _ in range(50):
        cache.write(URL, bytes([seed]) * 20_000, [])
        image = cache.read(URL, ANY)
        found += image is not None and image.data in (b"\1" * 20_000, b"\2" * 20_000)
    return found


def test_two_processes_may_write_one_entry(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        results = list(pool.map(_write_and_read, [str(tmp_path)] * 2, [1, 2]))
    assert results == [50, 50]
    assert len(os.listdir(find_entry(tmp_path).parent)) == 1
