"""Readers of runs: `_run.json`, `_SUCCESS`, the lease, and two small tables of metrics."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.storage import filesystem
from imgcls.errors import StorageMissing, StorageUnavailable
from imgcls.evaluation.overview.entry import Headline, Kind, RunEntry, State
from imgcls.evaluation.overview.records import (
    UNREADABLE,
    MetricRecord,
    RunRecord,
    SuccessRecord,
    build_entry,
    check_size,
    explain_problem,
    get_text,
    read_record,
)
from imgcls.evaluation.overview.search import FoundFolder
from imgcls.runs import layout, lease

_LABELED_METRIC = "labelled"
ValueT = TypeVar("ValueT")


def read_run(folder: FoundFolder) -> RunEntry:
    """A run: of predictions, embeddings or merged rows."""
    stored = layout.load_run(folder.url)
    if stored is None:
        raise StorageMissing(f"{folder.url}: {layout.RUN_FILE} was removed meanwhile")
    run = RunRecord.model_validate(stored)
    config = run.provenance.config
    registered = run.registered_model
    known: dict[str, Any] = {
        "task": run.task,
        "model": get_text(config, "model"),
        "bundle_sha256": run.identity.bundle.sha256,
        "registered": None if registered is None else f"{registered.name} v{registered.version}",
        "manifest": get_text(config, "manifest", "path"),
        "fingerprint": run.identity.manifest.fingerprint,
        "rows": run.plan.rows,
        "date": run.began or run.provenance.created,
        "versions": run.provenance.versions,
        "git_commit": run.provenance.git_commit,
        "record": stored,
    }
    kind: Kind = "predictions"
    if run.identity.merged:
        kind = "history"
    elif not run.identity.settings.get("has_predictions", True):
        kind = "embeddings"
    if not _is_committed(folder):
        return read_unfinished(folder, kind, run.refused, known)
    try:
        known |= _read_success(folder)
    except StorageUnavailable:
        raise
    except UNREADABLE as error:
        problem = layout.damaged_success_message(folder.url, explain_problem(error))
        return build_entry(folder, kind, "damaged", problem=problem, **known)
    if kind == "history":  # its _SUCCESS has those of the last run that was merged
        known |= {"seconds": None, "images_per_second": None}
    problems: list[str] = []
    if layout.METRICS_FOLDER in folder.folders:
        parse = partial(_parse_metric, task=run.task)
        known["headline"] = _read_metric_table(folder, "summary", problems, parse)
        if config.get("reference") is not None:
            known["psi"] = _read_metric_table(folder, "drift", problems, _parse_psi)
    return build_entry(folder, kind, "committed", problem="; ".join(problems) or None, **known)


def _is_committed(folder: FoundFolder) -> bool:
    return layout.SUCCESS_FILE in folder.files and layout.is_committed(folder.url)


def read_unfinished(
    folder: FoundFolder, kind: Kind, refused: str | None, known: Mapping[str, Any]
) -> RunEntry:
    """An output that is not finished: running, refused or waiting."""
    is_running, problem = find_driver(folder)
    if is_running:
        return build_entry(folder, kind, "running", **known)
    state: State = "refused" if refused else "waiting"
    problems = "; ".join(each for each in (refused, problem) if each)
    return build_entry(folder, kind, state, problem=problems or None, **known)


def find_driver(folder: FoundFolder) -> tuple[bool, str | None]:
    """Whether a living driver holds the lease, and why that is not known.

    Takes seconds if it runs on another machine.
    """
    if lease.LEASE_FOLDER not in folder.folders:
        return False, None
    try:
        holder = lease.find_holder(folder.url)
    except StorageUnavailable:
        raise
    except UNREADABLE as error:
        return False, f"{lease.LEASE_FOLDER}: {explain_problem(error)}"
    return holder is not None and holder.is_alive, None


def _read_success(folder: FoundFolder) -> dict[str, Any]:
    data = read_record(folder, layout.SUCCESS_FILE)
    success = SuccessRecord.model_validate(data)
    rows = sum(success.status.values())
    return {
        "rows": success.rows,
        "date": success.committed,
        "seconds": success.seconds.get("wall"),
        "images_per_second": success.steady_images_per_second,
        "error_rate": 1 - success.status.get("ok", 0) / rows if rows else None,
        **({"versions": success.versions} if success.versions else {}),
    }


def _parse_metric(table: pa.Table, task: str) -> Headline | None:
    """The main metric in `metrics/summary.parquet`."""
    rows = {row["metric"]: row for row in table.to_pylist()}
    return choose_metric({name: MetricRecord(**row) for name, row in rows.items()}, task)


def choose_metric(metrics: Mapping[str, MetricRecord], task: str | None) -> Headline | None:
    """The main metric of a task; None if it is not there. Raises ValueError if it is not finite."""
    multilabel = "mean_average_precision"
    is_multilabel = task == "multilabel" or (task is None and multilabel in metrics)
    name = multilabel if is_multilabel else "accuracy"
    found, labeled = metrics.get(name), metrics.get(_LABELED_METRIC)
    if found is None:
        return None
    rows = None if labeled is None else int(labeled.value)
    if not math.isfinite(found.value):
        raise ValueError(f"{name} is {found.value}")
    lower, upper = (
        None if end is None or not math.isfinite(end) else end for end in (found.lower, found.upper)
    )
    return Headline(name, found.value, lower, upper, rows)


def _parse_psi(table: pa.Table) -> float | None:
    """The largest PSI in `metrics/drift.parquet`; raises ValueError if it is not finite."""
    if not table.num_rows:
        return None
    psi = max(float(value) for value in table["psi"].to_pylist())
    if not math.isfinite(psi):
        raise ValueError(f"psi is {psi}")
    return psi


def _read_metric_table(
    folder: FoundFolder, name: str, problems: list[str], parse: Callable[[pa.Table], ValueT | None]
) -> ValueT | None:
    """What `parse` finds in a table of `metrics/`; None if there is no such table.

    A table that cannot be read or parsed adds a problem.
    """
    place = f"{layout.METRICS_FOLDER}/{name}.parquet"
    url = filesystem.join(folder.url, place)
    try:
        check_size(filesystem.size(url))
        return parse(pq.read_table(io.BytesIO(filesystem.read(url))))
    except StorageMissing:
        return None
    except StorageUnavailable:
        raise
    except (*UNREADABLE, OSError) as error:
        problems.append(f"{place}: {explain_problem(error)}")
        return None
