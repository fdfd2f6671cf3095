"""The progress of a run on a terminal and in a log, with a clock that the test sets."""

from __future__ import annotations

import io

import pytest

from imgcls.execution import progress
from imgcls.execution.messages import ChunkResult, ChunkTask, StageTimings
from imgcls.execution.progress import Progress


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(progress.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def done(rows: int, errors: int = 0, worker: str = "a/1", **seconds: float) -> ChunkResult:
    status = {"ok": rows - errors, "missing": errors}
    return ChunkResult(ChunkTask(0), rows, status, StageTimings(**seconds), worker)


def test_a_log_gets_a_line_per_interval_and_not_per_chunk(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress(1000, 0, interval_s=5)
    for _ in range(12):
        clock.now += 1
        bar.add(done(10, errors=1))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "labeling  50/1,000 rows (5.0%)  10.0 images/s  5 errors  ETA 1 min 35 s",
        "labeling  100/1,000 rows (10.0%)  10.0 images/s  10 errors  ETA 1 min 30 s",
    ]
    bar.close()
    assert capsys.readouterr().out == ""


def test_a_wait_for_workers_is_logged(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(1000, 0, interval_s=5)
    for _ in range(70):
        clock.now += 0.2
        bar.tick()
    assert capsys.readouterr().out.splitlines() == [
        "labeling  0/1,000 rows  starting workers (5 s)",
        "labeling  0/1,000 rows  starting workers (10 s)",
    ]


def test_a_terminal_gets_one_bar_that_is_drawn_over(clock: Clock) -> None:
    terminal = Terminal()
    bar = Progress(100, 0, interval_s=60, terminal=terminal)
    for _ in range(2):
        clock.now += 1
        bar.add(done(50))
    clock.now += 0.1  # too soon to be drawn again
    bar.add(done(0))
    bar.close()
    text = terminal.getvalue()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    drawn = text.rstrip("\n").split("\r")[1:]
    assert len(drawn) == 3
    assert drawn[0].startswith(f"[{'#' * 12}{'.' * 12}] 50/100 rows (50.0%)  50.0 images/s")
    assert drawn[-1].startswith(f"[{'#' * 24}] 100/100 rows (100.0%)")
    assert all(frame.endswith("\x1b[K") for frame in drawn)


def test_the_rate_is_recent_and_a_resume_counts_only_its_own_rows(clock: Clock) -> None:
    bar = Progress(10_000, 4000, interval_s=60)
    clock.now += 60  # starting up
    bar.add(done(10))
    for _ in range(40):
        clock.now += 1
        bar.add(done(20))
    assert bar.rate == pytest.approx(20, rel=0.02)
    assert bar.format_line().startswith(
        "4,810/10,000 rows (48.1%)  20.0 images/s  0 errors  ETA 4 min"
    )
    assert bar.steady_rate == pytest.approx(20)


def test_the_steady_rate_excludes_start_up(clock: Clock) -> None:
    bar = Progress(100, 0, interval_s=60)
    assert bar.steady_rate is None
    clock.now += 100
    bar.add(done(10, worker="a/1"))
    clock.now += 100
    bar.add(done(10, worker="b/2"))
    assert bar.steady_rate is None
    for _ in range(3):
        clock.now += 2
        bar.add(done(10, worker="a/1"))
    assert bar.steady_rate == pytest.approx(20 / 4)


def test_workers_that_finish_together_are_no_high_rate(clock: Clock) -> None:
    bar = Progress(1000, 0, interval_s=60)
    clock.now += 10  # starting up
    for _ in range(2):  # two workers, 100 rows in 5 s each: 40 images/s
        clock.now += 5
        bar.add(done(100, worker="a/1"))
        clock.now += 0.1
        bar.add(done(100, worker="b/1"))
        clock.now -= 0.1
    assert bar.steady_rate is None
    clock.now += 5
    bar.add(done(100, worker="a/1"))
    clock.now += 0.1
    bar.add(done(100, worker="b/1"))
    assert bar.steady_rate == pytest.approx(40, rel=0.03)
    assert bar.rate == bar.steady_rate  # and not 600 rows in 25 s, start-up included
    assert bar.seconds_left == pytest.approx(10, rel=0.03)


@pytest.mark.parametrize(
    ("left", "expected"),
    [(59, "ETA 59 s"), (60, "ETA 1 min 00 s"), (3599, "ETA 59 min 59 s"), (7500, "ETA 2 h 05 min")],
)
def test_the_time_left_has_units_by_its_length(clock: Clock, left: int, expected: str) -> None:
    bar = Progress(3 + left, 0, interval_s=60)
    clock.now += 100  # starting up
    for _ in range(3):
        clock.now += 1
        bar.add(done(1))
    assert expected in bar.format_line()


def test_while_only_a_rate_with_start_up_is_known_no_time_left_is_given(clock: Clock) -> None:
    bar = Progress(1000, 0, interval_s=60)
    clock.now += 20
    bar.add(done(10))
    assert bar.seconds_left is None
    assert bar.snapshot()["seconds_left"] is None
    assert bar.format_line().startswith("10/1,000 rows (1.0%)  0.5 images/s")
    assert "ETA" not in bar.format_line()
    clock.now += 2
    bar.add(done(10))
    clock.now += 2
    bar.add(done(10))
    assert bar.seconds_left == 970 / 5


def test_one_row_and_one_error_are_singular(clock: Clock) -> None:
    bar = Progress(1, 0, interval_s=60)
    clock.now += 1
    bar.add(done(1, errors=1))
    assert bar.format_line() == "1/1 row (100.0%)  1.0 images/s  1 error"


def test_the_slowest_stage_is_named_with_its_share(clock: Clock) -> None:
    bar = Progress(100, 0, interval_s=60)
    clock.now += 1
    bar.add(done(10))
    assert "bottleneck" not in bar.format_line()
    bar.add(done(10, fetch=1.0, prepare=4.0, classify=1.0))
    bar.add(done(10, fetch=3.0, classify=1.0, commit=0.5))
    assert "bottleneck fetch (38.1% of time)" in bar.format_line()
    assert bar.timings == StageTimings(fetch=4.0, prepare=4.0, classify=2.0, commit=0.5)


def test_a_run_without_a_rate_has_no_time_left(clock: Clock) -> None:
    bar = Progress(100, 0, interval_s=60)
    bar.add(done(10))  # in no time at all
    assert "ETA" not in bar.format_line()
    assert "0.0 images/s" in bar.format_line()


def test_the_line_shows_how_busy_gpus_are(clock: Clock) -> None:
    bar = Progress(1000, 0, interval_s=5)
    for worker in ("a/1", "b/1"):
        clock.now += 1
        bar.add(done(10, worker=worker, classify=0.9, gpu=0.6))
    assert bar.gpu_busy == pytest.approx(1.2 / (2 * 2))
    assert "GPU busy 30.0%" in bar.format_line()
    assert "bottleneck classify (100.0% of time)" in bar.format_line()


def test_a_gpu_whose_worker_was_replaced_is_counted_once(clock: Clock) -> None:
    bar = Progress(10_000, 0, interval_s=500)
    for worker in ("a/1", "a/2"):  # the second in place of the first
        for _ in range(40):
            clock.now += 1
            bar.add(done(10, worker=worker, classify=0.9, gpu=0.8))
    assert bar.workers == 1
    assert bar.gpu_busy == pytest.approx(0.8, rel=0.05)


def test_a_worker_whose_chunks_take_long_is_there_between_two_of_them(clock: Clock) -> None:
    bar = Progress(10_000, 0, interval_s=500)
    clock.now += 60
    bar.add(done(10, worker="a/1", classify=50.0, gpu=30.0))
    clock.now += 60
    bar.add(done(10, worker="b/1", classify=50.0, gpu=30.0))
    assert bar.workers == 2
    assert bar.gpu_busy == pytest.approx(60 / (120 * 2))


def test_a_run_that_comes_to_a_stop_loses_its_rate(clock: Clock) -> None:
    bar = Progress(10_000, 0, interval_s=500)
    for _ in range(40):
        clock.now += 1
        bar.add(done(20))
    assert bar.rate == pytest.approx(20, rel=0.05)
    clock.now += 25  # as it may be between two chunks
    assert bar.rate == pytest.approx(20, rel=0.05)
    clock.now += 275
    assert bar.rate < 2
    left = bar.seconds_left
    assert left is not None
    assert left > 10 * (10_000 - 800) / 20
