"""HTML report of a run or a training, in one file that opens from disk without a server.

The numbers come from `compute`, the layout from the templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from imgcls import log
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import RequestError, StorageError
from imgcls.evaluation import charts
from imgcls.evaluation.compute import Evaluation, compute_evaluation
from imgcls.evaluation.config import ReportConfig
from imgcls.evaluation.gallery import list_filters
from imgcls.evaluation.report_parts import (
    MAX_NOTEBOOK_IMAGES,
    TEMPLATES,
    build_frame,
    build_map,
    build_samples,
    build_title,
    list_cluster_images,
    list_sections,
)
from imgcls.evaluation.single_label_parts import (
    build_confusion_values,
    build_galleries,
    describe_mistakes,
)
from imgcls.evaluation.training_report import render_training
from imgcls.html import render_page
from imgcls.metrics import tables
from imgcls.metrics.formatting import format_percent
from imgcls.models.bundle import BUNDLE_FILE, is_registry_uri, read_description
from imgcls.runs import layout

_SHOWN_THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_FILTERED = ("mistakes", "issues", "uncertain", "strangest")


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
        text = render_training(read_description(source), config.evaluation)
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
        "samples": evaluation.samples,
    }
    galleries = build_galleries(evaluation, lists | list_cluster_images(evaluation))
    values = _build_overview(evaluation) | build_frame(evaluation) | galleries
    values |= build_map(evaluation, galleries)
    values["samples"] = build_samples(evaluation, evaluation.samples, galleries["samples"])
    values["filters"] = {name: list_filters(galleries[name]) for name in _FILTERED}
    values["mistakes_text"] = describe_mistakes(evaluation)
    values["thresholds"] = list(_list_thresholds(evaluation))
    values["has_ranking"] = "auroc" in evaluation.per_class.schema.names
    values["issue_count"] = evaluation.label_issues.num_rows
    values["sections"] = _list_sections(values)
    return render_page(TEMPLATES, "run.html.j2", values)


def render_notebook(evaluation: Evaluation) -> str:
    """Render a notebook summary: headline numbers, confusion matrix, curves, worst mistakes."""
    lists = {"mistakes": evaluation.mistakes.slice(0, MAX_NOTEBOOK_IMAGES)}
    try:
        galleries = build_galleries(evaluation, lists)
    except StorageError:  # the images cannot be read any more
        galleries = {"mistakes": []}
    values = _build_overview(evaluation) | galleries
    return render_page(TEMPLATES, "notebook.html.j2", values)


def _build_overview(evaluation: Evaluation) -> dict[str, Any]:
    """Common part of the report and the notebook: title, cards, confusion matrix, charts."""
    counts = evaluation.counts
    values = build_title(evaluation) | {"histogram": charts.plot_confidence_histogram(counts)}
    if evaluation.has_labels:
        values |= build_confusion_values(evaluation)
        values["reliability"] = charts.plot_reliability(tables.build_calibration(counts))
        values["coverage"] = charts.plot_coverage(evaluation.coverage_curve)
    return values


def _list_thresholds(evaluation: Evaluation) -> Iterator[dict[str, str]]:
    """Share and accuracy of the predictions with some minimum confidences, as text."""
    if not evaluation.has_labels:
        return
    rows = evaluation.coverage_curve.to_pylist()
    for threshold in _SHOWN_THRESHOLDS:
        # a threshold that accepts the same predictions as the one before it has no row
        found = [row for row in rows if row["threshold"] <= threshold + 1e-9]
        if found and (row := found[-1])["accuracy"] is not None:
            yield {
                "threshold": "none" if threshold == 0 else format_percent(threshold, 0),
                "coverage": format_percent(row["coverage"], 1),
                "accuracy": format_percent(row["accuracy"], 1),
                "interval": f"{format_percent(row['lower'], 1)} to "
                f"{format_percent(row['upper'], 1)}",
            }


def _list_sections(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return list_sections(
        {
            "mistakes": ("Worst mistakes", values["mistakes"]),
            "samples": ("Samples", values["samples"]),
            "metrics": ("Other metrics", True),
            "confusion": ("Confusion matrix", values["has_labels"]),
            "classes": ("Classes", True),
            "calibration": ("Calibration" if values["has_labels"] else "Confidence", True),
            "slices": ("Slices", values["slices"]),
            "issues": ("Possible label errors", values["issues"]),
            "uncertain": ("Least confident", values["uncertain"]),
            "strangest": ("Unlike the training data", values["strangest"]),
            "map": ("Similar images", values["map"]),
            "errors": ("Errors", True),
            "numbers": ("All metrics", True),
            "made": ("How it was made", True),
        }
    )
