"""Readers of the outputs in a folder: a function per kind, each of which reads a few small files.

No table of predictions and no weights are read. A file that cannot be read makes an entry with the
reason, never an exception; only a store that does not answer raises.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq

from imgcls.data.storage import filesystem
from imgcls.errors import ImgclsError, StorageMissing, StorageUnavailable
from imgcls.evaluation.overview.entry import Headline, Kind, RunEntry
from imgcls.evaluation.overview.records import (
    UNREADABLE,
    EvaluationRecord,
    ProvenanceRecord,
    SelectionRecord,
    build_entry,
    check_size,
    explain_problem,
    format_time,
    get_section,
    get_text,
    name_file,
    read_record,
)
from imgcls.evaluation.overview.run_readers import choose_metric, read_run, read_unfinished
from imgcls.evaluation.overview.search import FoundFolder
from imgcls.models.bundle import BUNDLE_FILE, read_description
from imgcls.runs import layout
from imgcls.training.search_space import (
    BEST_FOLDER,
    RESULTS_FILE,
    SEARCH_FILE,
    parse_search_model,
)


def read_entry(folder: FoundFolder) -> RunEntry | None:
    """The output in a folder; None if its files are of another tool."""
    for marker, kind, reader in _READERS:
        if marker not in folder.files and marker not in folder.folders:
            continue
        try:
            check_size(folder.sizes.get(marker))
            entry = reader(folder)
        except StorageUnavailable:
            raise
        except UNREADABLE as error:
            entry = _build_damaged(folder, kind, marker, error)
        if entry is not None:
            return entry
    if layout.SUCCESS_FILE in folder.files:
        problem = (
            f"{layout.SUCCESS_FILE} without {layout.RUN_FILE}: of another tool, such as Spark, or "
            f"{layout.RUN_FILE} was removed"
        )
        return build_entry(folder, "unknown", "foreign", problem=problem)
    return None


def _read_bundle(folder: FoundFolder) -> RunEntry:
    bundle = read_description(folder.url)
    spec, made = bundle.spec, bundle.spec.provenance
    stored = ProvenanceRecord.model_validate(made)
    data = get_section(made, "data")
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
    return build_entry(
        folder,
        "bundle",
        "finished",
        task=spec.task,
        model=folder.url,
        bundle_sha256=bundle.sha256,
        manifest=source,
        fingerprint=get_text(data, "manifests", "data.train", "fingerprint"),
        rows=rows if isinstance(rows, int) else None,
        date=own or format_time(folder.files.get(BUNDLE_FILE)),
        headline=headline,
        versions=stored.versions,
        git_commit=stored.git_commit,
        record={
            **made,
            "architecture": spec.architecture.model_dump(mode="json"),
            "num_classes": len(spec.classes),
        },
    )


def read_bundle_entry(url: str) -> RunEntry | str:
    """The entry of a bundle anywhere; the reason if it cannot be read."""
    try:
        return _read_bundle(FoundFolder(url, url, {}, frozenset()))  # the path is not in a search
    except UNREADABLE as error:
        return explain_problem(error)


def _read_training(folder: FoundFolder) -> RunEntry | None:
    """An unfinished training; None for a folder of another tool that has the same name."""
    place = f"{layout.CHECKPOINT_FOLDER}/{layout.IDENTITY_FILE}"
    try:
        stored = read_record(folder, place)
    except StorageMissing:
        return None
    known = {
        "manifest": get_text(stored, "settings", "data", "train", "path"),
        "fingerprint": get_text(stored, "data", "data.train"),
        "record": stored,
    }
    return read_unfinished(folder, "training", None, known)


def _read_tune(folder: FoundFolder) -> RunEntry:
    text = filesystem.read(filesystem.join(folder.url, SEARCH_FILE)).decode()
    stored, _ = json.JSONDecoder().raw_decode(text)  # the search space follows
    registered = parse_search_model(text)
    known: dict[str, Any] = {
        "manifest": get_text(stored, "data", "train", "path"),
        "date": format_time(folder.files.get(SEARCH_FILE)),
        "record": stored | ({} if registered is None else {"registered_model": registered}),
    }
    best = filesystem.join(folder.url, BEST_FOLDER)
    # the table is written first, and the description of the best bundle last
    if RESULTS_FILE not in folder.files or not filesystem.exists(
        filesystem.join(best, BUNDLE_FILE)
    ):
        return read_unfinished(folder, "tune", None, known)
    with name_file(RESULTS_FILE):
        known["headline"] = _read_best_metric(folder)
    known |= {
        "model": best,
        "bundle_sha256": read_description(best).sha256,
        "date": format_time(folder.files.get(RESULTS_FILE)),
    }
    return build_entry(folder, "tune", "finished", **known)


def _read_best_metric(folder: FoundFolder) -> Headline | None:
    """The metric of the best trial, the first one in the results of a search."""
    data = filesystem.read(filesystem.join(folder.url, RESULTS_FILE))
    best = pq.read_table(io.BytesIO(data)).slice(0, 1).to_pylist()
    for name in ("val_mean_average_precision", "val_accuracy"):
        value = best[0].get(name) if best else None
        if value is not None:
            return Headline(name, float(value)) if math.isfinite(value) else None
    return None


# ---------------------------------------------------------------------- results about runs


def _read_summary(folder: FoundFolder) -> RunEntry | None:
    """An evaluation or a comparison; None for a summary.json of another tool."""
    try:
        stored = read_record(folder, layout.SUMMARY_FILE)
    except ValueError:
        if layout.METRICS_FOLDER in folder.folders:
            raise
        return None
    date = format_time(folder.files.get(layout.SUMMARY_FILE))
    if {"run_a", "run_b"} <= stored.keys():
        return build_entry(folder, "comparison", "finished", date=date, record=stored)
    if not {"run", "metrics"} <= stored.keys():
        return None
    found = EvaluationRecord.model_validate(stored)
    return build_entry(
        folder,
        "evaluation",
        "finished",
        bundle_sha256=found.bundle_sha256,
        fingerprint=found.manifest_fingerprint,
        rows=found.rows,
        date=date,
        headline=choose_metric(found.metrics, None),
        record=stored,
    )


def _read_selection(folder: FoundFolder) -> RunEntry:
    with name_file(layout.SUMMARY_FILE):
        stored = read_record(folder, layout.SUMMARY_FILE)
        found = SelectionRecord.model_validate(stored)
    return build_entry(
        folder,
        "selection",
        "finished",
        bundle_sha256=found.bundle_sha256,
        rows=found.rows,
        date=format_time(folder.files.get(layout.SELECTION_FILE)),
        record=stored,
    )


def _build_damaged(folder: FoundFolder, kind: Kind, marker: str, error: Exception) -> RunEntry:
    problem = explain_problem(error)
    if not isinstance(error, ImgclsError):
        problem = f"{marker}: {problem}"
    return build_entry(
        folder, kind, "damaged", problem=problem, date=format_time(folder.files.get(marker))
    )


_READERS: tuple[tuple[str, Kind, Callable[[FoundFolder], RunEntry | None]], ...] = (
    (layout.RUN_FILE, "unknown", read_run),
    (BUNDLE_FILE, "bundle", _read_bundle),
    (SEARCH_FILE, "tune", _read_tune),
    (layout.CHECKPOINT_FOLDER, "training", _read_training),
    (layout.SELECTION_FILE, "selection", _read_selection),
    (layout.SUMMARY_FILE, "evaluation", _read_summary),
)
"""File or folder that marks an output, its kind if it cannot be read, and its reader; the first one
that finds an output counts."""
