"""What must hold before a run may be committed, and how its end is told to a scheduler."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from imgcls import output as layout
from imgcls.data import storage
from imgcls.errors import ImgclsError, StorageMissing, TooManyErrors
from imgcls.log import tell
from imgcls.metrics import PredictionCounts
from imgcls.metrics.drift import drift
from imgcls.runs import Run, stream

ErrorStatus = Literal[
    "missing", "forbidden", "throttled", "unavailable", "empty", "truncated", "not_an_image",
    "unsupported", "too_large", "unreadable", "crashed",
]  # fmt: skip


def check_errors(
    output: str, counts: PredictionCounts, allowed: float, by_status: Mapping[ErrorStatus, float]
) -> None:
    """Raise TooManyErrors when more rows failed than allowed, of a status or of all others."""
    rows = max(1, counts.rows)
    judged = [
        (f"rows are {status}", counts.status.get(status, 0), limit, f"--max-error-rates.{status}")
        for status, limit in by_status.items()
    ]
    others = counts.error_rows - sum(failed for _, failed, _, _ in judged)
    judged.append(("rows failed", others, allowed, "--max-error-rate"))
    for what, failed, limit, option in judged:
        if failed / rows > limit:
            raise TooManyErrors(
                f"output {output}: {failed:,} of {counts.rows:,} {what} ({failed / rows:.2%}, "
                f"allowed {limit:.2%}), so the run is not committed; see metrics/errors.parquet, "
                f"then run again with --retry-errors, or with a higher {option}"
            )


def check_drift(
    output: str, counts: PredictionCounts, reference: Run, max_psi: float | None
) -> None:
    """Write `metrics/drift.parquet`; raise TooManyErrors when predictions have moved too far."""
    then = PredictionCounts.empty(reference.classes)
    names = ["predicted_label", "confidence", "accepted", "status"]
    for table in stream(reference, names):
        then += PredictionCounts.of(table, label_column=None, classes=reference.classes)
    moved = drift(counts, then)
    layout.write_tables(storage.join(output, layout.METRICS), {"drift": moved})
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
def told_in_json(url: str, output: str) -> Iterator[None]:
    """Write how the block ended: exit_code, output, error, and what the run's _SUCCESS says."""
    told: dict[str, Any] = {"exit_code": 0, "output": output, "error": None}
    try:
        yield
        with contextlib.suppress(StorageMissing):
            success = json.loads(storage.read(storage.join(output, layout.SUCCESS)))
            told |= {name: success[name] for name in ("rows", "status", "seconds", "committed")}
    except ImgclsError as error:
        told |= {"exit_code": error.exit_code, "error": str(error)}
        raise
    except BaseException as error:
        told |= {"exit_code": 1, "error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        body = (json.dumps(told, indent=2) + "\n").encode()
        try:
            storage.write(url, body)
        except ImgclsError as error:
            tell("note", f"summary_json cannot be written: {error}")
