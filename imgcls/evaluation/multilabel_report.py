"""HTML report of a multilabel run, with the parts that all runs have from `report_parts`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from imgcls.errors import StorageError
from imgcls.evaluation import charts, confusion_plot, cooccurrence_plot
from imgcls.evaluation.explained import list_overlays
from imgcls.evaluation.gallery import list_filters, list_scores, list_slices
from imgcls.evaluation.multilabel import MultiLabelEvaluation
from imgcls.evaluation.report_parts import (
    MAX_NOTEBOOK_IMAGES,
    TEMPLATES,
    build_frame,
    build_images,
    build_map,
    build_samples,
    build_title,
    format_optional_percent,
    list_cluster_images,
    list_sections,
)
from imgcls.html import render_page
from imgcls.metrics.columns import Floats

MAX_CURVES = 24
MAX_NOTEBOOK_CURVES = 8
_OPEN_CLASSES = 3


def render_multilabel_run(evaluation: MultiLabelEvaluation) -> str:
    """Render the report of a run."""
    lists = {
        "mistakes": evaluation.mistakes,
        "issues": evaluation.issue_rows,
        "strangest": evaluation.strangest,
        "samples": evaluation.samples,
    }
    galleries = build_cell_galleries(evaluation, lists | list_cluster_images(evaluation))
    values = build_title(evaluation) | build_frame(evaluation) | build_map(evaluation, galleries)
    values |= build_cooccurrence_values(evaluation)
    values |= {
        "curves": _build_curves(evaluation, MAX_CURVES),
        "reliability": _plot_calibration(evaluation),
        "has_ranking": evaluation.aggregate.ranking is not None,
        "groups": list(group_mistakes(evaluation, galleries["mistakes"])),
        "issues": galleries["issues"],
        "issue_count": evaluation.label_issues.num_rows,
        "strangest": galleries["strangest"],
        "samples": build_samples(evaluation, evaluation.samples, galleries["samples"]),
        "filters": {name: list_filters(galleries[name]) for name in ("issues", "strangest")},
    }
    values["sections"] = _list_sections(values)
    return render_page(TEMPLATES, "multilabel_run.html.j2", values)


def render_multilabel_notebook(evaluation: MultiLabelEvaluation) -> str:
    """Render a notebook summary: headline numbers, curves, calibration, some mistakes."""
    mistakes = evaluation.mistakes.slice(0, MAX_NOTEBOOK_IMAGES)
    try:
        galleries = build_cell_galleries(evaluation, {"mistakes": mistakes})
    except StorageError:  # the images cannot be read any more
        galleries = {"mistakes": []}
    values = build_title(evaluation) | galleries
    values |= {
        "curves": _build_curves(evaluation, MAX_NOTEBOOK_CURVES),
        "reliability": _plot_calibration(evaluation),
    }
    return render_page(TEMPLATES, "multilabel_notebook.html.j2", values)


def _build_curves(evaluation: MultiLabelEvaluation, number: int) -> list[dict[str, Any]]:
    """Precision-recall curves of the classes with the most labels."""
    table = evaluation.pr_curves
    names = table["label"].to_numpy()
    recall, precision = (table[name].to_numpy() for name in ("recall", "precision"))
    classes = evaluation.per_class.sort_by([("support", "descending")]).to_pylist()
    curves = []
    for row in [row for row in classes if row["support"]][:number]:
        points = np.flatnonzero(names == row["label"])
        if len(points):
            chart = charts.plot_precision_recall(
                recall[points].tolist(), precision[points].tolist()
            )
            average = format_optional_percent(row["average_precision"])
            curves.append({"label": row["label"], "chart": chart, "average": average})
    return curves


def _plot_calibration(evaluation: MultiLabelEvaluation) -> str | None:
    """Reliability diagram of the cells of all classes; None without scores or labels."""
    if evaluation.aggregate.ranking is None or not evaluation.has_labels:
        return None
    table = evaluation.calibration
    bins = len(set(table["bin_lower"].to_pylist()))

    def read(name: str) -> Floats:
        values: Floats = table[name].fill_null(0).to_numpy().astype(np.float64)
        return values.reshape(-1, bins)

    count = read("count")
    total = count.sum(axis=0)
    means = {
        name: pa.array((count * read(column)).sum(axis=0) / np.maximum(total, 1), mask=total == 0)
        for name, column in (("mean_confidence", "mean_score"), ("accuracy", "positive_share"))
    }
    edges = {name: table[name].slice(0, bins) for name in ("bin_lower", "bin_upper")}
    merged = pa.table({**edges, "count": total, **means})
    return charts.plot_reliability(merged, "score", "share with the label", "cells")


def build_cooccurrence_values(evaluation: MultiLabelEvaluation) -> dict[str, Any]:
    """Values of `cooccurrence.html.j2`: heat maps of pairs of classes.

    `small` is None for a run without labels or pairs.
    """
    pairs = evaluation.aggregate.pairs
    if pairs is None or not pairs.together.any():
        return {"small": None, "pairs": []}
    small = cooccurrence_plot.build_pair_matrix(pairs, confusion_plot.MAX_TABLE_CLASSES)
    large = pictures = None
    if small.omitted_classes:
        large = cooccurrence_plot.build_pair_matrix(pairs, confusion_plot.MAX_PLOT_CLASSES)
        pictures = cooccurrence_plot.render_pictures(large)
    return {
        "small": small,
        "cells": cooccurrence_plot.build_cells(small),
        "matrix": large,
        "pictures": pictures,
        "pairs": cooccurrence_plot.find_cooccurrence_errors(evaluation.cooccurrence),
    }


def build_cell_galleries(
    evaluation: MultiLabelEvaluation, lists: Mapping[str, pa.Table]
) -> dict[str, Any]:
    """Items of each list of rows."""
    images = build_images(
        evaluation, {name: table["path"].to_pylist() for name, table in lists.items()}
    )
    return {
        name: [
            _build_item(row, image, has_labels=evaluation.has_labels)
            | {
                "overlays": list_overlays(evaluation.overlays, row) if name == "mistakes" else [],
                "cell": _build_cell(row, with_given=name == "issues"),
            }
            for row, image in zip(table.to_pylist(), images[name], strict=True)
        ]
        for name, table in lists.items()
    }


def _build_item(row: Mapping[str, Any], image: str | None, *, has_labels: bool) -> dict[str, Any]:
    """The item of one image; those of clusters have their best class alone."""
    is_cluster = "predicted_labels" not in row
    predicted = [row["predicted_label"]] if is_cluster else row["predicted_labels"]
    labels, unknown = row.get("labels"), row.get("unknown_labels") or []
    return {
        "image": image,
        "alt": f"{row['path']}, predicted {', '.join(predicted) or 'no label'}",
        "path": row["path"],
        "predicted_name": "best class" if is_cluster else "predicted",
        "predicted": [
            {"name": name, "kind": _find_kind(name, labels, unknown), "score": ""}
            for name in predicted
        ],
        "has_label": has_labels and not is_cluster,
        "label_name": "labels",
        "without_label": "not labeled",
        "labels": None
        if labels is None
        else [
            {"name": name, "kind": "truth" if name in predicted else "bad", "score": ""}
            for name in labels
        ],
        "label": row.get("label"),
        "given": row.get("given"),
        "confidence": row.get("score"),
        "scores": list_scores(row),
        "facets": {
            "class": list(dict.fromkeys([*predicted, *(labels or ())])),
            "status": [_find_outcome(row)],
            **list_slices(row),
        },
    }


def _build_cell(row: Mapping[str, Any], *, with_given: bool) -> dict[str, Any] | None:
    """The class of an item that is shown for one class, with its score."""
    if row.get("label") is None:
        return None
    cell = {"label": row["label"], "score": format_optional_percent(row.get("score"))}
    return cell | {"given": row["given"]} if with_given else cell


def _find_outcome(row: Mapping[str, Any]) -> str:
    """Whether the class of an item is a false positive or a false negative."""
    if row.get("given") is None:
        return "no label" if row.get("labels") is None else "labeled"
    return "not predicted" if row["given"] else "not labeled"


def _find_kind(name: str, labels: list[str] | None, unknown: list[str]) -> str:
    if labels is None or name in unknown:
        return "unjudged"
    return "truth" if name in labels else "bad"


def group_mistakes(
    evaluation: MultiLabelEvaluation, items: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """False positives and false negatives of each class, in the order of `mistakes`."""
    numbers = {row["label"]: row for row in evaluation.per_class.to_pylist()}
    for number, name in enumerate(dict.fromkeys(item["label"] for item in items)):
        own = [item for item in items if item["label"] == name]
        yield {
            "label": name,
            "is_open": number < _OPEN_CLASSES,
            "false_positives": numbers[name]["false_positives"],
            "false_negatives": numbers[name]["false_negatives"],
            "without": [item for item in own if not item["given"]],
            "with": [item for item in own if item["given"]],
        }


def _list_sections(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return list_sections(
        {
            "mistakes": ("Mistakes", values["groups"]),
            "samples": ("Samples", values["samples"]),
            "metrics": ("Other metrics", True),
            "classes": ("Classes", True),
            "curves": ("Precision and recall", values["curves"]),
            "cooccurrence": ("Co-occurrence", values["small"]),
            "calibration": ("Calibration", values["reliability"]),
            "slices": ("Slices", values["slices"]),
            "issues": ("Possible label errors", values["issues"]),
            "strangest": ("Unlike the training data", values["strangest"]),
            "map": ("Similar images", values["map"]),
            "errors": ("Errors", True),
            "numbers": ("All metrics", True),
            "made": ("How it was made", True),
        }
    )
