"""A worker takes its memory in large pages, if its allocator keeps what is freed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imgcls.cluster.worker_forks import MALLOC_SETTINGS

KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import ctypes, mmap, resource, sys
from imgcls.models.large_pages import reserve_large_pages

def measure(name):
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) // 1024

size = 64 << 20
if "kernel" in sys.argv:
    given = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    given.madvise(mmap.MADV_HUGEPAGE)
    given.write(bytes(size))
if "limited" in sys.argv:
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
before = measure("Rss:")
if "reserve" in sys.argv:
    reserve_large_pages()
    reserve_large_pages()
reserved = measure("Rss:") - before
if "kernel" not in sys.argv:
    written = b"1" * size  # NumPy asks for large pages itself
print(reserved, measure("AnonHugePages:"))
"""


def run(*words: str, **settings: str) -> tuple[int, int]:
    """MB that a reservation takes, and MB in large pages once 64 MB were written."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        env=environment | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    reserved, large = map(int, done.stdout.split())
    return reserved, large


def test_memory_is_in_large_pages_where_it_was_reserved_and_is_kept() -> None:
    if not KERNEL.is_file() or "[madvise]" not in KERNEL.read_text() or run("kernel")[1] < 48:
        pytest.skip("the kernel gives no large pages, or gives them without being asked")
    reserved, large = run("reserve", **MALLOC_SETTINGS)
    assert reserved < 8
    assert large > 32
    for words in ((), ("reserve", "limited")):
        assert run(*words, **MALLOC_SETTINGS)[1] < 8
    assert run("reserve")[0] < 8
