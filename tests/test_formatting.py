"""Numbers, choices and suggestions in messages."""

from __future__ import annotations

import pytest

from imgcls.formatting import (
    find_new_name,
    format_choices,
    format_count,
    format_counts,
    format_duration,
    format_lines,
    format_list,
    format_share,
    suggest_names,
)


def test_a_count_has_its_noun_in_the_right_number() -> None:
    assert [format_count(n, "chunk") for n in (0, 1, 2000)] == [
        "0 chunks",
        "1 chunk",
        "2,000 chunks",
    ]
    assert [format_count(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


def test_counts_are_named_and_zeros_left_out() -> None:
    assert format_counts({"ok": 1_200, "missing": 0, "empty": 3}) == "1,200 ok, 3 empty"
    assert format_counts({"ok": 0}) == "none"
    assert format_counts({}, "no issues") == "no issues"


def test_a_long_list_is_cut_and_marked() -> None:
    assert [format_list("abc"[:n], 2) for n in range(4)] == ["", "a", "a, b", "a, b, ..."]
    assert [format_lines(iter("abc"[:n]), 2) for n in range(4)] == [
        "", "\n  a", "\n  a\n  b", "\n  a\n  b\n  ...",
    ]  # fmt: skip


def test_the_nearest_names_are_suggested() -> None:
    known = ["dog", "doge", "wolf"]
    assert suggest_names("dgo", known) == "did you mean dog or doge?"
    assert suggest_names("dgo", known, form="{!r}", limit=1) == "did you mean 'dog'?"
    assert suggest_names("giraffe", known, "see the list") == "see the list"


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


def test_choices_of_a_union_name_each_type_once_and_literals_last() -> None:
    literal = {"type": "literal_error", "ctx": {"expected": "'a' or 'b'"}, "msg": ""}
    number = {
        "type": "float_parsing",
        "msg": "Input should be a valid number, unable to parse string as a number",
    }
    boolean = {"type": "bool_parsing", "msg": ""}
    assert format_choices([literal, boolean]) == "true, false, 'a' or 'b'"
    assert format_choices([number, literal]) == "a valid number, 'a' or 'b'"
    assert format_choices([number, boolean]) == "a valid number or true, false"


def test_a_key_below_a_renamed_section_has_a_new_name() -> None:
    assert find_new_name("copies.near_bits") == "duplicates.max_hash_distance"
    assert find_new_name("copies.seed") == "duplicates.seed"
    assert find_new_name("optim.lr") is None
