"""One pass over the shards of a fetch: many reads at a time, shards written as they complete.

Reads run ahead into the next shards, so that a slow host delays its own shard only. Images wait in
an unnamed temporary file per shard, so memory is bounded, and a killed pass leaves none behind.
"""

from __future__ import annotations

import enum
import os
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from imgcls.curation.fetched_images import FetchedImage
from imgcls.curation.inspector import ImageInspector
from imgcls.curation.scan import HeldOutput
from imgcls.curation.shards import FetchedRow, ShardStore
from imgcls.data.image_pool import ImagePool
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import OK, ImageError, StorageError
from imgcls.execution.messages import ChunkResult, ChunkTask, StageTimings
from imgcls.execution.progress import Progress

MAX_OPEN_SHARDS = 8
"""Maximum number of shards that are fetched or written at a time."""
_POLL_S = 0.2
_REPORT_S = 1.0


@dataclass(frozen=True)
class ShardTask:
    """A shard to fetch.

    rows:     manifest rows, with absolute paths
    start:    manifest row of the first
    previous: results of an earlier pass, one per row; only failed rows are fetched then
    """

    shard: int
    rows: pa.Table
    start: int
    path_column: str
    previous: Sequence[FetchedImage] | None = None


class _ImageSpool:
    """Image files in an unnamed temporary file; thread-safe.

    It is on the disk of a local output, else in the folder for temporary files.
    """

    def __init__(self, output: str) -> None:
        self._output = output
        folder = filesystem.local_path(output) if filesystem.is_local(output) else None
        with filesystem.translate_os_errors(output):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by `close`
        self._end = 0
        self._lock = threading.Lock()

    def add(self, data: bytes) -> tuple[int, int]:
        """Store a file; returns its place for `read`."""
        with self._lock:
            start = self._end
            self._end += len(data)
        with filesystem.translate_os_errors(self._output):
            written = 0
            while written < len(data):
                view = memoryview(data)[written:]
                written += os.pwrite(self._file.fileno(), view, start + written)
        return start, len(data)

    def read(self, place: tuple[int, int]) -> bytes:
        start, length = place
        with filesystem.translate_os_errors(self._output):
            return os.pread(self._file.fileno(), length, start)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class _Result:
    """Result of one URL; place: of an ok image in the spool."""

    image: FetchedImage
    place: tuple[int, int] | None


class _Kept(enum.Enum):
    """Stands for the URL of a row that is not fetched again."""

    KEPT = 0


@dataclass(frozen=True)
class _Read:
    """A URL of a shard to read."""

    shard: int
    url: str | None


class _OpenShard:
    """A shard that is being fetched. A URL that several rows have is read once."""

    def __init__(self, task: ShardTask, output: str) -> None:
        self.task = task
        self.spool = _ImageSpool(output)
        paths: list[str | None] = task.rows.column(task.path_column).to_pylist()
        self._urls: list[str | _Kept | None] = [
            path if task.previous is None or task.previous[index].status != OK else _Kept.KEPT
            for index, path in enumerate(paths)
        ]
        fetched = (url for url in self._urls if not isinstance(url, _Kept))
        self.row_counts: Counter[str | None] = Counter(fetched)
        """Rows by URL to read."""
        self._results: dict[str | None, _Result] = {}

    @property
    def is_complete(self) -> bool:
        return len(self._results) == len(self.row_counts)

    def add(self, url: str | None, result: _Result) -> None:
        self._results[url] = result

    def iter_rows(self, kept: Iterator[bytes]) -> Iterator[FetchedRow]:
        """The results of all rows in order.

        kept: the bytes of the rows that were ok in an earlier pass
        """
        for index, url in enumerate(self._urls):
            if isinstance(url, _Kept):
                assert self.task.previous is not None
                yield self.task.previous[index], next(kept)
                continue
            result = self._results[url]
            yield result.image, None if result.place is None else self.spool.read(result.place)

    def count_statuses(self) -> Counter[str]:
        """All rows by status."""
        kept = sum(isinstance(url, _Kept) for url in self._urls)
        counts = Counter({OK: kept} if kept else {})
        for url, rows in self.row_counts.items():
            counts[self._results[url].image.status] += rows
        return counts


class FetchPass:
    """Fetches shards and writes them; one pass.

    tasks:                the shards, in any order
    in_flight, max_bytes: see `ImagePool`
    """

    def __init__(
        self,
        store: ShardStore,
        output: HeldOutput,
        tasks: Iterator[ShardTask],
        *,
        in_flight: int,
        max_bytes: int,
        max_pixels: int,
    ) -> None:
        self._store, self._output, self._tasks = store, output, tasks
        self._in_flight, self._max_bytes = in_flight, max_bytes
        self._inspector = ImageInspector(max_pixels)
        self._open: dict[int, _OpenShard] = {}
        self._unread: Iterator[_Read] = iter(())
        self._has_more_tasks = True
        self._writing: deque[tuple[_OpenShard, Future[None]]] = deque()
        self._counts: dict[int, Counter[str]] = {}
        self._unreported: Counter[str] = Counter()
        self._reported_at = time.monotonic()

    def run(self, progress: Progress) -> dict[int, Counter[str]]:
        """Fetch all tasks; returns the rows by status of each shard.

        Raises StorageError, RunFailed when the lease was lost, and Interrupted.
        """
        writer = create_thread_pool(1, "write")
        try:
            with (
                self._inspector,
                ImagePool(self._process, self._in_flight, self._max_bytes) as pool,
            ):
                while self._step(pool, writer):
                    self._output.interruption.check()
                    self._take_result(pool)
                    self._report(progress)
                self._report(progress, at_once=True)
        finally:
            writer.shutdown(wait=True, cancel_futures=True)
        return self._counts

    def _step(self, pool: ImagePool[_Read, _Result], writer: ThreadPoolExecutor) -> bool:
        """Start reads, write complete shards; returns whether there is more to do."""
        while not pool.is_full and (read := self._next_read()) is not None:
            pool.submit(read, read.url)
        for number, shard in list(self._open.items()):
            if shard.is_complete:
                del self._open[number]
                self._writing.append((shard, writer.submit(self._write, shard)))
        while self._writing and (self._writing[0][1].done() or not pool.num_pending):
            shard, writing = self._writing.popleft()
            writing.result()
            shard.spool.close()
            self._counts[shard.task.shard] = shard.count_statuses()
        return bool(pool.num_pending or self._has_more_tasks)

    def _next_read(self) -> _Read | None:
        """The next URL to read; None at the end, and while too many shards are open."""
        while (read := next(self._unread, None)) is None:
            if len(self._open) + len(self._writing) >= MAX_OPEN_SHARDS:
                return None
            task = next(self._tasks, None)
            if task is None:
                self._has_more_tasks = False
                return None
            shard = _OpenShard(task, self._output.url)
            self._open[task.shard] = shard
            self._unread = iter([_Read(task.shard, url) for url in shard.row_counts])
        return read

    def _take_result(self, pool: ImagePool[_Read, _Result]) -> None:
        taken = pool.take(_POLL_S) if pool.num_pending else None
        if taken is not None:
            read, result = taken
            shard = self._open[read.shard]
            shard.add(read.url, result)
            self._unreported[result.image.status] += shard.row_counts[read.url]

    def _report(self, progress: Progress, *, at_once: bool = False) -> None:
        """Add the results of a second to the progress; single ones would give no steady rate."""
        now = time.monotonic()
        if now - self._reported_at < _REPORT_S and not at_once:
            return
        self._reported_at = now
        if not self._unreported:
            progress.tick()
            return
        rows, status = self._unreported.total(), dict(self._unreported)
        self._unreported.clear()
        progress.add(ChunkResult(ChunkTask(0), rows, status, StageTimings(), "fetch"))

    def _process(self, read: _Read, outcome: bytes | StorageError | ImageError) -> _Result:
        image = self._inspector.inspect(outcome)
        if image.status != OK or not isinstance(outcome, bytes):
            return _Result(image, None)
        return _Result(image, self._open[read.shard].spool.add(outcome))

    def _write(self, shard: _OpenShard) -> None:
        task = shard.task
        kept = iter(()) if task.previous is None else self._store.iter_images(task.shard)
        self._output.lease.check()
        self._store.write(task.shard, task.rows, task.start, shard.iter_rows(kept))
