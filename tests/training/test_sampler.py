"""Every row once, every worker at every step, and the same order for the same seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from imgcls.training.sampler import (
    StepShare,
    iter_step_shares,
    sample_balanced,
    shard_rows,
    shuffle_rows,
    steps_per_epoch,
)

ROWS = st.integers(1, 300)
WORKERS = st.integers(1, 9)
BATCH = st.integers(1, 80)
LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=200)


def split(rows: int, batch: int, workers: int, start: int = 0) -> list[list[StepShare]]:
    """Per worker, the list of its split; the rows are in order."""
    order = np.arange(rows)
    return [
        list(iter_step_shares(order, batch, rank=rank, workers=workers, start=start))
        for rank in range(workers)
    ]


@given(ROWS, BATCH, WORKERS, st.integers(1, 50), st.integers(0, 2**40))
def test_an_epoch_holds_every_row_exactly_once(
    rows: int, batch: int, workers: int, epoch: int, seed: int
) -> None:
    assume(rows >= workers)
    order = shuffle_rows(rows, epoch=epoch, seed=seed)
    shares = [
        share.rows
        for rank in range(workers)
        for share in iter_step_shares(order, batch, rank=rank, workers=workers)
    ]
    assert sorted(np.concatenate(shares).tolist()) == list(range(rows))


@given(ROWS, BATCH, WORKERS)
def test_a_step_takes_the_next_rows_of_the_order(rows: int, batch: int, workers: int) -> None:
    assume(rows >= workers)
    taken = 0
    for step in zip(*split(rows, batch, workers), strict=True):
        together = np.sort(np.concatenate([share.rows for share in step]))
        assert together.tolist() == list(range(taken, taken + len(together)))
        taken += len(together)


@given(ROWS, BATCH, WORKERS)
def test_every_worker_has_a_row_in_each_of_equally_many_steps(
    rows: int, batch: int, workers: int
) -> None:
    assume(rows >= workers)
    shares = split(rows, batch, workers)
    assert {len(worker) for worker in shares} == {steps_per_epoch(rows, batch, workers)}
    for step in zip(*shares, strict=True):
        sizes = [len(share.rows) for share in step]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        assert {share.global_batch_size for share in step} == {sum(sizes)}


@given(ROWS, BATCH, WORKERS)
def test_workers_and_batches_differ_by_at_most_one_row(rows: int, batch: int, workers: int) -> None:
    assume(rows >= workers)
    shares = split(rows, batch, workers)
    totals = [sum(len(share.rows) for share in worker) for worker in shares]
    batches = [share.global_batch_size for share in shares[0]]
    assert max(totals) - min(totals) <= 1
    assert max(batches) - min(batches) <= 1


@given(ROWS, BATCH, WORKERS)
def test_no_batch_is_larger_than_asked_for_unless_a_worker_would_be_idle(
    rows: int, batch: int, workers: int
) -> None:
    assume(rows >= workers)
    largest = max(share.global_batch_size for share in split(rows, batch, workers)[0])
    assert largest <= batch or largest < 2 * workers


@given(ROWS, BATCH, WORKERS, st.integers(0, 40))
def test_an_epoch_resumes_at_any_step_as_it_would_have_continued(
    rows: int, batch: int, workers: int, start: int
) -> None:
    assume(rows >= workers)
    for whole, rest in zip(
        split(rows, batch, workers), split(rows, batch, workers, start), strict=True
    ):
        assert len(rest) == max(0, len(whole) - start)
        for expected, found in zip(whole[start:], rest, strict=True):
            assert found.rows.tolist() == expected.rows.tolist()
            assert found.global_batch_size == expected.global_batch_size


def test_37_rows_in_batches_of_8_for_2_workers() -> None:
    first, second = split(37, 8, 2)
    assert [share.global_batch_size for share in first] == [7, 7, 8, 7, 8]
    assert sum(len(share.rows) for share in first) == 19
    assert sum(len(share.rows) for share in second) == 18


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    labels = np.arange(50) % 3
    for order in (
        lambda **change: shuffle_rows(50, **change).tolist(),
        lambda **change: sample_balanced(labels, **change).tolist(),
    ):
        once = order(epoch=1, seed=3)
        np.random.seed(7)  # the state of others must not matter
        assert order(epoch=1, seed=3) == once
        assert order(epoch=2, seed=3) != once
        assert order(epoch=1, seed=4) != once


@given(st.integers(0, 100), WORKERS)
def test_evaluation_shards_hold_every_row_exactly_once(rows: int, workers: int) -> None:
    shards = [shard_rows(rows, rank=rank, workers=workers) for rank in range(workers)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(rows))


def test_fewer_rows_than_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows cannot be split among 3 workers"):
        steps_per_epoch(2, 8, 3)


# ------------------------------------------------------------------ balanced classes


@given(LABELS, st.integers(0, 99))
def test_a_balanced_epoch_has_as_many_rows_of_each_class_give_or_take_one(
    labels: list[int], seed: int
) -> None:
    rows = sample_balanced(np.array(labels), epoch=1, seed=seed)
    counts = Counter(labels[row] for row in rows)
    quotas = [counts[label] for label in set(labels)]
    assert len(rows) == len(labels)
    assert max(quotas) - min(quotas) <= 1


@given(LABELS, st.integers(0, 99))
def test_a_repeated_class_shows_all_its_rows_before_any_again(labels: list[int], seed: int) -> None:
    shown = Counter(sample_balanced(np.array(labels), epoch=1, seed=seed).tolist())
    for label in set(labels):
        times = [shown[row] for row, other in enumerate(labels) if other == label]
        assert max(times) - min(times) <= 1


def test_which_rows_of_a_large_class_are_left_out_changes_from_epoch_to_epoch() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    seen: set[int] = set()
    for epoch in range(1, 8):
        seen |= set(sample_balanced(labels, epoch=epoch, seed=0).tolist())
    assert len(seen) > 95
