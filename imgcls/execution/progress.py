"""Progress of a run for its user: a live bar on a terminal, lines in a job log."""

from __future__ import annotations

import collections
import time
from typing import Any, TextIO

from imgcls import log
from imgcls.errors import OK
from imgcls.execution.messages import ChunkResult, StageTimings
from imgcls.formatting import format_count, format_duration, format_share

_WINDOW_S = 30.0
_LIVE_S = 0.2
_BAR_WIDTH = 24


class Progress:
    """Counts finished chunks and reports rows, images/s, errors, time left and the slowest stage.

    The rate is that of the last half minute. Until start-up is out of it, the rate of the run's
    steady phase is used, and no time left is reported before one of the two is known.

    total:      rows of the run
    done:       of these, rows that were finished before
    interval_s: time between two log lines
    event:      name of the log lines
    terminal:   draws a live bar there; by default where the command runs in a terminal
    """

    def __init__(
        self,
        total: int,
        done: int,
        interval_s: float,
        event: str = "labeling",
        terminal: TextIO | None = None,
    ) -> None:
        self._total = total
        self._done = done
        self._status: collections.Counter[str] = collections.Counter()
        self._interval_s = interval_s
        self._event = event
        self._terminal = log.find_terminal() if terminal is None else terminal
        self._timings = StageTimings()
        self._recent = [(time.monotonic(), done, 0.0)]
        self._workers_until: dict[str, float] = {}  # when each stops counting as active
        self._started_at = self._recent[0][0]
        self._steady_from: float | None = None
        self._steady_workers: set[str] = set()
        self._steady_rows = 0
        self._reported_at = time.monotonic()

    def add(self, result: ChunkResult) -> None:
        """Add a chunk; reports when it is time to."""
        self._done += result.rows
        self._status.update(result.status)
        self._timings = self._timings.plus(result.timings)
        now = time.monotonic()
        if self._steady_from is None and result.worker in self._workers_until:
            self._steady_from = now
        if result.worker in self._steady_workers:
            self._steady_rows += result.rows
        elif self._steady_from is not None:  # its work on this chunk started before
            self._steady_workers.add(result.worker)
        stages = result.timings.seconds() | {"gpu": 0.0}
        active = max(_WINDOW_S, 2 * sum(stages.values()))
        self._workers_until[result.worker] = now + active
        self._recent.append((now, self._done, self._timings.gpu))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_S:
            self._recent.pop(0)
        if now - self._reported_at >= (_LIVE_S if self._terminal is not None else self._interval_s):
            self._report(now)

    def tick(self) -> None:
        """Report while no chunk is finished, so that a wait can be seen."""
        now = time.monotonic()
        if now - self._reported_at >= max(1.0, self._interval_s):
            self._report(now)

    def close(self) -> None:
        """End the line of the live bar."""
        if self._terminal is not None:
            self._report(time.monotonic())
            self._terminal.write("\n")
            self._terminal.flush()

    @property
    def timings(self) -> StageTimings:
        """Time spent in each stage, summed over all workers."""
        return self._timings

    @property
    def steady_rate(self) -> float | None:
        """Images per second from the second chunk of a worker on, without start-up.

        The first chunk that each worker finishes from then on is not counted, because most of the
        work on it was done before: two workers that finish at the same moment are no high rate.
        """
        if self._steady_from is None or not self._steady_rows:
            return None
        seconds = self._recent[-1][0] - self._steady_from
        return self._steady_rows / seconds if seconds > 0 else None

    @property
    def rate(self) -> float:
        """Images per second of the last half minute; falls while no chunk is finished.

        As long as that includes start-up it is the steady rate, once known.
        """
        steady = self.steady_rate
        if self._includes_start_up and steady is not None:
            return steady
        (start, before, _), (last, after, _) = self._recent[0], self._recent[-1]
        now = time.monotonic()
        end = now if now - last > max(_WINDOW_S, last - start) else last
        return (after - before) / (end - start) if end > start else 0.0

    @property
    def workers(self) -> int:
        """Workers that finished a chunk recently: not those that were lost or replaced."""
        now = time.monotonic()
        return sum(1 for until in self._workers_until.values() if until >= now)

    @property
    def gpu_busy(self) -> float:
        """Fraction of the last half minute that GPUs ran forward passes; 0 without GPUs."""
        (start, _, before), (now, _, after) = self._recent[0], self._recent[-1]
        available = (now - start) * self.workers
        return min(1.0, (after - before) / available) if available > 0 else 0.0

    @property
    def errors(self) -> int:
        """Rows of this driver whose status is not ok."""
        return self._status.total() - self._status[OK]

    @property
    def seconds_left(self) -> float | None:
        """Estimated time to the last row; None while only a rate with start-up is known."""
        if self._includes_start_up and self.steady_rate is None:
            return None
        return (self._total - self._done) / self.rate if self.rate else None

    @property
    def _includes_start_up(self) -> bool:
        return self._recent[0][0] == self._started_at

    def snapshot(self) -> dict[str, Any]:
        """The state of the run, for machines."""
        left = self.seconds_left
        return {
            "rows_done": self._done,
            "rows": self._total,
            "images_per_second": round(self.rate, 2),
            "seconds_left": left and round(left, 1),
            "status": dict(sorted(self._status.items())),
            "workers": self.workers,
            "gpu_busy": round(self.gpu_busy, 3) if self._timings.gpu else None,
            "stage_seconds": {k: round(v, 3) for k, v in self._timings.seconds().items()},
        }

    def format_line(self) -> str:
        """The state of the run in one line."""
        rows = f"{self._done:,}/{format_count(self._total, 'row')}"
        if len(self._recent) == 1:
            waited = format_duration(time.monotonic() - self._started_at)
            return f"{rows}  starting workers ({waited})"
        left = self.seconds_left
        parts = [
            f"{rows} ({format_share(self._done / self._total if self._total else 1.0)})",
            f"{self.rate:,.1f} images/s",
            format_count(self.errors, "error"),
        ]
        if left is not None:
            parts.append(f"ETA {format_duration(left)}")
        if self._timings.gpu:
            parts.append(f"GPU busy {format_share(self.gpu_busy)}")
        stages = self._timings.seconds() | {"gpu": 0.0}
        spent = {name: seconds for name, seconds in stages.items() if seconds > 0}
        if spent:
            slowest = max(spent, key=lambda name: spent[name])
            share = format_share(spent[slowest] / sum(spent.values()))
            parts.append(f"bottleneck {slowest} ({share} of time)")
        return "  ".join(parts)

    def _report(self, now: float) -> None:
        self._reported_at = now
        if self._terminal is None:
            log.emit(self._event, self.format_line(), **self.snapshot())
            return
        filled = int(_BAR_WIDTH * self._done / self._total) if self._total else _BAR_WIDTH
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        self._terminal.write(f"\r[{bar}] {self.format_line()}\x1b[K")
        self._terminal.flush()
