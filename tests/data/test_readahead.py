"""The byte budget of reads that run ahead: what is reserved, by whom, and when it is free again."""

from __future__ import annotations

import pytest

from imgcls.data.readahead import Allowance, Body, Budget, NoRoom
from imgcls.errors import StorageTooLarge


def reads(budget: Budget, count: int, max_bytes: int = 100) -> list[Allowance]:
    return [Allowance(max_bytes, budget, number) for number in range(count)]


def test_only_the_oldest_read_may_exceed_the_budget() -> None:
    budget = Budget(100)
    oldest, second = reads(budget, 2)
    second.reserve(90)
    oldest.reserve(100)
    with pytest.raises(NoRoom):
        second.reserve(91)
    budget.release_oldest()
    second.reserve(100)


def test_a_read_that_was_admitted_does_not_wait_for_the_same_bytes_again() -> None:
    budget = Budget(100)
    oldest, second = reads(budget, 2)
    assert second.admission(60).done()
    oldest.reserve(80)  # the oldest need not ask how much the others hold
    second.reserve(60)


def test_what_a_read_has_waited_for_stays_reserved_while_it_arrives() -> None:
    budget = Budget(100)
    _, second, third = reads(budget, 3)
    assert second.admission(90).done()
    with Body("x", second, None) as body:
        body.add(b"1234")
        with pytest.raises(NoRoom):
            third.reserve(20)
        waiting = third.admission(20)
        body.add(b"5678")
        assert not waiting.done()
        assert body.whole() == b"12345678"
    assert waiting.done()  # the whole file has 8 bytes, so the other 82 are free


def test_a_read_that_failed_holds_nothing() -> None:
    budget = Budget(100)
    _, second, third = reads(budget, 3)
    body = Body("x", second, 90)
    waiting = third.admission(50)
    assert not waiting.done()
    with pytest.raises(StorageTooLarge), body:
        body.add(bytes(101))
    assert waiting.done()


def test_reads_that_wait_are_cancelled_when_the_budget_is_closed() -> None:
    budget = Budget(100)
    _, second, third = reads(budget, 3)
    second.reserve(90)
    waiting = third.admission(50)
    budget.close()
    assert waiting.cancelled()
    assert third.admission(50).cancelled()
