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
import sys
from imgcls.models.large_pages import reserve_large_pages

def measure(name):
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) // 1024

before = measure("Rss:")
if "reserve" in sys.argv:
    reserve_large_pages()
    reserve_large_pages()
reserved = measure("Rss:") - before
written = b'1' * (64 << 20)  # NumPy asks for large pages itself
print(reserved, measure("AnonHugePages:"))
"""


def run(word: str, settings: dict[str, str]) -> tuple[int, int]:
    """MB that a reservation takes, and MB in large pages once 64 MB were written."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, word],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    reserved, large = map(int, done.stdout.split())
    return reserved, large


@pytest.mark.skipif(
    not KERNEL.is_file() or "[madvise]" not in KERNEL.read_text(),
    reason="the kernel has no large pages, or takes them without being asked",
)
def test_memory_is_in_large_pages_where_it_was_reserved_and_is_kept() -> None:
    reserved, large = run("reserve", MALLOC_SETTINGS)
    assert reserved < 8
    assert large > 32
    assert run("plain", MALLOC_SETTINGS)[1] < 8
    assert run("reserve", {})[0] < 8
