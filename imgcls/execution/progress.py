"""What a person sees while a run goes on: a live bar on a terminal, lines in a job log."""

from __future__ import annotations

import collections
import sys
import time
from typing import Any, TextIO

from imgcls.execution.messages import ChunkResult, StageTimings
from imgcls.log import is_json, tell
from imgcls.runs.schema import OK

_WINDOW_SECONDS = 30.0


class Progress:
    """Counts finished chunks and reports: rows, images/s, errors, time left, the slowest stage.

    The rate is that of the last half minute, so that start-up does not weigh on the estimate.
    """

    def __init__(self, total: int, done: int, every: float, stream: TextIO | None = None) -> None:
        self._total = total
        self._done = done
        self._status: collections.Counter[str] = collections.Counter()
        self._every = every
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty() and not is_json()
        self._spent = StageTimings()
        self._recent = [(time.monotonic(), done, 0.0)]
        self._workers: dict[str, float] = {}  # until when each counts as there
        self._began = self._recent[0][0]
        self._steady_from: float | None = None
        self._steady_workers: set[str] = set()
        self._steady_rows = 0
        self._said = time.monotonic()

    def add(self, done: ChunkResult) -> None:
        """Note a chunk; says something when it is time to."""
        self._done += done.rows
        self._status.update(done.status)
        self._spent = self._spent.plus(done.timings)
        now = time.monotonic()
        if self._steady_from is None and done.worker in self._workers:
            self._steady_from = now
        if done.worker in self._steady_workers:
            self._steady_rows += done.rows
        elif self._steady_from is not None:  # its work on this chunk began before
            self._steady_workers.add(done.worker)
        stages = done.timings.seconds() | {"gpu": 0.0}
        self._workers[done.worker] = now + max(_WINDOW_SECONDS, 2 * sum(stages.values()))
        self._recent.append((now, self._done, self._spent.gpu))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_SECONDS:
            self._recent.pop(0)
        if now - self._said >= (0.2 if self._live else self._every):
            self._report(now)

    def tick(self) -> None:
        """Say something when nothing has come for a while, so that waiting is not silence."""
        now = time.monotonic()
        if now - self._said >= max(1.0, self._every):
            self._report(now)

    def close(self) -> None:
        """End the live bar's line."""
        if self._live:
            self._report(time.monotonic())
            self._stream.write("\n")
            self._stream.flush()

    @property
    def timings(self) -> StageTimings:
        """Time spent in each stage, over all workers."""
        return self._spent

    @property
    def steady_rate(self) -> float | None:
        """Images per second from a worker's second chunk on: what start-up does not weigh on.

        The first chunk that each worker finishes from then on is not counted, for most of the work
        on it was done before: two workers that finish at the same moment are no high rate.
        """
        if self._steady_from is None or not self._steady_rows:
            return None
        seconds = self._recent[-1][0] - self._steady_from
        return self._steady_rows / seconds if seconds > 0 else None

    @property
    def rate(self) -> float:
        """Images per second of late; falls while nothing comes for longer than that.

        While that includes the start of the workers it is the steady rate, once that is known.
        """
        steady = self.steady_rate
        if self._recent[0][0] == self._began and steady is not None:
            return steady
        (start, before, _), (last, after, _) = self._recent[0], self._recent[-1]
        now = time.monotonic()
        end = now if now - last > max(_WINDOW_SECONDS, last - start) else last
        return (after - before) / (end - start) if end > start else 0.0

    @property
    def workers(self) -> int:
        """Workers that have done a chunk of late: one that was lost or replaced is none."""
        now = time.monotonic()
        return sum(1 for until in self._workers.values() if until >= now)

    @property
    def gpu_busy(self) -> float:
        """Share of late that the workers' GPUs were at forward passes; 0 without GPUs."""
        (start, _, before), (now, _, after) = self._recent[0], self._recent[-1]
        spent = (now - start) * self.workers
        return min(1.0, (after - before) / spent) if spent > 0 else 0.0

    @property
    def errors(self) -> int:
        """Rows of this driver's that are not ok."""
        return self._status.total() - self._status[OK]

    @property
    def seconds_left(self) -> float | None:
        return (self._total - self._done) / self.rate if self.rate else None

    def snapshot(self) -> dict[str, Any]:
        """How far the run is, for machines."""
        return {
            "rows_done": self._done,
            "rows": self._total,
            "images_per_second": round(self.rate, 2),
            "seconds_left": self.seconds_left and round(self.seconds_left, 1),
            "status": dict(sorted(self._status.items())),
            "workers": self.workers,
            "gpu_busy": round(self.gpu_busy, 3) if self._spent.gpu else None,
            "stage_seconds": {k: round(v, 3) for k, v in self._spent.seconds().items()},
        }

    def format_line(self) -> str:
        """One line that tells how far the run is."""
        if len(self._recent) == 1:
            waited = format_duration(time.monotonic() - self._recent[0][0])
            return f"{self._done:,}/{self._total:,} rows  starting workers ({waited})"
        share = self._done / self._total if self._total else 1.0
        left = self.seconds_left
        parts = [
            f"{self._done:,}/{self._total:,} rows ({share:.1%})",
            f"{self.rate:,.1f} images/s",
            f"{self.errors:,} errors",
        ]
        if left is not None:
            parts.append(f"ETA {format_duration(left)}")
        if self._spent.gpu:
            parts.append(f"GPU busy {self.gpu_busy:.0%}")
        stages = self._spent.seconds() | {"gpu": 0.0}
        spent = {name: value for name, value in stages.items() if value > 0}
        if spent:
            slowest = max(spent, key=lambda name: spent[name])
            parts.append(
                f"bottleneck {slowest} ({spent[slowest] / sum(spent.values()):.0%} of time)"
            )
        return "  ".join(parts)

    def _report(self, now: float) -> None:
        self._said = now
        if not self._live:
            tell(
                "labelling",
                self.format_line(),
                self._stream,
                **(self.snapshot() if is_json() else {}),
            )
            return
        width = 24
        filled = int(width * self._done / self._total) if self._total else width
        bar = "#" * filled + "." * (width - filled)
        self._stream.write(f"\r[{bar}] {self.format_line()}\x1b[K")
        self._stream.flush()


def format_duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
