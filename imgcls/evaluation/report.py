"""HTML report of a run or a training, in one file that opens from disk without a server.

The numbers come from `compute`, the layout from the templates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import yaml

from imgcls import log
from imgcls.data.encode_image import build_data_uri
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import RequestError, StorageError
from imgcls.evaluation import charts, confusion_plot
from imgcls.evaluation.compute import Evaluation, compute_evaluation
from imgcls.evaluation.config import ReportConfig
from imgcls.evaluation.explained import list_overlays
from imgcls.evaluation.report_parts import (
    MAX_NOTEBOOK_IMAGES,
    TEMPLATES,
    base_name,
    build_frame,
    build_images,
    build_map,
    build_title,
    format_optional_percent,
    list_cluster_images,
    list_sections,
)
from imgcls.html import render_page
from imgcls.metrics import tables
from imgcls.metrics.formatting import format_percent
from imgcls.models.bundle import BUNDLE_FILE, Bundle, is_registry_uri, read_description
from imgcls.runs import layout


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
    if is_registry_uri(config.source):
        raise RequestError(
            f"source {config.source}: is a registered model; pass the folder of a run or a bundle"
        )
    source = filesystem.absolute(config.source)
    target = config.output or filesystem.join(source, layout.REPORT_FILE)
    if filesystem.exists(filesystem.join(source, BUNDLE_FILE)):
        text = render_training(read_description(source))
    else:
        evaluation = compute_evaluation(source, config.evaluation, need_labels=False)
        text = evaluation.render(in_notebook=False)
    filesystem.write(target, text.encode())
    log.show(f"report  {target}")
    return target


def render_run(evaluation: Evaluation) -> str:
    """Render the report of a run."""
    lists = {
        "mistakes": evaluation.mistakes,
        "issues": evaluation.label_issues.slice(0, evaluation.config.gallery),
        "uncertain": evaluation.uncertain,
        "strangest": evaluation.strangest,
    }
    galleries = _build_galleries(evaluation, lists | list_cluster_images(evaluation))
    values = _build_overview(evaluation) | build_frame(evaluation) | galleries
    values |= build_map(evaluation, galleries)
    values["has_ranking"] = "auroc" in evaluation.per_class.schema.names
    values["issue_count"] = evaluation.label_issues.num_rows
    values["sections"] = _list_sections(values)
    return render_page(TEMPLATES, "run.html.j2", values)


def render_notebook(evaluation: Evaluation) -> str:
    """Render a notebook summary: headline numbers, confusion matrix, curves, worst mistakes."""
    lists = {"mistakes": evaluation.mistakes.slice(0, MAX_NOTEBOOK_IMAGES)}
    try:
        galleries = _build_galleries(evaluation, lists)
    except StorageError:  # the images cannot be read any more
        galleries = _build_galleries(evaluation, {})
    values = _build_overview(evaluation) | galleries
    return render_page(TEMPLATES, "notebook.html.j2", values)


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
        augmented = build_data_uri(data, "image/png")
    best = int(spec.metrics.get("epoch", history["epoch"].iloc[-1]))
    provenance = [
        ("bundle", f"{url} (SHA-256 {bundle.sha256})"),
        ("architecture", spec.architecture.name),
        ("classes", f"{len(spec.classes):,}"),
        *((name, json.dumps(value)) for name, value in _iter_scalars(spec.provenance)),
    ]
    return render_page(
        TEMPLATES,
        "training.html.j2",
        {
            "title": f"{base_name(url)}: {spec.architecture.name}, {len(spec.classes):,} classes",
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
    counts = evaluation.counts
    values = build_title(evaluation) | {"histogram": charts.plot_confidence_histogram(counts)}
    if evaluation.has_labels:
        values |= _build_confusion(evaluation)
        values["reliability"] = charts.plot_reliability(tables.build_calibration(counts))
        values["coverage"] = charts.plot_coverage(evaluation.coverage_curve)
    return values


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
    """Images of each list of rows."""
    thumbnails = build_images(
        evaluation, {name: table["path"].to_pylist() for name, table in lists.items()}
    )
    return {
        name: [
            {
                "image": thumbnail,
                "alt": f"{row['path']}, predicted {row['predicted_label']}",
                "predicted": row["predicted_label"],
                "confidence": format_optional_percent(row["confidence"]),
                "label": row["label"],
                "label_score": format_optional_percent(row["label_score"]),
                "path": row["path"],
                "overlays": list_overlays(evaluation.overlays, row) if name == "mistakes" else [],
            }
            for row, thumbnail in zip(table.to_pylist(), thumbnails[name], strict=True)
        ]
        for name, table in lists.items()
    }


def _list_sections(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return list_sections(
        {
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
    )


def _iter_scalars(provenance: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in provenance.items():
        if name != "config":
            yield name, value


def _format_cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        if value != value:
            return ""
        return format_optional_percent(value) if "accuracy" in name else f"{value:.4g}"
    return "" if value is None else str(value)
