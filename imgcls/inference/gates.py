"""What must hold before a run may be committed, and how its end is reported to a scheduler."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from imgcls.data import filesystem
from imgcls.errors import ImgclsError, TooManyErrors
from imgcls.execution import completed
from imgcls.execution.plan import Plan
from imgcls.inference.incremental import read_failed_before
from imgcls.inference.status import read_status
from imgcls.log import tell
from imgcls.metrics import PredictionCounts
from imgcls.metrics.drift import compute_drift
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, iter_tables

ErrorStatus = Literal[
    "missing", "forbidden", "throttled", "unavailable", "empty", "truncated", "not_an_image",
    "unsupported", "too_large", "unreadable", "not_finite", "crashed",
]  # fmt: skip


def check_error_rates(
    output: str,
    counts: PredictionCounts,
    allowed: float,
    by_status: Mapping[ErrorStatus, float],
    *,
    max_errors: int = 0,
    repeated: Mapping[str, int] | None = None,
) -> None:
    """Raise TooManyErrors when more rows failed than allowed, of a status or of all others.

    max_errors: failed rows that are allowed whatever share of the rows they are, those of
        `by_status` apart
    repeated:   failed rows by status whose image had failed before; they are not counted
    """
    repeated = repeated or {}
    old = sum(repeated.values())
    rows = counts.rows - old
    judged = [
        (
            f"rows are {status}",
            counts.status.get(status, 0) - repeated.get(status, 0),
            limit,
            0,
            f"--max-error-rates.{status}",
        )
        for status, limit in by_status.items()
    ]
    others = counts.error_rows - old - sum(failed for _, failed, _, _, _ in judged)
    judged.append(("rows failed", others, allowed, max_errors, "--max-error-rate"))
    for what, failed, limit, free, option in judged:
        share = failed / max(1, rows)
        if share > limit and failed > free:
            also = f" or {free:,} rows" if free else ""
            before = f", not counting {old:,} that had failed before" if old else ""
            raise TooManyErrors(
                f"output {output}: {failed:,} of {rows:,} {what} ({share:.2%}, "
                f"allowed {limit:.2%}{also}){before}, so the run is not committed; see "
                f"metrics/errors.parquet, then run again with --retry-errors, or with a higher "
                f"{option}"
            )


def count_repeated_failures(output: str, plan: Plan, path_column: str) -> Counter[str]:
    """Failed rows of a run, by status, whose image had failed before in the same version."""
    before = read_failed_before(output)
    counted: Counter[str] = Counter()
    if len(before):
        for failed in completed.read_failed_rows(output, plan, path_column):
            known = failed.filter(pa.array(np.isin(failed["row"].to_numpy(), before)))
            counted.update(known["status"].cast(pa.string()).to_pylist())
    return counted


def check_drift(
    output: str, counts: PredictionCounts, reference: CommittedRun, max_psi: float | None
) -> None:
    """Write `metrics/drift.parquet`; raise TooManyErrors when predictions have moved too far."""
    then = PredictionCounts.empty(reference.classes)
    names = ["predicted_label", "confidence", "accepted", "status"]
    for table in iter_tables(reference, names):
        then += PredictionCounts.from_table(table, label_column=None, classes=reference.classes)
    moved = compute_drift(counts, then)
    layout.write_tables(filesystem.join(output, layout.METRICS_FOLDER), {"drift": moved})
    for row in moved.to_pylist():
        tell(
            "drift",
            f"{row['of']}: PSI {row['psi']:.4f}, Jensen-Shannon "
            f"{row['jensen_shannon']:.4f} bits, from {reference.url}",
            **row,
        )
        if max_psi is not None and row["psi"] > max_psi:
            raise TooManyErrors(
                f"output {output}: {row['of']} has moved by a PSI of {row['psi']:.3f} from "
                f"{reference.url} (allowed {max_psi:g}), so the run is not committed; look at what "
                "came in and at metrics/drift.parquet, then run again with a higher --max-psi, or "
                "with another --reference"
            )


@contextlib.contextmanager
def report_exit(url: str | None, output: str) -> Iterator[list[str]]:
    """Write how the block ended, whatever the exit code; see `docs/nightly.md` for the keys.

    url: of the file; None writes nothing
    Yields a list to which the block adds the output folder of each run that it works on or finds
    committed; without one, `output` is looked at.
    """
    outputs: list[str] = []
    ending: dict[str, Any] = {"exit_code": 0, "error": None}
    try:
        yield outputs
    except ImgclsError as error:
        ending |= {"exit_code": error.exit_code, "error": str(error)}
        raise
    except BaseException as error:
        ending |= {"exit_code": 1, "error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        if url is not None:
            write_summary(
                url, ending, outputs or ([] if ending["exit_code"] == 2 else [output]), output
            )


def write_summary(
    url: str, ending: Mapping[str, Any], outputs: Sequence[str] = (), output: str | None = None
) -> None:
    """Write `--summary-json`: how a command ended, and what its runs came to."""
    body: dict[str, Any] = {
        **ending,
        "output": outputs[-1] if outputs else output,
        "outputs": list(outputs),
        "state": None,
        "rows": 0,
        "rows_done": 0,
        "status": {},
        "since": None,
        "seconds": None,
        "committed": None,
    }
    status: Counter[str] = Counter()
    try:
        for each in outputs:
            described = layout.load_run(each)
            if described is None:
                continue  # ended before there was a plan
            found = read_status(each)
            body["rows"] += found.get("rows", 0)
            body["rows_done"] += found.get("rows_done", 0)
            status.update(found.get("status", {}))
            body |= {
                "state": found["state"],
                "since": described.get("since"),
                "committed": found.get("committed"),
                "seconds": found.get("seconds"),
            }
        body["status"] = dict(sorted(status.items()))
    except ImgclsError as error:
        tell("note", f"summary_json: the output cannot be read: {error}")
    try:
        filesystem.write(url, (json.dumps(body, indent=2) + "\n").encode())
    except ImgclsError as error:
        tell("note", f"summary_json cannot be written: {error}")
