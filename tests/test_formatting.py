"""Numbers in messages: counts with their nouns, shares and durations."""

from __future__ import annotations

import pytest

from imgcls.formatting import format_count, format_duration, format_share


def test_a_count_has_its_noun_in_the_right_number() -> None:
    assert [format_count(n, "chunk") for n in (0, 1, 2000)] == [
        "0 chunks",
        "1 chunk",
        "2,000 chunks",
    ]
    assert [format_count(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


def test_a_small_share_is_not_shown_as_zero() -> None:
    shares = (0, 0.00001234, 0.0009, 0.123456, 1)
    assert [format_share(share) for share in shares] == [
        "0.0%", "0.0012%", "0.09%", "12.3%", "100.0%",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.5, "1 min 00 s"), (65, "1 min 05 s"), (7500, "2 h 05 min")],
)
def test_a_duration_has_two_units_at_most(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
