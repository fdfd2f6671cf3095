"""Forms of numbers, lists, choices and suggestions in messages."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any


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


def format_choices(problems: Iterable[Mapping[str, Any]]) -> str:
    """The values that a union of types takes: "true, false, 'full' or 'half'".

    problems: of pydantic, one for each type that does not take a value
    """
    literals, others = [], []
    for problem in problems:
        if problem["type"] == "literal_error":
            literals.append(problem["ctx"]["expected"])
        elif problem["type"].startswith("bool_"):
            others.append("true, false")
        else:  # "Input should be a valid number, unable to parse string as a number"
            others.append(problem["msg"].removeprefix("Input should be ").partition(",")[0])
    return ", ".join([*others, *literals]) if literals else " or ".join(others)


RENAMED_KEYS = {
    "copies": "duplicates",
    "copies.near_bits": "duplicates.max_hash_distance",
    "copies.similar": "duplicates.min_cosine",
    "http.door": "http.proxy",
    "http.request_seconds": "http.request_timeout_s",
    "judge": "evaluation",
    "keys.refresh_seconds": "keys.refresh_interval_s",
    "labels.neighbours": "labels.neighbors",
    "labels.probe_images": "labels.max_probe_images",
    "labels.reference_images": "labels.max_reference_images",
    "least_rows": "min_rows",
    "limits.door_bytes": "limits.proxy_bytes",
    "limits.upload_seconds": "limits.upload_timeout_s",
    "listings": "list_concurrency",
    "most_images": "max_images",
    "replicas.drain_seconds": "replicas.drain_period_s",
    "replicas.least": "replicas.min_replicas",
    "replicas.most": "replicas.max_replicas",
    "replicas.target_requests": "replicas.target_ongoing_requests",
    "rules.black": "rules.black_level",
    "rules.grey_colour": "rules.min_color",
    "rules.max_grey_share": "rules.max_gray_share",
    "rules.odd_size": "rules.max_size_ratio",
    "rules.tiny_pixels": "rules.min_side",
    "rules.white": "rules.white_level",
    "scale.fetches": "scale.io_concurrency",
    "scale.hang_seconds": "scale.worker_timeout_s",
    "scale.host_share": "scale.cpu_decode_fraction",
    "scale.wait_seconds": "scale.resource_timeout_s",
    "sheet": "sheet_images",
    "sheets": "max_sheets",
    "storage.attempt_seconds": "storage.attempt_timeout_s",
    "storage.deadline_seconds": "storage.retry_timeout_s",
    "storage.host_requests": "storage.max_requests_per_host",
    "tune.asha.grace": "tune.asha.grace_period",
    "tune.asha.reduction": "tune.asha.reduction_factor",
    "tune.concurrent": "tune.max_concurrent",
}
"""Keys of version 0.1 that have another name now; a section renames all keys below it."""


def find_new_name(path: str) -> str | None:
    """The name that a key of version 0.1 has now: its own entry, else that of its section."""
    if path in RENAMED_KEYS:
        return RENAMED_KEYS[path]
    section, _, last = path.rpartition(".")
    outer = find_new_name(section) if section else None
    return None if outer is None else f"{outer}.{last}"
