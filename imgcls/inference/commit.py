"""The end of a run: metrics from the written files, quality gates, `_SUCCESS`, exit summary."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls import log
from imgcls.data.storage import filesystem
from imgcls.errors import OK, ImgclsError, RunFailed, TooManyErrors
from imgcls.execution.plan import Plan, parse_plan
from imgcls.inference import rollup
from imgcls.inference.config import ErrorStatus
from imgcls.inference.incremental import read_failed_before
from imgcls.inference.status import read_status
from imgcls.metrics import tables
from imgcls.metrics.drift import compute_drift, maximum_mean_discrepancy
from imgcls.metrics.formatting import format_summary
from imgcls.metrics.multilabel import (
    MultiLabelCounts,
    build_multilabel_per_class,
    compute_multilabel_metrics,
)
from imgcls.models.embeddings import normalize_embeddings
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, iter_tables
from imgcls.runs.embeddings import sample_embeddings
from imgcls.runs.error_limits import check_status_counts
from imgcls.runs.table_counts import RunCounts, TableCounter, merge_counts

DEFAULT_MAX_ERRORS = 10
"""Default of `max_errors` with `since`: a night may have so few images that one broken one exceeds
any rate."""

_SAMPLED_EMBEDDINGS = 1_000
"""Rows of each run whose embeddings are compared."""
_ROW_METRICS = ["rows", "ok", "error_rate"]
"""Metrics of a run without predictions."""

_ERRORS_SCHEMA = pa.schema(
    [("row", pa.int64()), ("path", pa.string()), ("status", pa.string()), ("error", pa.string())]
)


def write_metric_tables(
    output: str, plan: Plan, counts: RunCounts, *, top_k: int, path_column: str
) -> pa.Table:
    """Write `metrics/*.parquet`; returns the summary.

    For embeddings alone, whose counts have no classes, the summary has the numbers of rows.
    """
    made = _build_metric_tables(counts, top_k)
    summary = made["summary"]
    folder = filesystem.join(output, layout.METRICS_FOLDER)
    layout.write_tables(folder, made)
    with (
        filesystem.open_write(filesystem.join(folder, "errors.parquet")) as stream,
        pq.ParquetWriter(stream, _ERRORS_SCHEMA) as writer,
    ):
        if counts.error_rows:
            for failed in rollup.read_failed_rows(output, plan, path_column):
                writer.write_table(failed.rename_columns(_ERRORS_SCHEMA.names).cast(_ERRORS_SCHEMA))
    return summary


def _build_metric_tables(counts: RunCounts, top_k: int) -> dict[str, pa.Table]:
    if isinstance(counts, MultiLabelCounts):
        return {
            "summary": tables.build_summary_table(compute_multilabel_metrics(counts)),
            "per_class": build_multilabel_per_class(counts),
        }
    summary = tables.compute_summary(counts, top_k=top_k)
    if not counts.classes:
        names = summary["metric"]
        is_row_metric = pc.is_in(names, value_set=pa.array(_ROW_METRICS))
        return {"summary": summary.filter(pc.or_(is_row_metric, pc.starts_with(names, "status_")))}
    return {
        "summary": summary,
        "per_class": tables.build_per_class(counts),
        "confusion": tables.build_confusion(counts),
        "calibration": tables.build_calibration(counts),
    }


def log_metrics(summary: pa.Table) -> None:
    """Show the summary of the metrics: as a table, or as one JSON object per metric."""
    if log.is_json():
        for row in summary.to_pylist():
            log.emit("metric", f"{row['metric']} {row['value']}", **row)
    else:
        log.show(format_summary(summary))


def write_success(
    output: str,
    *,
    run: Mapping[str, Any],
    counts: RunCounts,
    seconds: Mapping[str, float],
    steady_rate: float | None,
    precision: Sequence[str],
    engine: Sequence[str],
) -> None:
    """Mark the run as committed: written last, and only when every row is in the table.

    Raises RunFailed when another driver has marked it already, or a part is missing.
    """
    body = {
        "rows": counts.rows,
        "status": dict(sorted(counts.status.items())),
        "run_id": run["plan"]["run_id"],
        "bundle_sha256": run["identity"]["bundle"]["sha256"],
        "manifest_fingerprint": run["identity"]["manifest"]["fingerprint"],
        "settings": run["identity"]["settings"],
        "precision": sorted(precision),
        "engine": sorted(engine),
        "versions": run["provenance"]["versions"],
        # not all files in the folder: other programs add theirs, such as .DS_Store
        "files": layout.measure_parts(output, parse_plan(run).num_parts),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "steady_images_per_second": steady_rate and round(steady_rate, 2),
        "committed": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    data = (json.dumps(body, indent=2) + "\n").encode()
    layout.remove_unfinished_files(output)
    mark = filesystem.join(output, layout.SUCCESS_FILE)
    if filesystem.create(mark, data):
        return
    if filesystem.size(mark):
        raise RunFailed(f"output {output}: was committed by another driver; the table is intact")
    filesystem.write(mark, data)  # empty: a driver was killed while it created the file


@dataclass(frozen=True)
class ErrorLimits:
    """Limits on failed rows; see `PredictConfig`.

    max_errors: None for the default, which depends on `is_incremental`
    """

    max_error_rate: float
    max_error_rates: Mapping[ErrorStatus, float]
    max_errors: int | None
    is_incremental: bool


@contextlib.contextmanager
def store_refusal(run: Mapping[str, Any], output: str) -> Iterator[None]:
    """Store in `_run.json` that a quality gate within the block refused the run.

    run: the content of `_run.json`; an earlier refusal in it is removed when the run passes
    """
    try:
        yield
    except TooManyErrors as error:
        layout.write_run(output, {**run, "refused": str(error)})
        raise
    if "refused" in run:
        layout.write_run(output, {name: run[name] for name in run if name != "refused"})


def check_errors(
    output: str, plan: Plan, counts: RunCounts, path_column: str, limits: ErrorLimits
) -> None:
    """Raise TooManyErrors when too many rows failed."""
    max_errors = limits.max_errors
    if max_errors is None:
        max_errors = DEFAULT_MAX_ERRORS if limits.is_incremental else 0
    check_error_rates(
        output,
        counts,
        limits.max_error_rate,
        limits.max_error_rates,
        max_errors=max_errors,
        repeated=count_repeated_failures(output, plan, path_column),
    )


def check_error_rates(
    output: str,
    counts: RunCounts,
    allowed: float,
    by_status: Mapping[ErrorStatus, float],
    *,
    max_errors: int = 0,
    repeated: Mapping[str, int] | None = None,
) -> None:
    """Raise TooManyErrors when more rows failed than allowed, see `check_status_counts`."""
    check_status_counts(
        output,
        counts.status,
        allowed,
        by_status,
        max_errors=max_errors,
        repeated=repeated,
        outcome="the run is not committed. See metrics/errors.parquet",
    )


def count_repeated_failures(output: str, plan: Plan, path_column: str) -> Counter[str]:
    """Failed rows of a run, by status, whose image had failed before in the same version."""
    before = read_failed_before(output)
    counted: Counter[str] = Counter()
    if len(before):
        for failed in rollup.read_failed_rows(output, plan, path_column):
            known = failed.filter(pa.array(np.isin(failed["row"].to_numpy(), before)))
            counted.update(known["status"].cast(pa.string()).to_pylist())
    return counted


def check_drift(
    output: str, counts: RunCounts, reference: CommittedRun | None, max_psi: float | None
) -> None:
    """Write `metrics/drift.parquet`; raise TooManyErrors when predictions have drifted too far.

    The drift of embeddings, which has no limit, goes to `metrics/embedding_drift.parquet`.
    reference: run to compare with; None compares nothing
    max_psi: maximum population stability index; None allows any drift
    """
    if reference is None:
        return
    _measure_embedding_drift(output, reference)
    moved = compute_drift(counts, count_reference(reference))
    layout.write_tables(filesystem.join(output, layout.METRICS_FOLDER), {"drift": moved})
    for row in moved.to_pylist():
        log.emit(
            "drift",
            f"{row['of']}: PSI {row['psi']:.4f}, Jensen-Shannon "
            f"{row['jensen_shannon']:.4f} bits, from {reference.url}",
            **row,
        )
        if max_psi is not None and row["psi"] > max_psi:
            raise TooManyErrors(
                f"output {output}: {row['of']} has drifted from {reference.url} by a PSI of "
                f"{row['psi']:.3f} (allowed {max_psi:g}); the run is not committed. Check the new "
                "images and metrics/drift.parquet, then rerun with a higher --max-psi, or with "
                "another --reference"
            )


def count_reference(reference: CommittedRun) -> RunCounts:
    """Counts of the predictions of a reference; ValueError for one of a class that it lacks."""
    counter = TableCounter(reference.classes, task=reference.task)
    counts = counter.empty()
    for table in iter_tables(reference, counter.select_columns(reference.schema)):
        counts = merge_counts(counts, counter.count(table))
    return counts


def _measure_embedding_drift(output: str, reference: CommittedRun) -> None:
    """Write and log the drift of the embeddings, if both runs have those of the same bundle.

    It is the distance between two samples, and how often samples of one distribution are as far
    apart: `metrics/embedding_drift.parquet`.
    """
    run = layout.load_run(output)
    if run is None or not reference.is_made_by(run["identity"]["bundle"]["sha256"]):
        return
    folder = filesystem.join(output, layout.PREDICTIONS_FOLDER)
    parts = filter(layout.is_part_name, filesystem.list_names(folder))
    files = [filesystem.join(folder, name) for name in parts]
    if "embedding" not in reference.schema.names or not _has_embeddings(files):
        return
    now, then = (
        normalize_embeddings(sample_embeddings(each, _SAMPLED_EMBEDDINGS))
        for each in (files, reference.files)
    )
    if min(len(now), len(then)) < 2:
        return
    distance, p_value = maximum_mean_discrepancy(now, then)
    row = {"mmd": distance, "p_value": p_value, "rows": len(now), "reference_rows": len(then)}
    table = pa.Table.from_pylist([row])
    layout.write_tables(filesystem.join(output, layout.METRICS_FOLDER), {"embedding_drift": table})
    log.emit(
        "drift",
        f"embedding: squared maximum mean discrepancy {distance:.4f}, p {p_value:.3f}, from "
        f"{reference.url}",
        of="embedding",
        **row,
    )


def _has_embeddings(files: list[str]) -> bool:
    if not files:
        return False
    with filesystem.open_read(files[0]) as stream:
        return "embedding" in pq.read_schema(stream).names


def check_ood_share(output: str, counts: RunCounts, allowed: float | None) -> None:
    """Raise TooManyErrors when a larger share of rows is out of distribution than allowed."""
    if allowed is None:
        return
    share = counts.ood / counts.ood_rows if counts.ood_rows else 0.0
    if share > allowed:
        raise TooManyErrors(
            f"output {output}: {counts.ood:,} of {counts.ood_rows:,} images ({share:.2%}) are "
            f"unlike the training data (allowed {allowed:.2%}); the run is not committed. Look at "
            "those with is_ood in predictions/, then rerun with a higher --max-ood-share"
        )


def has_failed_rows(output: str) -> bool:
    """Whether a committed run has rows that `--retry-errors` processes again."""
    return any(count for status, count in read_status(output)["status"].items() if status != OK)


def remove_staging(output: str) -> None:
    """Remove the files that a committed run does not need."""
    for name in (layout.STAGING_FOLDER, layout.PROGRESS_FILE):
        filesystem.remove(filesystem.join(output, name))


@contextlib.contextmanager
def report_exit(url: str | None, output: str) -> Iterator[list[str]]:
    """Write how the block ended, whatever the exit code; see `docs/nightly.md` for the keys.

    url: of the JSON file; None writes nothing
    Yields a list to which the block adds the output folder of each run that it works on or finds
    committed; if it adds none, the state of `output` is reported.
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
    """Write `--summary-json`: how a command ended, and the state of its runs."""
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
        log.emit("note", f"summary_json: the output cannot be read: {error}")
    try:
        filesystem.write(url, (json.dumps(body, indent=2) + "\n").encode())
    except ImgclsError as error:
        log.emit("note", f"summary_json cannot be written: {error}")
