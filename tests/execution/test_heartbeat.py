"""What a worker's notes come to for the next one, in a real Ray's key-value store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from imgcls.errors import RunFailed
from imgcls.execution import heartbeat
from imgcls.execution.heartbeat import (
    CRASHES_TO_CONFIRM,
    MAX_UNEXPLAINED_CRASHES,
    SYSTEMIC_CRASH_ROWS,
    Attempt,
)


@pytest.fixture(scope="module")
def session() -> Iterator[str]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield "a-session"
    ray.shutdown()


@pytest.fixture(autouse=True)
def forgotten(session: str) -> Iterator[None]:
    yield
    heartbeat.clear_session(session)


def begun(session: str, retries: int = 1) -> Attempt:
    """A worker begins the chunk; without `end` it has died when the next one does."""
    return Attempt(session, "label-3", "chunk 3 (rows 768 to 1,023)", retries)


def test_what_is_durable_leaves_no_note(session: str) -> None:
    attempt = begun(session)
    assert list(heartbeat.read_attempts(session)) == ["a-session/label-3"]
    attempt.complete()
    assert heartbeat.read_attempts(session) == {}
    assert begun(session).crashes == 0


def test_a_chunk_is_done_as_a_whole_until_it_has_cost_too_many_workers(session: str) -> None:
    for deaths in (0, 1):
        attempt = begun(session, retries=1)
        assert (attempt.crashes, list(attempt.iter_suspect_rows(4))) == (deaths, [])
    assert list(begun(session, retries=1).iter_suspect_rows(4)) == [0, 1, 2, 3]


def test_a_row_that_two_workers_die_at_alone_is_crashed_and_the_others_are_not_tried_again(
    session: str,
) -> None:
    begun(session, retries=0)
    rows = begun(session, retries=0).iter_suspect_rows(6)
    assert [next(rows) for _ in range(3)] == [0, 1, 2]  # and dies at row 2
    third = begun(session, retries=0)
    assert list(third.crashed_rows) == []
    assert next(third.iter_suspect_rows(6)) == 2  # and dies again
    fourth = begun(session, retries=0)
    assert list(fourth.crashed_rows) == [2]
    assert list(fourth.iter_suspect_rows(6)) == [3, 4, 5]
    fourth.complete()


def test_a_row_that_is_survived_when_tried_again_was_not_to_blame(session: str) -> None:
    begun(session, retries=0)
    for row in begun(session, retries=0).iter_suspect_rows(4):
        if row == 2:
            break
    again = begun(session, retries=0)
    assert list(again.iter_suspect_rows(4)) == [2, 3]
    assert again.crashed_rows == {}


def test_a_chunk_may_have_several_such_rows(session: str) -> None:
    begun(session, retries=0)
    for bad in (1, 1, 4, 4):
        for row in begun(session, retries=0).iter_suspect_rows(6):
            if row == bad:
                break
    last = begun(session, retries=0)
    assert list(last.iter_suspect_rows(6)) == [5]
    assert list(last.crashed_rows) == [1, 4]


def test_when_the_first_images_all_kill_it_is_not_the_images(session: str) -> None:
    begun(session, retries=0)
    for row in range(SYSTEMIC_CRASH_ROWS):
        for _ in range(CRASHES_TO_CONFIRM):
            assert next(begun(session, retries=0).iter_suspect_rows(100)) == row
    with pytest.raises(RunFailed, match=r"chunk 3 .* whichever it was, so it is not the images"):
        next(begun(session, retries=0).iter_suspect_rows(100))


def test_when_only_the_whole_chunk_kills_it_is_not_the_images_either(session: str) -> None:
    for _ in range(MAX_UNEXPLAINED_CRASHES + 1):
        list(begun(session, retries=0).iter_suspect_rows(3))
    with pytest.raises(RunFailed, match=r"although each of its images alone is survived"):
        next(begun(session, retries=0).iter_suspect_rows(3))


def test_a_worker_that_goes_on_is_seen_to(session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = begun(session)
    (before,) = heartbeat.read_attempts(session).values()
    attempt.heartbeat()
    (soon,) = heartbeat.read_attempts(session).values()
    assert soon == before  # not with every row
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.0)
    attempt.heartbeat()
    (after,) = heartbeat.read_attempts(session).values()
    assert after.heartbeats > before.heartbeats
