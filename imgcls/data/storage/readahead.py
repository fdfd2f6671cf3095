"""Byte budget of reads that run ahead of their consumer.

Each read reserves the bytes it is about to hold before it takes memory for them, and keeps them
until the consumer has finished with its result. The oldest read is always admitted, whatever the
others hold, so that results which are consumed in order cannot block each other.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

from imgcls.data.storage.error_details import shorten_url
from imgcls.errors import StorageTooLarge


class ByteBudget:
    """At most `size` bytes held by all reads together, the oldest one not counted.

    Reads are numbered 0, 1, 2 ... in the order in which their results are consumed. With a limit of
    M bytes per read, at most `size` + M bytes are held.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: dict[int, int] = {}
        self._waiting: dict[int, tuple[int, Future[None]]] = {}
        self._oldest = 0
        self._closed = False
        self._lock = threading.Lock()

    def try_reserve(self, read: int, total: int) -> bool:
        """Reserve `total` bytes for a read, including what it holds already; False if it must wait.

        Does not block. A read that holds as many bytes or more never waits.
        """
        with self._lock:
            held = self._held.get(read, 0)
            taken = self._try_take(read, total)
            if total < held:
                self._admit_waiting()
            return taken

    def reserve_later(self, read: int, total: int) -> Future[None]:
        """A future that is done once `total` bytes are reserved for a read."""
        admitted: Future[None] = Future()
        with self._lock:
            if self._closed:
                admitted.cancel()
            elif self._try_take(read, total):
                admitted.set_result(None)
            else:
                self._waiting[read] = (total, admitted)
        return admitted

    def release(self, read: int) -> None:
        """Free the bytes of a read that must start again."""
        with self._lock:
            self._held.pop(read, None)
            self._admit_waiting()

    def release_oldest(self) -> None:
        """Free the bytes of the oldest read, after its result was consumed."""
        with self._lock:
            self._held.pop(self._oldest, None)
            self._oldest += 1
            self._admit_waiting()

    def close(self) -> None:
        """Cancel the reads that wait, and all that would have to wait."""
        with self._lock:
            self._closed = True
            for _, admitted in self._waiting.values():
                admitted.cancel()
            self._waiting.clear()

    def _admit_waiting(self) -> None:
        for waiting in sorted(self._waiting):
            total, admitted = self._waiting[waiting]
            if self._try_take(waiting, total):
                del self._waiting[waiting]
                if admitted.set_running_or_notify_cancel():
                    admitted.set_result(None)

    def _try_take(self, read: int, total: int) -> bool:
        held = self._held.get(read, 0)
        others = sum(self._held.values()) - held
        if total > held and read > self._oldest and others + total > self._size:
            return False
        self._held[read] = total
        return True


class BudgetFull(Exception):
    """A read must wait until `total` bytes can be reserved for it."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.total = total


class ReadAllowance:
    """Limit of one read: at most `max_bytes`, reserved from a shared budget if there is one.

    max_bytes: None for the package's own files, which have no limit
    """

    def __init__(
        self, max_bytes: int | None, budget: ByteBudget | None = None, read: int = 0
    ) -> None:
        self.max_bytes = max_bytes
        self._budget = budget
        self._read = read
        self._admitted = 0

    @property
    def is_for_image(self) -> bool:
        """Whether it is for an image: all other files have no limit."""
        return self.max_bytes is not None

    def is_exceeded_by(self, size: int) -> bool:
        return self.max_bytes is not None and size > self.max_bytes

    def reserve(self, total: int, needed: int | None = None) -> None:
        """Reserve bytes before they are read; raises BudgetFull where other reads hold too many.

        needed: bytes to wait for in that case, if not `total`; the read then holds none

        Bytes that the read has waited for stay reserved until `shrink_to`. Otherwise others could
        take them, and the read would wait and start again for the same bytes.
        """
        total = max(total, self._admitted)
        if self._budget is not None and not self._budget.try_reserve(self._read, total):
            self.release()
            raise BudgetFull(total if needed is None else needed)

    def reserve_later(self, total: int) -> Future[None]:
        """A future that is done once `total` bytes are reserved."""
        assert self._budget is not None
        self._admitted = total
        return self._budget.reserve_later(self._read, total)

    def shrink_to(self, total: int) -> None:
        """Free the bytes reserved beyond the `total` bytes of the whole file."""
        self._admitted = 0
        self.reserve(total)

    def release(self) -> None:
        """Free the bytes of a read that has failed or must start again."""
        self._admitted = 0
        if self._budget is not None:
            self._budget.release(self._read)


UNLIMITED = ReadAllowance(None)


class BodyBuffer:
    """Buffer of a file that arrives in pieces, within its allowance; cleared when reading fails.

    It is cleared because an exception keeps its frames, and with them the pieces, alive.
    """

    def __init__(self, url: str, allowance: ReadAllowance, length: int | None) -> None:
        """length: minimum size in bytes, where known

        Raises StorageTooLarge for more than is allowed, and BudgetFull.
        """
        self._url, self._allowance, self._length = url, allowance, length
        self._parts: list[bytes] = []
        self._total = 0
        if length is not None:
            if allowance.is_exceeded_by(length):
                raise too_large_error(url, allowance.max_bytes, length)
            allowance.reserve(length)

    def __enter__(self) -> BodyBuffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._parts.clear()
        if kind is not None:
            self._allowance.release()

    def append(self, part: bytes) -> None:
        """Add a piece; raises StorageTooLarge and BudgetFull."""
        self._total += len(part)
        limit = self._allowance.max_bytes
        if self._allowance.is_exceeded_by(self._total):
            raise too_large_error(self._url, limit)
        if self._length is None or self._total > self._length:
            # the rest is of unknown size: a new start needs room for the maximum
            self._allowance.reserve(self._total, limit)
        self._parts.append(part)

    def join(self) -> bytes:
        """The whole file."""
        self._allowance.shrink_to(self._total)
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


def too_large_error(url: str, limit: int | None, size: int | None = None) -> StorageTooLarge:
    """The error of a file with more than `limit` bytes; size: its bytes, where known."""
    found = f"has {size:,} bytes, more" if size is not None else "has more bytes"
    return StorageTooLarge(
        f"{shorten_url(url)}: {found} than the limit of {limit:,}; raise max_bytes to read it"
    )
