"""Readers of the outputs in a folder: a function per kind, each of which reads a few small files.

No table of predictions and no weights are read. A file that cannot be read makes an entry with the
reason, never an exception; only a store that does not answer raises.
"""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from imgcls.data.storage import filesystem
from imgcls.errors import (
    ImgclsError,
    StorageError,
    StorageMissing,
    StorageUnavailable,
    one_line,
)
from imgcls.evaluation.overview.entry import Headline, Kind, RunEntry, State
from imgcls.evaluation.overview.search import FoundFolder
from imgcls.evaluation.result import SUMMARY_FILE
from imgcls.evaluation.select import SELECTION_FILE
from imgcls.models.bundle import BUNDLE_FILE, read_description
from imgcls.runs import layout, lease
from imgcls.training.search_space import BEST_FOLDER, RESULTS_FILE, SEARCH_FILE

_REPORT_FILE = "report.html"
_LABELED_METRIC = "labelled"
_UNREADABLE = (ImgclsError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException)


class _Stored(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _ManifestIdentity(_Stored):
    fingerprint: str


class _BundleIdentity(_Stored):
    sha256: str | None = None


class _Identity(_Stored):
    manifest: _ManifestIdentity
    bundle: _BundleIdentity = _BundleIdentity()
    settings: dict[str, Any] = {}
    merged: list[str] = []


class _PlanRecord(_Stored):
    rows: int


class _ProvenanceRecord(_Stored):
    created: str | None = None
    config: dict[str, Any] = {}
    git_commit: str | None = None
    versions: dict[str, str] = {}


class _RegisteredRecord(_Stored):
    name: str
    version: str


class _RunRecord(_Stored):
    """What an entry needs of `_run.json`."""

    identity: _Identity
    plan: _PlanRecord
    provenance: _ProvenanceRecord = _ProvenanceRecord()
    task: Literal["single_label", "multilabel"] = "single_label"
    began: str | None = None
    refused: str | None = None
    registered_model: _RegisteredRecord | None = None


class _SuccessRecord(_Stored):
    """What an entry needs of `_SUCCESS`."""

    rows: int
    status: dict[str, int]
    committed: str
    seconds: dict[str, float] = {}
    steady_images_per_second: float | None = None
    versions: dict[str, str] = {}


class _MetricRecord(_Stored):
    value: float
    lower: float | None = None
    upper: float | None = None


class _EvaluationRecord(_Stored):
    """What an entry needs of the summary.json of an evaluation."""

    run: str
    rows: int
    bundle_sha256: str | None = None
    manifest_fingerprint: str | None = None
    metrics: dict[str, _MetricRecord]


class _SelectionRecord(_Stored):
    run: str
    rows: int
    bundle_sha256: str | None = None


def read_entries(folder: FoundFolder) -> list[RunEntry]:
    """The outputs that lie in one folder: usually one."""
    entries = []
    for marker, kind, reader in _READERS:
        if marker not in folder.files and marker not in folder.folders:
            continue
        try:
            entry = reader(folder)
        except StorageUnavailable:
            raise
        except _UNREADABLE as error:
            entry = _build_damaged(folder, kind, marker, error)
        if entry is not None:
            entries.append(entry)
        if entries:
            break
    if not entries and layout.SUCCESS_FILE in folder.files:
        problem = (
            f"{layout.SUCCESS_FILE} without {layout.RUN_FILE}: of another tool, such as Spark, or "
            f"{layout.RUN_FILE} was removed"
        )
        entries.append(_build_entry(folder, "unknown", "foreign", problem=problem))
    return entries


def _build_entry(folder: FoundFolder, kind: Kind, state: State, **values: Any) -> RunEntry:
    has_report = _REPORT_FILE in folder.files
    return RunEntry(
        kind=kind, state=state, path=folder.path, url=folder.url, has_report=has_report, **values
    )


def _build_damaged(folder: FoundFolder, kind: Kind, marker: str, error: Exception) -> RunEntry:
    problem = _explain(error)
    if not isinstance(error, ImgclsError):
        problem = f"{marker}: {problem}"
    return _build_entry(
        folder, kind, "damaged", problem=problem, date=_format_time(folder.files.get(marker))
    )


def _explain(error: Exception) -> str:
    """The reason on one line, with the key of a wrong value."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"is not a record of imgcls ({place}: {first['msg']})"
    if isinstance(error, (KeyError, TypeError, AttributeError)):
        return f"is not a record of imgcls ({type(error).__name__}: {one_line(error)})"
    return one_line(error)


# ---------------------------------------------------------------------- runs


def _read_run(folder: FoundFolder) -> RunEntry:
    stored = layout.load_run(folder.url)
    if stored is None:
        raise StorageMissing(f"{folder.url}: {layout.RUN_FILE} was removed meanwhile")
    run = _RunRecord.model_validate(stored)
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
        return _read_unfinished(folder, kind, run.refused, known)
    try:
        known |= _read_success(folder)
    except StorageUnavailable:
        raise
    except _UNREADABLE as error:
        problem = layout.damaged_success_message(folder.url, _explain(error))
        return _build_entry(folder, kind, "damaged", problem=problem, **known)
    if kind == "history":  # its _SUCCESS has those of the last run that was merged
        known |= {"seconds": None, "images_per_second": None}
    problems: list[str] = []
    if layout.METRICS_FOLDER in folder.folders:
        known["headline"] = _read_metric(folder, run.task, problems)
        if config.get("reference") is not None:
            known["psi"] = _read_psi(folder, problems)
    return _build_entry(folder, kind, "committed", problem="; ".join(problems) or None, **known)


def _is_committed(folder: FoundFolder) -> bool:
    return layout.SUCCESS_FILE in folder.files and layout.is_committed(folder.url)


def _read_unfinished(
    folder: FoundFolder, kind: Kind, refused: str | None, known: Mapping[str, Any]
) -> RunEntry:
    if _has_driver(folder):
        return _build_entry(folder, kind, "running", **known)
    state: State = "refused" if refused else "waiting"
    return _build_entry(folder, kind, state, problem=refused, **known)


def _has_driver(folder: FoundFolder) -> bool:
    """Whether a living driver holds the lease; takes seconds if it runs on another machine."""
    if lease.LEASE_FOLDER not in folder.folders:
        return False
    holder = lease.find_holder(folder.url)
    return holder is not None and holder.is_alive


def _read_success(folder: FoundFolder) -> dict[str, Any]:
    data = _read_json(folder, layout.SUCCESS_FILE)
    success = _SuccessRecord.model_validate(data)
    rows = sum(success.status.values())
    return {
        "rows": success.rows,
        "date": success.committed,
        "seconds": success.seconds.get("wall"),
        "images_per_second": success.steady_images_per_second,
        "error_rate": 1 - success.status.get("ok", 0) / rows if rows else None,
        **({"versions": success.versions} if success.versions else {}),
    }


def _read_metric(folder: FoundFolder, task: str, problems: list[str]) -> Headline | None:
    """The main metric in `metrics/summary.parquet`; a problem is added to `problems`."""
    table = _read_metric_table(folder, "summary", problems)
    if table is None:
        return None
    try:
        rows = {row["metric"]: row for row in table.to_pylist()}
        return _choose_metric({name: _MetricRecord(**row) for name, row in rows.items()}, task)
    except _UNREADABLE as error:
        problems.append(f"{layout.METRICS_FOLDER}/summary.parquet: {_explain(error)}")
        return None


def _choose_metric(metrics: Mapping[str, _MetricRecord], task: str | None) -> Headline | None:
    multilabel = "mean_average_precision"
    is_multilabel = task == "multilabel" or (task is None and multilabel in metrics)
    name = multilabel if is_multilabel else "accuracy"
    found, labeled = metrics.get(name), metrics.get(_LABELED_METRIC)
    if found is None:
        return None
    rows = None if labeled is None else int(labeled.value)
    return Headline(name, found.value, found.lower, found.upper, rows)


def _read_psi(folder: FoundFolder, problems: list[str]) -> float | None:
    table = _read_metric_table(folder, "drift", problems)
    if table is None or not table.num_rows:
        return None
    try:
        return max(float(value) for value in table["psi"].to_pylist())
    except _UNREADABLE as error:
        problems.append(f"{layout.METRICS_FOLDER}/drift.parquet: {_explain(error)}")
        return None


def _read_metric_table(folder: FoundFolder, name: str, problems: list[str]) -> pa.Table | None:
    """A table of `metrics/`; None if there is none, or with a problem if it cannot be read."""
    url = filesystem.join(folder.url, layout.METRICS_FOLDER, f"{name}.parquet")
    try:
        return pq.read_table(io.BytesIO(filesystem.read(url)))
    except StorageMissing:
        return None
    except StorageUnavailable:
        raise
    except (StorageError, pa.ArrowException, OSError) as error:
        problems.append(f"{layout.METRICS_FOLDER}/{name}.parquet: {one_line(error)}")
        return None


# ---------------------------------------------------------------------- models


def _read_bundle(folder: FoundFolder) -> RunEntry:
    bundle = read_description(folder.url)
    spec, made = bundle.spec, bundle.spec.provenance
    stored = _ProvenanceRecord.model_validate(made)
    data = made.get("data") if isinstance(made.get("data"), dict) else {}
    assert isinstance(data, dict)
    source = get_text(data, "manifests", "data.train", "manifest")
    own = stored.created if "calibration" not in made else None  # that of its parent
    name = f"val_{'mean_average_precision' if spec.task == 'multilabel' else 'accuracy'}"
    headline = None
    if name in spec.metrics:
        rows = data.get("val_rows")
        failed = data.get("val_failed")
        count = rows - failed if isinstance(rows, int) and isinstance(failed, int) else None
        headline = Headline(name, spec.metrics[name], rows=count)
    rows = data.get("train_rows")
    return _build_entry(
        folder,
        "bundle",
        "finished",
        task=spec.task,
        model=folder.url,
        bundle_sha256=bundle.sha256,
        manifest=source,
        fingerprint=get_text(data, "manifests", "data.train", "fingerprint"),
        rows=rows if isinstance(rows, int) else None,
        date=own or _format_time(folder.files.get(BUNDLE_FILE)),
        headline=headline,
        versions=stored.versions,
        git_commit=stored.git_commit,
        record={
            **made,
            "architecture": spec.architecture.model_dump(mode="json"),
            "num_classes": len(spec.classes),
        },
    )


def read_bundle_entry(url: str) -> RunEntry | None:
    """The entry of a bundle anywhere; None if there is none that can be read."""
    try:
        return _read_bundle(FoundFolder(url, url, {}, frozenset()))  # the path is not in a search
    except _UNREADABLE:
        return None


def _read_training(folder: FoundFolder) -> RunEntry:
    """An unfinished training."""
    place = f"{layout.CHECKPOINT_FOLDER}/{layout.IDENTITY_FILE}"
    stored = _read_json(folder, place)
    return _build_entry(
        folder,
        "training",
        "running" if _has_driver(folder) else "waiting",
        manifest=get_text(stored, "settings", "data", "train", "path"),
        fingerprint=get_text(stored, "data", "data.train"),
        record=stored,
    )


def _read_tune(folder: FoundFolder) -> RunEntry:
    text = filesystem.read(filesystem.join(folder.url, SEARCH_FILE)).decode()
    stored, _ = json.JSONDecoder().raw_decode(text)  # the search space follows
    known: dict[str, Any] = {
        "manifest": get_text(stored, "data", "train", "path"),
        "date": _format_time(folder.files.get(SEARCH_FILE)),
        "record": stored,
    }
    if RESULTS_FILE not in folder.files:
        return _read_unfinished(folder, "tune", None, known)
    data = filesystem.read(filesystem.join(folder.url, RESULTS_FILE))
    best = pq.read_table(io.BytesIO(data)).slice(0, 1).to_pylist()
    names = ("val_mean_average_precision", "val_accuracy")
    name = next((each for each in names if best and best[0].get(each) is not None), None)
    if name is not None:
        known["headline"] = Headline(name, float(best[0][name]))
    if BEST_FOLDER in folder.folders:
        url = filesystem.join(folder.url, BEST_FOLDER)
        known |= {"model": url, "bundle_sha256": read_description(url).sha256}
    known["date"] = _format_time(folder.files.get(RESULTS_FILE))
    return _build_entry(folder, "tune", "finished", **known)


# ---------------------------------------------------------------------- results about runs


def _read_summary(folder: FoundFolder) -> RunEntry | None:
    """An evaluation or a comparison; None for a summary.json of another tool."""
    try:
        stored = _read_json(folder, SUMMARY_FILE)
    except ValueError:
        if layout.METRICS_FOLDER in folder.folders:
            raise
        return None
    date = _format_time(folder.files.get(SUMMARY_FILE))
    if {"run_a", "run_b"} <= stored.keys():
        return _build_entry(folder, "comparison", "finished", date=date, record=stored)
    if not {"run", "metrics"} <= stored.keys():
        return None
    found = _EvaluationRecord.model_validate(stored)
    return _build_entry(
        folder,
        "evaluation",
        "finished",
        bundle_sha256=found.bundle_sha256,
        fingerprint=found.manifest_fingerprint,
        rows=found.rows,
        date=date,
        headline=_choose_metric(found.metrics, None),
        record=stored,
    )


def _read_selection(folder: FoundFolder) -> RunEntry:
    stored = _read_json(folder, SUMMARY_FILE)
    found = _SelectionRecord.model_validate(stored)
    return _build_entry(
        folder,
        "selection",
        "finished",
        bundle_sha256=found.bundle_sha256,
        rows=found.rows,
        date=_format_time(folder.files.get(SELECTION_FILE)),
        record=stored,
    )


_READERS: tuple[tuple[str, Kind, Callable[[FoundFolder], RunEntry | None]], ...] = (
    (layout.RUN_FILE, "unknown", _read_run),
    (BUNDLE_FILE, "bundle", _read_bundle),
    (SEARCH_FILE, "tune", _read_tune),
    (layout.CHECKPOINT_FOLDER, "training", _read_training),
    (SELECTION_FILE, "selection", _read_selection),
    (SUMMARY_FILE, "evaluation", _read_summary),
)
"""File or folder that marks an output, its kind if it cannot be read, and its reader; the first one
that finds an output counts."""


def get_text(tree: Any, *keys: str) -> str | None:
    """A text in nested records; None where a key is missing or the value is no text."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree if isinstance(tree, str) else None


def _read_json(folder: FoundFolder, name: str) -> dict[str, Any]:
    stored = json.loads(filesystem.read(filesystem.join(folder.url, name)))
    if not isinstance(stored, dict):
        raise ValueError(f"is a {type(stored).__name__}, not an object")
    return stored


def _format_time(time: datetime.datetime | None) -> str | None:
    return None if time is None else time.astimezone(datetime.UTC).isoformat(timespec="seconds")
