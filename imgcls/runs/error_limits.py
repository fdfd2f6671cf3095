"""Limits on the failed rows of a run: in total, and by status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from imgcls.errors import OK, TooManyErrors
from imgcls.formatting import format_count, format_share

S = TypeVar("S", bound=str)


def check_status_counts(
    output: str,
    counts: Mapping[str, int],
    allowed: float,
    by_status: Mapping[S, float],
    *,
    max_errors: int = 0,
    repeated: Mapping[str, int] | None = None,
    outcome: str,
) -> None:
    """Raise TooManyErrors when more rows failed than allowed, with one status or all others.

    counts:     rows by status, including "ok"
    allowed:    maximum fraction of failed rows, without those of `by_status`
    by_status:  maximum fraction by status
    max_errors: number of failed rows, without those of `by_status`, that is allowed at any rate
    repeated:   failed rows by status whose image had failed before; they are not counted
    outcome:    what the error means for the run, and where its failed rows are listed
    """
    repeated = repeated or {}
    old = sum(repeated.values())
    total = sum(counts.values())
    rows = total - old
    limits = [
        (
            f"rows are {status}",
            counts.get(status, 0) - repeated.get(status, 0),
            limit,
            0,
            f"--max-error-rates.{status}",
        )
        for status, limit in by_status.items()
    ]
    failed_rows = total - counts.get(OK, 0)
    others = failed_rows - old - sum(failed for _, failed, _, _, _ in limits)
    limits.append(("rows failed", others, allowed, max_errors, "--max-error-rate"))
    for what, failed, limit, free, option in limits:
        share = failed / max(1, rows)
        if share > limit and failed > free:
            also = f" or {format_count(free, 'row')}" if free else ""
            before = f", not counting {old:,} that had failed before" if old else ""
            raise TooManyErrors(
                f"output {output}: {failed:,} of {rows:,} {what} ({format_share(share)}, allowed "
                f"{format_share(limit)}{also}){before}; {outcome}, then rerun with "
                f"--retry-errors, or with a higher {option}"
            )
