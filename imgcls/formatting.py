"""Forms of numbers, lists and suggestions in messages."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping


def format_count(count: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: "1 chunk", "2,000 chunks"."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def format_counts(counts: Mapping[str, int], otherwise: str = "none") -> str:
    """Numbers and what they count: "1,200 ok, 3 missing"; zeros are left out."""
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or otherwise


def format_share(fraction: float) -> str:
    """A share of a whole as "12.3%"; below 0.1% with two significant digits, never as 0.0%."""
    if 0 < fraction < 0.001:
        return f"{fraction * 100:.2g}%"
    return f"{fraction:.1%}"


def format_duration(seconds: float) -> str:
    """Seconds as "59 s", "1 min 05 s" or "2 h 05 min"."""
    whole = int(seconds + 0.5)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def format_list(items: Iterable[object], limit: int) -> str:
    """The first `limit` items: "cat, dog, ..."."""
    return ", ".join(_cut(items, limit))


def format_lines(items: Iterable[object], limit: int) -> str:
    """The first `limit` items, each on an indented line of its own; then "..." if there are more.

    The text starts with a line break, except for no items.
    """
    return "".join(f"\n  {each}" for each in _cut(items, limit))


def _cut(items: Iterable[object], limit: int) -> list[str]:
    shown = [str(each) for each in itertools.islice(items, limit + 1)]
    return [*shown[:limit], "..."] if len(shown) > limit else shown


def suggest_names(
    name: str, known: Iterable[str], otherwise: str = "", *, form: str = "{}", limit: int = 3
) -> str:
    """A question with the names of `known` that are most like an unknown one; else `otherwise`.

    form: of each name, such as "{!r}"
    """
    near = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return f"did you mean {' or '.join(map(form.format, near))}?" if near else otherwise
