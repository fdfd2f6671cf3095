"""One HTML file that tells a run or a training: opens from disk, asks no server for anything.

Owns what is shown and in which order; the numbers come from `evaluate`, the look from `templates`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pyarrow as pa
import yaml

from imgcls.config import Section
from imgcls.data import filesystem
from imgcls.data.storage_settings import StorageConfig, with_config_storage
from imgcls.data.thumbnails import build_thumbnails
from imgcls.errors import RequestError
from imgcls.evaluation import charts, confusion_plot
from imgcls.evaluation.compute import Evaluation, EvaluationOptions, compute_evaluation
from imgcls.html import render_page
from imgcls.metrics import tables
from imgcls.models.bundle import BUNDLE_FILE, Bundle, read_description

REPORT_FILE = "report.html"
MAX_CLASSES_SHOWN = 1_000
MAX_SLICES_SHOWN = 300


class ReportConfig(Section):
    """Write report.html for a labelling run, labelled or not, or for a trained bundle."""

    positional: ClassVar[tuple[str, ...]] = ("source",)

    source: str
    """The output folder of `imgcls predict`, or a bundle that `imgcls train` made."""
    output: str | None = None
    """The file to write; report.html in the source folder when not given."""
    evaluation: EvaluationOptions = EvaluationOptions()
    storage: StorageConfig = StorageConfig()


@with_config_storage
def write_report(config: ReportConfig) -> str:
    """Write the report of a run or a bundle; returns where.

    Raises RequestError when the source is neither.
    """
    source = filesystem.absolute(config.source)
    target = config.output or filesystem.join(source, REPORT_FILE)
    if filesystem.exists(filesystem.join(source, BUNDLE_FILE)):
        text = render_training(read_description(source))
    else:
        text = render_run(compute_evaluation(source, config.evaluation, need_labels=False))
    filesystem.write(target, text.encode())
    print(f"report  {target}", flush=True)
    return target


def render_run(evaluation: Evaluation) -> str:
    """The page of a labelling run."""
    counts, run = evaluation.aggregate.counts, evaluation.run
    labelled = evaluation.has_labels
    shown: dict[str, Any] = {
        "title": f"{_base_name(run.url)}: {counts.rows:,} rows",
        "subtitle": f"{len(run.classes):,} classes, committed {run.success_record['committed']}",
        "labelled": labelled,
        "cards": list(_build_cards(evaluation)),
        "left_out": evaluation.omitted,
        "histogram": charts.plot_confidence_histogram(counts),
        "slices": evaluation.slices.to_pylist()[:MAX_SLICES_SHOWN],
        "small_slice": evaluation.config.small_slice,
        "ranked": "auroc" in evaluation.per_class.schema.names,
        "errors": [
            {"status": status, "rows": rows, "share": rows / counts.rows}
            for status, rows in sorted(counts.status.items(), key=lambda item: -item[1])
            if status != "ok"
        ],
        "metrics": [
            {
                "name": metric.name,
                "value": tables.format_value(metric.name, metric.value),
                "interval": tables.format_interval(metric.name, metric.interval),
                "description": metric.description,
            }
            for metric in evaluation.metrics
        ],
        "made": list(_list_provenance(evaluation)),
        "config": yaml.safe_dump(run.provenance["config"], sort_keys=False),
        "percent": _format_percent,
    }
    shown |= _build_class_rows(evaluation.per_class, labelled)
    if labelled:
        shown |= _build_confusion(evaluation)
        shown["reliability"] = charts.plot_reliability(tables.build_calibration(counts))
        shown["coverage"] = charts.plot_coverage(evaluation.coverage_curve)
    shown |= _build_galleries(evaluation)
    shown["sections"] = list(_list_sections(shown))
    return render_page("imgcls.evaluation", "run.html.j2", shown)


def render_training(bundle: Bundle) -> str:
    """The page of a training: its curves, epochs and augmented samples.

    Raises RequestError when the bundle was not trained here.
    """
    import pandas as pd

    url, spec = bundle.url, bundle.spec
    place = filesystem.join(url, "history.parquet")
    if not filesystem.exists(place):
        raise RequestError(
            f"{url}: is a bundle that was not trained here (no history.parquet); give one that "
            "`imgcls train` made, or the output folder of `imgcls predict`"
        )
    with filesystem.open_read(place) as stream:
        history = pd.read_parquet(stream)
    augmented = None
    if filesystem.exists(filesystem.join(url, "plots", "augmented.png")):
        data = filesystem.read(filesystem.join(url, "plots", "augmented.png"))
        augmented = "data:image/png;base64," + base64.b64encode(data).decode()
    best = int(spec.metrics.get("epoch", history["epoch"].iloc[-1]))
    made = [
        ("bundle", f"{url} (SHA-256 {bundle.sha256})"),
        ("architecture", spec.architecture.name),
        ("classes", f"{len(spec.classes):,}"),
        *((name, json.dumps(value)) for name, value in _iter_scalars(spec.provenance)),
    ]
    return render_page(
        "imgcls.evaluation",
        "training.html.j2",
        {
            "title": f"{_base_name(url)}: {spec.architecture.name}, {len(spec.classes):,} classes",
            "subtitle": f"{len(history)} epochs, the weights of epoch {best} kept",
            "cards": [
                {"name": name.replace("_", " "), "value": _format_figure(name, value), "note": ""}
                for name, value in spec.metrics.items()
            ],
            "curves": charts.plot_training_curves(history, best),
            "columns": list(history.columns),
            "epochs": [
                [{"value": value, "text": _format_cell(name, value)} for name, value in row.items()]
                for row in history.to_dict("records")
            ],
            "augmented": augmented,
            "made": made,
            "config": yaml.safe_dump(spec.provenance.get("config", {}), sort_keys=False),
        },
    )


def _build_cards(evaluation: Evaluation) -> Iterator[dict[str, str]]:
    names = {
        "accuracy": "accuracy",
        f"top_{evaluation.run.top_k}_accuracy": f"top-{evaluation.run.top_k} accuracy",
        "balanced_accuracy": "balanced accuracy",
        "f1_macro": "macro F1",
        "log_loss": "log loss (nats)",
        "auroc_macro": "macro AUROC",
        "expected_calibration_error": "calibration error (ECE)",
        "coverage": "accepted",
        "error_rate": "without a prediction",
    }
    if not evaluation.has_labels:
        names = {"mean_confidence": "mean confidence", **names}
    for name, told in names.items():
        metric = evaluation.get_metric(name)
        if metric is not None:
            yield {
                "name": told,
                "value": tables.format_value(name, metric.value),
                "note": tables.format_interval(name, metric.interval),
            }


def _build_class_rows(table: pa.Table, labelled: bool) -> dict[str, Any]:
    by = "support" if labelled else "predicted"
    rows = table.sort_by([(by, "descending")]).slice(0, MAX_CLASSES_SHOWN).to_pylist()
    return {"classes": rows, "classes_left_out": table.num_rows - len(rows)}


def _build_confusion(evaluation: Evaluation) -> dict[str, Any]:
    counts = evaluation.aggregate.counts
    small = confusion_plot.build_matrix(counts, confusion_plot.MAX_TABLE_CLASSES)
    cells = [
        {
            "name": name,
            "cells": [
                {
                    "text": f"{number:,}" if number else "",
                    "right": row == column,
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
        "pairs": confusion_plot.find_worst_pairs(counts, 30),
        "small": small,
        "cells": cells,
        "matrix": large,
        "picture": confusion_plot.render_matrix(large) if large is not None else None,
    }


def _build_galleries(evaluation: Evaluation) -> dict[str, Any]:
    most = evaluation.config.gallery
    found = {
        "mistakes": evaluation.mistakes,
        "issues": evaluation.label_issues.slice(0, most),
        "uncertain": evaluation.uncertain,
    }
    paths = [path for table in found.values() for path in table["path"].to_pylist()]
    pictures: Sequence[str | None] = [None] * len(paths)
    if evaluation.config.thumbnails:
        pictures = build_thumbnails(paths, evaluation.run.root)
    shown: dict[str, Any] = {"issue_count": evaluation.label_issues.num_rows}
    start = 0
    for name, table in found.items():
        shown[name] = [
            {
                "image": picture,
                "alt": f"{row['path']}, predicted {row['predicted_label']}",
                "predicted": row["predicted_label"],
                "confidence": _format_percent(row["confidence"]),
                "label": row["label"],
                "label_score": row["label_score"] is not None
                and _format_percent(row["label_score"]),
                "path": row["path"],
            }
            for row, picture in zip(table.to_pylist(), pictures[start:], strict=False)
        ]
        start += table.num_rows
    return shown


def _list_sections(shown: dict[str, Any]) -> Iterator[dict[str, str]]:
    known = {
        "confusion": ("Mistakes", shown["labelled"]),
        "calibration": ("Confidence", True),
        "slices": ("Slices", shown["slices"]),
        "classes": ("Classes", True),
        "mistakes": ("Worst mistakes", shown["mistakes"]),
        "issues": ("Labels to look at", shown["issues"]),
        "uncertain": ("Least certain", shown["uncertain"]),
        "errors": ("Errors", True),
        "numbers": ("All numbers", True),
        "made": ("How it was made", True),
    }
    for place, (name, there) in known.items():
        if there:
            yield {"id": place, "name": name}


def _list_provenance(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    run, success = evaluation.run, evaluation.run.success_record
    yield "run", f"{run.url} ({success['run_id']})"
    yield "model bundle", f"{run.provenance['config']['model']} (SHA-256 {run.bundle_sha256})"
    manifest = run.provenance["config"]["manifest"]["path"]
    yield "manifest", f"{manifest} (fingerprint {run.manifest_fingerprint})"
    if evaluation.config.labels is not None:
        yield "labels", evaluation.config.labels.path
    yield "committed", success["committed"]
    yield "labelled in", f"{success['seconds']['wall']:,.0f} s, {', '.join(success['precision'])}"
    yield "git commit", str(run.provenance.get("git_commit"))
    yield "versions", ", ".join(f"{k} {v}" for k, v in success["versions"].items())


def _iter_scalars(provenance: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in provenance.items():
        if name != "config":
            yield name, value


def _format_figure(name: str, value: float) -> str:
    return _format_percent(value) if "accuracy" in name else f"{value:.4g}"


def _format_cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        if value != value:
            return ""
        return _format_percent(value) if name.endswith("accuracy") else f"{value:.4g}"
    return "" if value is None else str(value)


def _format_percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _base_name(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2] or url
