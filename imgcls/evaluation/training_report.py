"""HTML report of a training: curves, mistakes and classes of the validation images, epochs.

The sections on validation images are those of a run, made by the same code from the predictions
that the training stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from imgcls import log
from imgcls.data.encode_image import build_data_uri
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError, StorageError
from imgcls.evaluation import charts
from imgcls.evaluation.compute import Evaluation, evaluate_run
from imgcls.evaluation.config import EvaluationOptions
from imgcls.evaluation.gallery import list_filters
from imgcls.evaluation.how_made import (
    describe_software,
    list_settings,
    spell_date,
    spell_time,
)
from imgcls.evaluation.multilabel import MultiLabelEvaluation
from imgcls.evaluation.multilabel_report import (
    build_cell_galleries,
    build_cooccurrence_values,
    group_mistakes,
)
from imgcls.evaluation.report_parts import (
    TEMPLATES,
    build_class_rows,
    format_optional_percent,
    list_sections,
    name_data,
)
from imgcls.evaluation.single_label_parts import (
    build_confusion_values,
    build_galleries,
    describe_mistakes,
)
from imgcls.evaluation.validation_run import open_validation_run
from imgcls.formatting import format_count, format_duration
from imgcls.html import render_page
from imgcls.metrics.formatting import format_percent
from imgcls.metrics.intervals import wilson_interval
from imgcls.models.bundle import Bundle

_COLUMN_NAMES = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy",
    "val_loss": "validation loss",
    "val_accuracy": "validation accuracy",
    "val_balanced_accuracy": "balanced accuracy",
    "val_mean_average_precision": "mean average precision",
    "lr": "learning rate",
    "train_rows": "training images",
    "val_rows": "validation images",
    "train_failed": "failed in training",
    "val_failed": "failed in validation",
    "wait_seconds": "waiting (s)",
    "compute_seconds": "computing (s)",
    "images_per_second": "images/s",
    "seconds": "duration (s)",
}
_HEADLINES = ("val_mean_average_precision", "val_accuracy")


def render_training(bundle: Bundle, options: EvaluationOptions) -> str:
    """Render the report of a training.

    options: of the sections on validation images
    Raises RequestError if `imgcls train` did not make the bundle.
    """
    url, spec = bundle.url, bundle.spec
    history_url = filesystem.join(url, "history.parquet")
    if not filesystem.exists(history_url):
        raise RequestError(
            f"{url}: is a bundle without a training history (history.parquet); pass a bundle of "
            "`imgcls train`, or the output folder of `imgcls predict`"
        )
    with filesystem.open_read(history_url) as stream:
        history = pd.read_parquet(stream)
    best = int(spec.metrics.get("epoch", history["epoch"].iloc[-1]))
    numbers = {name: value for name, value in spec.metrics.items() if name != "epoch"}
    headline = next((name for name in _HEADLINES if name in numbers), None)
    validation = _build_validation(bundle, options)
    augmented = _read_picture(filesystem.join(url, "plots", "augmented.png"))
    return render_page(
        TEMPLATES,
        "training.html.j2",
        {
            **validation,
            "title": _build_title(bundle),
            "subtitle": f"{format_count(len(history), 'epoch')}, weights of epoch {best}. "
            f"{format_count(len(spec.classes), 'class', 'classes')}, bundle {url}.",
            "headline": None
            if headline is None
            else _describe_quality(headline, numbers[headline], history, best),
            "cards": [
                {"name": _COLUMN_NAMES.get(n, n), "value": _format_cell(n, value), "note": ""}
                for n, value in numbers.items()
                if n != headline
            ],
            "curves": charts.plot_training_curves(history, best),
            "columns": [_COLUMN_NAMES.get(name, name) for name in history.columns],
            "best": best,
            "epochs": [
                [{"value": value, "text": _format_cell(name, value)} for name, value in row.items()]
                for row in history.to_dict("records")
            ],
            "augmented": augmented,
            "sections": _list_sections(validation, augmented),
            "has_validation": filesystem.exists(filesystem.join(url, "validation.parquet")),
            "url": url,
            "made": list(_list_topics(bundle, history)),
            "settings": list_settings(spec.provenance.get("config", {})),
        },
    )


def _build_validation(bundle: Bundle, options: EvaluationOptions) -> dict[str, Any]:
    """Values of the sections on validation images; `task` is None without their predictions."""
    run = open_validation_run(bundle)
    if run is None:
        return {"task": None}
    evaluation = evaluate_run(run, options, need_labels=False)
    values = {
        "task": run.task,
        "has_labels": evaluation.has_labels,
        "has_tables": False,
        "percent": format_optional_percent,
        **build_class_rows(evaluation),
    }
    try:
        return values | _build_mistakes(evaluation)
    except StorageError as error:  # such as credentials that this machine does not have
        log.emit("note", f"the report has no images: {error}")
        hidden = options.model_copy(update={"thumbnails": False})
        return values | _build_mistakes(replace(evaluation, config=hidden))


def _build_mistakes(evaluation: Evaluation | MultiLabelEvaluation) -> dict[str, Any]:
    """Values of the sections on mistakes of the task."""
    lists = {"mistakes": evaluation.mistakes}
    if isinstance(evaluation, MultiLabelEvaluation):
        found = build_cell_galleries(evaluation, lists)
        return {
            "groups": list(group_mistakes(evaluation, found["mistakes"])),
            "has_ranking": evaluation.aggregate.ranking is not None,
            "has_scores": evaluation.run.has_scores,
            **build_cooccurrence_values(evaluation),
        }
    galleries = build_galleries(evaluation, lists)
    return {
        **galleries,
        "mistakes_text": describe_mistakes(evaluation, "misclassified validation image"),
        "filters": {"mistakes": list_filters(galleries["mistakes"])},
        "has_ranking": False,
        **build_confusion_values(evaluation),
    }


def _list_sections(validation: Mapping[str, Any], augmented: str | None) -> list[dict[str, str]]:
    task = validation["task"]
    return list_sections(
        {
            "curves": ("Curves", True),
            "mistakes": ("Mistakes", validation.get("mistakes") or validation.get("groups")),
            "confusion": ("Confusion matrix", task == "single_label"),
            "classes": ("Classes", task is not None),
            "cooccurrence": ("Co-occurrence", task == "multilabel" and validation["small"]),
            "epochs": ("Epochs", True),
            "augmented": ("Augmented samples", augmented),
            "made": ("How it was made", True),
        }
    )


def _build_title(bundle: Bundle) -> str:
    """Network, training data and date."""
    provenance, name = bundle.spec.provenance, bundle.spec.architecture.name
    manifest = _find_manifest(provenance)
    data = "" if manifest is None else f" on {name_data(manifest)}"
    date = f", {spell_date(provenance['created'])}" if "created" in provenance else ""
    return f"{name} trained{data}{date}"


def _find_manifest(provenance: Mapping[str, Any]) -> str | None:
    """The manifest of the training images, if it is recorded."""
    sources = provenance.get("data", {}).get("manifests", {})
    manifest = sources.get("data.train", {}).get("manifest")
    return None if manifest is None else str(manifest)


def _describe_quality(name: str, value: float, history: pd.DataFrame, best: int) -> dict[str, Any]:
    """The headline number; an accuracy has an interval if the number of images is known."""
    row = history[history["epoch"] == best]
    rows = int(row["val_rows"].iloc[0]) if "val_rows" in row and len(row) else 0
    basis = f"n = {format_count(rows, 'validation image')}" if rows else "of the validation images"
    found: dict[str, Any] = {
        "value": _format_cell(name, value),
        "name": _COLUMN_NAMES[name],
        "note": basis,
        "range": None,
    }
    if name == "val_accuracy" and rows:
        low, high = wilson_interval(value * rows, rows)
        ends = f"{format_percent(low, 1)} to {format_percent(high, 1)}"
        found["note"] = f"95% interval {ends}, {basis}"
        width = f"{100 * (high - low):.2f}"
        found["range"] = {"left": f"{100 * low:.2f}", "width": width, "at": f"{100 * value:.2f}"}
    return found


def _list_topics(bundle: Bundle, history: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Model, data, training and software of a bundle: topic and sentences."""
    spec = bundle.spec
    provenance, config = spec.provenance, spec.provenance.get("config", {})
    weights = (config.get("model") or {}).get("weights")
    origin = f"fine-tuned from {weights}" if weights else "trained from random weights"
    yield (
        "Model",
        f"{spec.architecture.name} ({spec.architecture.source}), {origin}, with "
        f"{format_count(len(spec.classes), 'class', 'classes')}. The SHA-256 of the bundle is "
        f"{bundle.sha256}.",
    )
    data = provenance.get("data", {})
    if "train_rows" in data:
        manifest = _find_manifest(provenance)
        source = "" if manifest is None else f" of {manifest}"
        text = (
            f"{format_count(data['train_rows'], 'image')}{source} to train on, "
            f"{data['val_rows']:,} to validate."
        )
        failed = data.get("train_failed", 0) + data.get("val_failed", 0)
        yield "Data", text + (f" {failed:,} could not be decoded." if failed else "")
    seconds = float(history["seconds"].sum()) if "seconds" in history else None
    yield "Training", _describe_training(provenance, len(history), seconds)
    yield "Software", describe_software(provenance, provenance.get("versions", {}))


def _describe_training(provenance: Mapping[str, Any], epochs: int, seconds: float | None) -> str:
    parts = [format_count(epochs, "epoch")]
    if seconds is not None:
        parts[0] += f" in {format_duration(seconds)}"
    names = {"workers": "workers", "precision": "precision", "strategy": "strategy", "seed": "seed"}
    parts += [f"{word} {provenance[key]}" for key, word in names.items() if key in provenance]
    text = ", ".join(parts) + "."
    if "created" in provenance:
        text += f" Finished on {spell_time(provenance['created'])}."
    return text


def _read_picture(url: str) -> str | None:
    """A PNG as a data URI; None if it does not exist."""
    if not filesystem.exists(url):
        return None
    return build_data_uri(filesystem.read(url), "image/png")


def _format_cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        if value != value:
            return ""
        is_share = "accuracy" in name or "precision" in name
        if name.endswith("seconds"):
            return f"{value:.1f}"
        return format_optional_percent(value) if is_share else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)
