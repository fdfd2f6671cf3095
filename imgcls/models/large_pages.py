"""Memory in pages of 2 MB for the forward passes of a worker, where the kernel offers them.

They save the CPU look-ups of addresses, which cost more in a virtual machine.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

PAGE_BYTES = 2 << 20
RESERVED_BYTES = 1_000 << 20
"""Address space that is reserved; less than the MALLOC_MMAP_THRESHOLD_ of workers."""
_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_MADV_HUGEPAGE = 14
"""Source: include/uapi/asm-generic/mman-common.h of Linux."""


def reserve_large_pages() -> None:
    """Let the C library take its next memory in large pages.

    A block is marked for them and freed. With the settings of `build_malloc_env` glibc keeps its
    addresses, and uses them next; elsewhere nothing changes. No memory is used before it is
    written, and what the process has already, shared with the process that forked it, is untouched.
    Does nothing where address space is limited or counted, or the pages have another size.
    """
    if not _has_large_pages() or _is_address_space_limited():
        return
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    block = library.malloc(ctypes.c_size_t(RESERVED_BYTES))
    if block is None:
        return
    start = -(-block // PAGE_BYTES) * PAGE_BYTES
    length = (block + RESERVED_BYTES - start) // PAGE_BYTES * PAGE_BYTES
    library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    library.free(ctypes.c_void_p(block))


def _has_large_pages() -> bool:
    """Whether the kernel has pages of 2 MB; with others, a first byte could take 512 MB."""
    return sys.platform == "linux" and _read_number(_PAGE_SIZE) == PAGE_BYTES


def _is_address_space_limited() -> bool:
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    strict = 2  # every reserved byte counts
    return set(limits) != {resource.RLIM_INFINITY} or _read_number(_OVERCOMMIT) in (None, strict)


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
