"""Forms of numbers in messages: counts, shares and durations."""

from __future__ import annotations


def format_count(count: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: "1 chunk", "2,000 chunks"."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


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
