"""An archive file that many threads read members from, with few requests where it is in a store.

Members that are next to each other are read through aligned blocks, which the threads of a process
share; the next block is read ahead. Members in random order are read alone, as are large ones.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

from imgcls.data.containers.load_cache import LoadCache
from imgcls.data.storage import filesystem
from imgcls.data.storage.range_file import RangeFile, open_ranges
from imgcls.data.storage.storage_settings import current_settings
from imgcls.errors import StorageError

BLOCK_BYTES = 4 << 20
_CACHE_BYTES = 16 * BLOCK_BYTES
"""Maximum size of the blocks that a process keeps, of all its archives."""
_RECENT_BLOCKS = 4
_READ_AHEAD_THREADS = 4


class ArchiveFile:
    """A `RangeFile` whose reads of near parts share requests."""

    def __init__(self, url: str) -> None:
        self._file = open_ranges(url)
        self.url, self.size, self.version = url, self._file.size, self._file.version
        self._is_local = filesystem.is_local(url)
        self._key = (url, self.version, current_settings())
        self._recent: collections.deque[int] = collections.deque(maxlen=_RECENT_BLOCKS)
        self._ahead = -1
        self._lock = threading.Lock()

    @property
    def ranges(self) -> RangeFile:
        """The file without shared blocks, for reading all of it once."""
        return self._file

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`; raises as `RangeFile.read`."""
        if self._is_local:
            return self._file.read(start, end)
        first, last = start // BLOCK_BYTES, max(start, end - 1) // BLOCK_BYTES
        if not self._is_near(first) or last > first + 1:
            return self._file.read(start, end)
        self._read_ahead(last + 1)
        pieces = []
        for block in range(first, last + 1):
            at = block * BLOCK_BYTES
            pieces.append(self._load(block)[max(0, start - at) : end - at])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _is_near(self, block: int) -> bool:
        """Whether a read is in or next to a block of the last reads."""
        with self._lock:
            near = any(abs(block - other) <= 1 for other in self._recent)
            if block not in self._recent:
                self._recent.append(block)
            return near

    def _load(self, block: int) -> bytes:
        start = block * BLOCK_BYTES
        end = min(self.size, start + BLOCK_BYTES)
        return _blocks.get((self._key, block), lambda: self._file.read(start, end))

    def _read_ahead(self, block: int) -> None:
        with self._lock:
            if block <= self._ahead or block * BLOCK_BYTES >= self.size:
                return
            self._ahead = block
        _pool.submit(self._load_quietly, block)

    def _load_quietly(self, block: int) -> None:
        with contextlib.suppress(StorageError):  # the read that needs the block raises it
            self._load(block)


_blocks: LoadCache[bytes] = LoadCache(_CACHE_BYTES, len)
_pool = ThreadPoolExecutor(_READ_AHEAD_THREADS, thread_name_prefix="archive")
