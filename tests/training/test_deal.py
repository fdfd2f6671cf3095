import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from imgcls.training.deal import deal, shard, steps_per_epoch

ROWS = st.integers(1, 300)
WORKERS = st.integers(1, 9)
BATCH = st.integers(1, 80)


def hands(rows: int, batch: int, workers: int, epoch: int = 1, seed: int = 0):
    """Per worker, the list of its hands."""
    return [
        list(deal(rows, batch, rank=rank, workers=workers, epoch=epoch, seed=seed))
        for rank in range(workers)
    ]


@given(ROWS, BATCH, WORKERS, st.integers(1, 50), st.integers(0, 2**40))
def test_an_epoch_holds_every_row_exactly_once(
    rows: int, batch: int, workers: int, epoch: int, seed: int
) -> None:
    assume(rows >= workers)
    dealt = hands(rows, batch, workers, epoch, seed)
    everything = np.concatenate([hand.rows for worker in dealt for hand in worker])
    assert sorted(everything.tolist()) == list(range(rows))


@given(ROWS, BATCH, WORKERS)
def test_every_worker_has_a_row_in_each_of_equally_many_steps(
    rows: int, batch: int, workers: int
) -> None:
    assume(rows >= workers)
    dealt = hands(rows, batch, workers)
    assert {len(worker) for worker in dealt} == {steps_per_epoch(rows, batch, workers)}
    for step in zip(*dealt, strict=True):
        sizes = [len(hand.rows) for hand in step]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        assert {hand.batch for hand in step} == {sum(sizes)}


@given(ROWS, BATCH, WORKERS)
def test_workers_and_batches_differ_by_at_most_one_row(rows: int, batch: int, workers: int) -> None:
    assume(rows >= workers)
    dealt = hands(rows, batch, workers)
    totals = [sum(len(hand.rows) for hand in worker) for worker in dealt]
    batches = [hand.batch for hand in dealt[0]]
    assert max(totals) - min(totals) <= 1
    assert max(batches) - min(batches) <= 1


@given(ROWS, BATCH, WORKERS)
def test_no_batch_is_larger_than_asked_for_unless_a_worker_would_be_idle(
    rows: int, batch: int, workers: int
) -> None:
    assume(rows >= workers)
    largest = max(hand.batch for hand in hands(rows, batch, workers)[0])
    assert largest <= batch or largest < 2 * workers


def test_37_rows_in_batches_of_8_for_2_workers() -> None:
    first, second = hands(37, 8, 2)
    assert [hand.batch for hand in first] == [7, 7, 8, 7, 8]
    assert sum(len(hand.rows) for hand in first) == 19
    assert sum(len(hand.rows) for hand in second) == 18


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    def order(**change: int) -> list[int]:
        (dealt,) = hands(50, 8, 1, **change)
        return np.concatenate([hand.rows for hand in dealt]).tolist()

    assert order(epoch=1, seed=3) == order(epoch=1, seed=3)
    assert order(epoch=1, seed=3) != order(epoch=2, seed=3)
    assert order(epoch=1, seed=3) != order(epoch=1, seed=4)


@given(st.integers(0, 100), WORKERS)
def test_evaluation_shards_hold_every_row_exactly_once(rows: int, workers: int) -> None:
    shards = [shard(rows, rank=rank, workers=workers) for rank in range(workers)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(rows))


def test_fewer_rows_than_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows cannot be dealt to 3 workers"):
        steps_per_epoch(2, 8, 3)
