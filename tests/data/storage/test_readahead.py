"""The byte budget of reads that run ahead: what is reserved, by whom, and when it is free again."""

from __future__ import annotations

import pytest

from imgcls.data.storage.readahead import BodyBuffer, BudgetFull, ByteBudget, ReadAllowance
from imgcls.errors import StorageTooLarge


def reads(budget: ByteBudget, count: int, max_bytes: int = 100) -> list[ReadAllowance]:
    return [ReadAllowance(max_bytes, budget, number) for number in range(count)]


def test_only_the_oldest_read_may_exceed_the_budget() -> None:
    budget = ByteBudget(100)
    oldest, second = reads(budget, 2)
    second.reserve(90)
    oldest.reserve(100)
    with pytest.raises(BudgetFull):
        second.reserve(91)
    budget.release_oldest()
    second.reserve(100)


def test_a_read_that_was_admitted_does_not_wait_for_the_same_bytes_again() -> None:
    budget = ByteBudget(100)
    oldest, second = reads(budget, 2)
    assert second.reserve_later(60).done()
    oldest.reserve(80)  # the oldest need not ask how much the others hold
    second.reserve(60)


def test_what_a_read_has_waited_for_stays_reserved_while_it_arrives() -> None:
    budget = ByteBudget(100)
    _, second, third = reads(budget, 3)
    assert second.reserve_later(90).done()
    with BodyBuffer("x", second, None) as body:
        body.append(b"1234")
        with pytest.raises(BudgetFull):
            third.reserve(20)
        waiting = third.reserve_later(20)
        body.append(b"5678")
        assert not waiting.done()
        assert body.join() == b"12345678"
    assert waiting.done()  # the whole file has 8 bytes, so the other 82 are free


def test_a_read_that_failed_holds_nothing() -> None:
    budget = ByteBudget(100)
    _, second, third = reads(budget, 3)
    body = BodyBuffer("x", second, 90)
    waiting = third.reserve_later(50)
    assert not waiting.done()
    with pytest.raises(StorageTooLarge), body:
        body.append(bytes(101))
    assert waiting.done()


def test_reads_that_wait_are_canceled_when_the_budget_is_closed() -> None:
    budget = ByteBudget(100)
    _, second, third = reads(budget, 3)
    second.reserve(90)
    waiting = third.reserve_later(50)
    budget.close()
    assert waiting.cancelled()
    assert third.reserve_later(50).cancelled()
