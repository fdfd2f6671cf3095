"""HTML report of a run or a training, in one file that opens from disk without a server.

The numbers come from `compute`, the layout from the templates.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import yaml

from imgcls import log
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.data.thumbnails import build_thumbnails
from imgcls.errors import RequestError, StorageError
from imgcls.evaluation import charts, confusion_plot
from imgcls.evaluation.compute import Evaluation, compute_evaluation
from imgcls.evaluation.config import ReportConfig
from imgcls.html import render_page
from imgcls.metrics import tables
from imgcls.metrics.formatting import (
    format_interval,
    format_percent,
    format_value,
    list_headlines,
)
from imgcls.metrics.registry import find_headline
from imgcls.models.bundle import BUNDLE_FILE, Bundle, read_description

REPORT_FILE = "report.html"
MAX_CLASSES_SHOWN = 1_000
MAX_SLICES_SHOWN = 300
MAX_NOTEBOOK_IMAGES = 8
_TEMPLATES = "imgcls.evaluation"


@with_config_storage
def write_report(config: ReportConfig) -> str:
    """Write the report of a run or a trained bundle.

    Parameters
    ----------
    config : ReportConfig
        Settings of `imgcls report`.

    Returns
    -------
    str
        URL of the report.

    Raises
    ------
    RequestError
        If the source is neither a run nor a trained bundle.
    """
    source = filesystem.absolute(config.source)
    target = config.output or filesystem.join(source, REPORT_FILE)
    if filesystem.exists(filesystem.join(source, BUNDLE_FILE)):
        text = render_training(read_description(source))
    else:
        text = render_run(compute_evaluation(source, config.evaluation, need_labels=False))
    filesystem.write(target, text.encode())
    log.show(f"report  {target}")
    return target


def render_run(evaluation: Evaluation) -> str:
    """Render the report of a run."""
    counts, run = evaluation.aggregate.counts, evaluation.run
    values = _build_overview(evaluation) | {
        "subtitle": f"{len(run.classes):,} classes, committed {run.success_record['committed']}",
        "omitted": evaluation.omitted,
        "slices": evaluation.slices.to_pylist()[:MAX_SLICES_SHOWN],
        "small_slice": evaluation.config.small_slice,
        "has_ranking": "auroc" in evaluation.per_class.schema.names,
        "errors": [
            {"status": status, "rows": rows, "share": rows / counts.rows}
            for status, rows in sorted(counts.status.items(), key=lambda item: -item[1])
            if status != "ok"
        ],
        "metrics": [
            {
                "name": metric.name,
                "value": format_value(metric.name, metric.value),
                "interval": format_interval(metric.name, metric.interval),
                "description": metric.description,
            }
            for metric in evaluation.metrics
        ],
        "provenance": list(_list_provenance(evaluation)),
        "config": yaml.safe_dump(run.provenance["config"], sort_keys=False),
        "percent": _format_percent,
    }
    values |= _build_class_rows(evaluation.per_class, evaluation.has_labels)
    lists = {
        "mistakes": evaluation.mistakes,
        "issues": evaluation.label_issues.slice(0, evaluation.config.gallery),
        "uncertain": evaluation.uncertain,
        "strangest": evaluation.strangest,
    }
    values |= _build_map(evaluation, lists)
    values["issue_count"] = evaluation.label_issues.num_rows
    values["sections"] = list(_list_sections(values))
    return render_page(_TEMPLATES, "run.html.j2", values)


def render_notebook(evaluation: Evaluation) -> str:
    """Render a notebook summary: headline numbers, confusion matrix, curves, worst mistakes."""
    lists = {"mistakes": evaluation.mistakes.slice(0, MAX_NOTEBOOK_IMAGES)}
    try:
        galleries = _build_galleries(evaluation, lists)
    except StorageError:  # the images cannot be read any more
        galleries = _build_galleries(evaluation, {})
    values = _build_overview(evaluation) | galleries
    return render_page(_TEMPLATES, "notebook.html.j2", values)


def render_training(bundle: Bundle) -> str:
    """Render the report of a training: curves, epochs and augmented samples.

    Raises RequestError if `imgcls train` did not make the bundle.
    """
    import pandas as pd

    url, spec = bundle.url, bundle.spec
    history_url = filesystem.join(url, "history.parquet")
    if not filesystem.exists(history_url):
        raise RequestError(
            f"{url}: is a bundle without a training history (history.parquet); pass a bundle of "
            "`imgcls train`, or the output folder of `imgcls predict`"
        )
    with filesystem.open_read(history_url) as stream:
        history = pd.read_parquet(stream)
    augmented = None
    if filesystem.exists(filesystem.join(url, "plots", "augmented.png")):
        data = filesystem.read(filesystem.join(url, "plots", "augmented.png"))
        augmented = "data:image/png;base64," + base64.b64encode(data).decode()
    best = int(spec.metrics.get("epoch", history["epoch"].iloc[-1]))
    provenance = [
        ("bundle", f"{url} (SHA-256 {bundle.sha256})"),
        ("architecture", spec.architecture.name),
        ("classes", f"{len(spec.classes):,}"),
        *((name, json.dumps(value)) for name, value in _iter_scalars(spec.provenance)),
    ]
    return render_page(
        _TEMPLATES,
        "training.html.j2",
        {
            "title": f"{_base_name(url)}: {spec.architecture.name}, {len(spec.classes):,} classes",
            "subtitle": f"{len(history)} epochs, weights of epoch {best}",
            "cards": [
                {"name": name.replace("_", " "), "value": _format_cell(name, value), "note": ""}
                for name, value in spec.metrics.items()
            ],
            "curves": charts.plot_training_curves(history, best),
            "columns": list(history.columns),
            "epochs": [
                [{"value": value, "text": _format_cell(name, value)} for name, value in row.items()]
                for row in history.to_dict("records")
            ],
            "augmented": augmented,
            "provenance": provenance,
            "config": yaml.safe_dump(spec.provenance.get("config", {}), sort_keys=False),
        },
    )


def _build_overview(evaluation: Evaluation) -> dict[str, Any]:
    """Common part of the report and the notebook: title, cards, confusion matrix, charts."""
    counts = evaluation.aggregate.counts
    values: dict[str, Any] = {
        "title": f"{_base_name(evaluation.run.url)}: {counts.rows:,} rows",
        "has_labels": evaluation.has_labels,
        "cards": list(_build_cards(evaluation)),
        "histogram": charts.plot_confidence_histogram(counts),
    }
    if evaluation.has_labels:
        values |= _build_confusion(evaluation)
        values["reliability"] = charts.plot_reliability(tables.build_calibration(counts))
        values["coverage"] = charts.plot_coverage(evaluation.coverage_curve)
    return values


def _build_cards(evaluation: Evaluation) -> Iterator[dict[str, str]]:
    metrics = {metric.name: metric for metric in evaluation.metrics}
    for name in list_headlines(list(metrics)):
        yield {
            "name": find_headline(name) or name,
            "value": format_value(name, metrics[name].value),
            "note": format_interval(name, metrics[name].interval),
        }


def _build_class_rows(table: pa.Table, has_labels: bool) -> dict[str, Any]:
    by = "support" if has_labels else "predicted"
    rows = table.sort_by([(by, "descending")]).slice(0, MAX_CLASSES_SHOWN).to_pylist()
    return {"classes": rows, "omitted_classes": table.num_rows - len(rows)}


def _build_confusion(evaluation: Evaluation) -> dict[str, Any]:
    counts = evaluation.aggregate.counts
    small = confusion_plot.build_matrix(counts, confusion_plot.MAX_TABLE_CLASSES)
    cells = [
        {
            "name": name,
            "cells": [
                {
                    "text": f"{number:,}" if number else "",
                    "is_correct": row == column,
                    "strength": f"{min(0.85, float(share) ** 0.5 * 0.8):.2f}",
                }
                for column, (number, share) in enumerate(zip(numbers, shares, strict=True))
            ],
        }
        for row, (name, numbers, shares) in enumerate(
            zip(small.classes, small.counts, small.shares, strict=True)
        )
    ]
    large = None
    if small.omitted_classes:
        large = confusion_plot.build_matrix(counts, confusion_plot.MAX_PLOT_CLASSES)
    return {
        "pairs": [
            pair | {"share_text": format_percent(pair["share"], 1)}
            for pair in confusion_plot.find_worst_pairs(counts, 30)
        ],
        "small": small,
        "cells": cells,
        "matrix": large,
        "picture": confusion_plot.render_matrix(large) if large is not None else None,
    }


def _build_galleries(evaluation: Evaluation, lists: Mapping[str, pa.Table]) -> dict[str, Any]:
    """Images of each list of rows, read in one go."""
    paths = [path for table in lists.values() for path in table["path"].to_pylist()]
    thumbnails: Sequence[str | None] = [None] * len(paths)
    if evaluation.config.thumbnails:
        thumbnails = build_thumbnails(paths, evaluation.run.root)
    values: dict[str, Any] = {}
    start = 0
    for name, table in lists.items():
        values[name] = [
            {
                "image": thumbnail,
                "alt": f"{row['path']}, predicted {row['predicted_label']}",
                "predicted": row["predicted_label"],
                "confidence": _format_percent(row["confidence"]),
                "label": row["label"],
                "label_score": _format_percent(row["label_score"]),
                "path": row["path"],
            }
            for row, thumbnail in zip(table.to_pylist(), thumbnails[start:], strict=False)
        ]
        start += table.num_rows
    return values


def _build_map(evaluation: Evaluation, lists: Mapping[str, pa.Table]) -> dict[str, Any]:
    """The galleries, with those of clusters, and the embedding map of a run with embeddings."""
    found = evaluation.embedding_map
    if found is None:
        return {**_build_galleries(evaluation, lists), "map": None}
    names = [f"cluster{number}" for number in range(len(found.clusters))]
    pictures = {name: each.images for name, each in zip(names, found.clusters, strict=True)}
    galleries = _build_galleries(evaluation, {**lists, **pictures})
    return {
        **galleries,
        "map": charts.plot_embedding_map(found.points, found.predicted),
        "map_rows": len(found.points),
        "map_explained": _format_percent(found.explained),
        "clusters": [
            {
                "rows": each.rows,
                "share": _format_percent(each.share),
                "label": each.label,
                "purity": _format_percent(each.purity),
                "accuracy": _format_percent(each.accuracy),
                "confidence": _format_percent(each.mean_confidence),
                "images": galleries[name],
            }
            for name, each in zip(names, found.clusters, strict=True)
        ],
    }


def _list_sections(values: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    sections = {
        "confusion": ("Confusion matrix", values["has_labels"]),
        "calibration": ("Calibration", True),
        "slices": ("Slices", values["slices"]),
        "classes": ("Classes", True),
        "mistakes": ("Worst mistakes", values["mistakes"]),
        "issues": ("Possible label errors", values["issues"]),
        "uncertain": ("Least confident", values["uncertain"]),
        "strangest": ("Unlike the training data", values["strangest"]),
        "map": ("Similar images", values["map"]),
        "errors": ("Errors", True),
        "numbers": ("All metrics", True),
        "made": ("Provenance", True),
    }
    for identifier, (name, is_shown) in sections.items():
        if is_shown:
            yield {"id": identifier, "name": name}


def _list_provenance(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    run, success = evaluation.run, evaluation.run.success_record
    yield "run", f"{run.url} ({success['run_id']})"
    yield "model bundle", f"{run.provenance['config']['model']} (SHA-256 {run.bundle_sha256})"
    manifest = run.provenance["config"]["manifest"]["path"]
    yield "manifest", f"{manifest} (fingerprint {run.manifest_fingerprint})"
    if evaluation.config.labels is not None:
        yield "labels", evaluation.config.labels.path
    yield "committed", success["committed"]
    how = [*success["precision"], *success.get("engine", ())]  # earlier versions have no engine
    yield "prediction", f"{success['seconds']['wall']:,.0f} s, {', '.join(how)}"
    yield "git commit", str(run.provenance.get("git_commit"))
    yield "versions", ", ".join(f"{k} {v}" for k, v in success["versions"].items())


def _iter_scalars(provenance: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in provenance.items():
        if name != "config":
            yield name, value


def _format_cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        if value != value:
            return ""
        return _format_percent(value) if "accuracy" in name else f"{value:.4g}"
    return "" if value is None else str(value)


def _format_percent(value: float | None) -> str:
    return "" if value is None else format_percent(value, 1)


def _base_name(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2] or url
