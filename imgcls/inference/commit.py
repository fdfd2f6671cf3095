"""The end of a run: metrics from the written files, the gate, and `_SUCCESS` last of all."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data import filesystem
from imgcls.errors import RunFailed
from imgcls.execution import completed
from imgcls.execution.plan import Plan
from imgcls.metrics import PredictionCounts, tables
from imgcls.runs import layout

_ERRORS_SCHEMA = pa.schema(
    [("row", pa.int64()), ("path", pa.string()), ("status", pa.string()), ("error", pa.string())]
)


def write_metric_tables(
    output: str, plan: Plan, counts: PredictionCounts, *, top_k: int, path_column: str
) -> pa.Table:
    """Write `metrics/*.parquet`; returns the summary."""
    summary = tables.compute_summary(counts, top_k=top_k)
    made = {
        "summary": summary,
        "per_class": tables.build_per_class(counts),
        "confusion": tables.build_confusion(counts),
        "calibration": tables.build_calibration(counts),
    }
    folder = filesystem.join(output, layout.METRICS_FOLDER)
    layout.write_tables(folder, made)
    with (
        filesystem.open_write(filesystem.join(folder, "errors.parquet")) as stream,
        pq.ParquetWriter(stream, _ERRORS_SCHEMA) as writer,
    ):
        if counts.error_rows:
            for failed in completed.read_failed_rows(output, plan, path_column):
                writer.write_table(failed.rename_columns(_ERRORS_SCHEMA.names).cast(_ERRORS_SCHEMA))
    return summary


def write_success(
    output: str,
    *,
    run: Mapping[str, Any],
    counts: PredictionCounts,
    seconds: Mapping[str, float],
    steady_rate: float | None,
    precision: Sequence[str],
) -> None:
    """Mark the run as committed: written last, and only when every row is in the table."""
    files = filesystem.list_names(filesystem.join(output, layout.PREDICTIONS_FOLDER))
    body = {
        "rows": counts.rows,
        "status": dict(sorted(counts.status.items())),
        "run_id": run["plan"]["run_id"],
        "bundle_sha256": run["identity"]["bundle"]["sha256"],
        "manifest_fingerprint": run["identity"]["manifest"]["fingerprint"],
        "settings": run["identity"]["settings"],
        "precision": sorted(precision),
        "versions": run["provenance"]["versions"],
        "files": {
            name: filesystem.size(filesystem.join(output, layout.PREDICTIONS_FOLDER, name))
            for name in files
        },
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "steady_images_per_second": steady_rate and round(steady_rate, 2),
        "committed": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    data = (json.dumps(body, indent=2) + "\n").encode()
    mark = filesystem.join(output, layout.SUCCESS_FILE)
    if filesystem.create(mark, data):
        return
    if filesystem.size(mark):
        raise RunFailed(f"output {output}: was committed by another driver; nothing was harmed")
    filesystem.write(mark, data)  # left empty by a driver that was killed while it created it
