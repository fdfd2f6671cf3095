"""Memory in pages of 2 MB for the forward passes of a worker, where the kernel offers them.

They save the CPU look-ups of addresses, which cost more in a virtual machine.
"""

from __future__ import annotations

import ctypes
import sys

PAGE_BYTES = 2 << 20
RESERVED_BYTES = 1_000 << 20
"""Address space that is reserved; less than the MALLOC_MMAP_THRESHOLD_ of workers."""
_MADV_HUGEPAGE = 14
"""Source: include/uapi/asm-generic/mman-common.h of Linux."""


def reserve_large_pages() -> None:
    """Let the C library take its next memory in large pages.

    A block is marked for them and freed. With the settings of `build_malloc_env` glibc keeps its
    addresses, and uses them next; elsewhere nothing changes. No memory is used before it is
    written, and what the process has already, shared with the process that forked it, is untouched.
    """
    if sys.platform != "linux":
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
