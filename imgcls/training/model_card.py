"""Model card of a trained bundle: model, data, training, results, limitations.

A README.md with the front matter of the Hugging Face Hub. Everything in it comes from the bundle's
description and the history; values that are missing there are left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import yaml

from imgcls.formatting import format_count, format_counts
from imgcls.metrics.intervals import wilson_interval
from imgcls.models.bundle import BundleSpec
from imgcls.models.bundle_card import (
    escape_markdown,
    render_card_description,
    render_card_title,
    render_card_usage,
)
from imgcls.training.data.examples import TeacherRecord

MAX_CLASS_ROWS = 50
"""Maximum number of classes in the table of training images."""
_RESULT_TITLES = {
    "val_accuracy": "validation accuracy",
    "val_balanced_accuracy": "validation balanced accuracy",
    "val_loss": "validation loss, nats",
    "train_accuracy": "training accuracy, during the epoch",
    "train_loss": "training loss, nats",
}
_MULTILABEL_TITLES = {
    "val_mean_average_precision": "validation mean average precision (mAP)",
    "val_accuracy": "validation accuracy: share of correct decisions",
    "val_balanced_accuracy": "validation balanced accuracy: mean recall of positives and negatives",
    "val_loss": "validation loss, nats, summed over the classes",
    "train_accuracy": "training accuracy, during the epoch: share of correct decisions",
    "train_loss": "training loss, nats, summed over the classes",
}
"""Rows of the results of a model with any number of classes per image; a decision is whether a
score of at least 0.5 predicts a class."""
_HUB_METRICS = {
    "mean_average_precision": ("val_mean_average_precision", "Mean average precision (mAP)"),
    "accuracy": ("val_accuracy", "Accuracy"),
    "balanced_accuracy": ("val_balanced_accuracy", "Balanced accuracy"),
    "loss": ("val_loss", "Loss (nats)"),
}
"""Metrics of the front matter: type -> (column, name)."""
_EXCLUDED_SETTINGS = ("data", "model", "teacher", "output", "overwrite", "track")
"""Settings that the card describes in words, or that are private."""


def build_model_card(
    spec: BundleSpec,
    history: pd.DataFrame,
    best: int,
    *,
    parameters: int | None = None,
    workers: str | None = None,
    seconds: float | None = None,
    class_rows: Mapping[str, tuple[int, int]] | None = None,
    plots: Sequence[str] = (),
) -> str:
    """The text of README.md.

    history:    one row per epoch, as in history.parquet
    best:       the epoch of the weights
    parameters: number of parameters of the network
    workers:    the training workers, e.g. "2 x (1 CPU)"
    seconds:    wall time of the whole job (default: sum of the epochs)
    class_rows: class name -> number of images (to train on, to validate on)
    plots:      images to show, as paths below the bundle, e.g. "plots/curves.png"
    """
    row = _find_epoch(history, best)
    parts = [
        _format_front_matter(spec, row),
        f"# {render_card_title(spec)}\n",
        _format_summary(spec, row, parameters),
        *(f"![{_format_alt_text(plot)}]({plot})\n" for plot in plots),
        _format_usage(spec),
        _format_data(spec, class_rows),
        _format_procedure(spec, history, workers, seconds),
        _format_results(spec, row, history),
        _format_limitations(spec, row, class_rows),
        _format_versions(spec),
    ]
    return "\n".join(part for part in parts if part)


def _format_front_matter(spec: BundleSpec, row: Mapping[str, float]) -> str:
    is_multilabel = spec.task == "multilabel"
    names = dict(_HUB_METRICS)
    if is_multilabel:
        names["accuracy"] = ("val_accuracy", "Accuracy (share of correct decisions)")
    metrics = [
        {"type": kind, "name": name, "value": round(row[column], 6)}
        for kind, (column, name) in names.items()
        if column in row
    ]
    manifest = (
        _get_nested(spec.provenance, "data", "manifests", "data.train", "manifest") or "images"
    )
    name = os.path.splitext(os.path.basename(str(manifest).rstrip("/")))[0] or "images"
    task = {"type": "image-classification", "name": "Image Classification"}
    dataset = {"type": name, "name": name, "split": "validation"}
    front: dict[str, Any] = {
        "library_name": "imgcls",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "imgcls", "pytorch", spec.architecture.name],
    }
    if is_multilabel:
        front["tags"].insert(1, "multi-label-classification")
    if metrics:
        front["metrics"] = [metric["type"] for metric in metrics]
        result = {"task": task, "dataset": dataset, "metrics": metrics}
        front["model-index"] = [{"name": f"{spec.architecture.name}-{name}", "results": [result]}]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"


def _format_summary(spec: BundleSpec, row: Mapping[str, float], parameters: int | None) -> str:
    weights = _get_nested(spec.provenance, "config", "model", "weights")
    origin = (
        f"fine-tuned from {_format_code(weights)}" if weights else "trained from random weights"
    )
    known = "trained" if _get_nested(spec.provenance, "config") is None else origin
    size = "" if parameters is None else f" with {parameters:,} parameters"
    network = f"{_format_code(spec.architecture.name)} ({spec.architecture.source}){size}"
    rows = row.get("val_rows")
    images = None if rows is None else format_count(int(rows), "validation image")
    if spec.task == "multilabel":
        lines = [f"A multi-label image classifier: {network}, {known}."]
        if "val_mean_average_precision" in row:
            shown = _format_metric(row, "val_mean_average_precision")
            place = "" if images is None else f" on {images}"
            lines.append(f"Its mean average precision over the classes is {shown}{place}.")
    else:
        lines = [f"An image classifier: {network}, {known}."]
        if "val_accuracy" in row:
            place = "" if images is None else f" of {images}"
            lines.append(f"It classifies {_format_accuracy(row)}{place} correctly.")
    return "\n".join([*lines, "", *render_card_description(spec), ""])


def _format_alt_text(plot: str) -> str:
    return escape_markdown(os.path.splitext(os.path.basename(plot))[0].replace("_", " "))


def _format_usage(spec: BundleSpec) -> str:
    shown = "prediction.label, prediction.confidence, prediction.topk_labels"
    if spec.task == "multilabel":
        shown = "prediction.labels, prediction.topk_labels, prediction.topk_scores"
    python = (
        "from imgcls import Classifier\n\n"
        'classifier = Classifier.load("THIS_FOLDER")\n'
        'for prediction in classifier.predict(["photo.jpg"], top_k=3):\n'
        f"    print({shown})\n"
    )
    return "\n".join(["## Use", "", *render_card_usage(), "", f"```python\n{python}```", ""])


def _format_data(spec: BundleSpec, class_rows: Mapping[str, tuple[int, int]] | None) -> str:
    data = _get_nested(spec.provenance, "data") or {}
    lines: list[str] = []
    if "train_rows" in data and "val_rows" in data:
        failed = data.get("train_failed", 0) + data.get("val_failed", 0)
        origin = (
            "" if _get_nested(data, "manifests", "data.val") else ", held out of the same manifest"
        )
        lines.append(
            f"{format_count(data['train_rows'], 'image')} to train on, {data['val_rows']:,} "
            "to validate"
            f"{origin}; {failed:,} of them could not be decoded and were left out."
        )
    if spec.provenance.get("teacher"):
        lines += ["", _format_teacher(spec)]
    manifests = data.get("manifests") or {}
    if manifests:
        lines += ["", "| | manifest | rows | fingerprint |", "| --- | --- | --- | --- |"]
        for key, source in manifests.items():
            rows = f"{source['rows']:,}" if "rows" in source else ""
            cells = (
                _format_code(source.get("manifest", "")),
                rows,
                _format_code(source.get("fingerprint", "")),
            )
            lines.append(f"| {key} | {' | '.join(cells)} |")
    if class_rows:
        lines += ["", *_format_class_balance(class_rows)]
    return "\n".join(["## Data", "", *lines, ""]) if lines else ""


def _format_teacher(spec: BundleSpec) -> str:
    made = spec.provenance["teacher"]
    targets = TeacherRecord(**made).describe_targets()
    lost = format_counts(made.get("not_compared", {}), "")
    compared = f" Not compared by content with the others, as unreadable: {lost}." if lost else ""
    return (
        f"{format_count(made['images'], 'training image')} of a teacher, bundle "
        f"{_format_code(made['bundle_sha256'][:12])}: {targets}. {made['labeled']:,} of them have "
        f"a label too. Left out: {format_counts(made['left_out'])}.{compared}"
    )


def _format_class_balance(class_rows: Mapping[str, tuple[int, int]]) -> list[str]:
    counts = sorted(train for train, _ in class_rows.values())
    lines = [
        f"Training images per class: {counts[0]:,} to {counts[-1]:,}, "
        f"median {counts[len(counts) // 2]:,}.",
        "",
        "<details><summary>Images of each class</summary>",
        "",
        "| class | to train | to validate |",
        "| --- | --- | --- |",
    ]
    shown = list(class_rows.items())[:MAX_CLASS_ROWS]
    lines += [f"| {escape_markdown(name)} | {train:,} | {val:,} |" for name, (train, val) in shown]
    if len(class_rows) > MAX_CLASS_ROWS:
        lines += ["", f"... and {len(class_rows) - MAX_CLASS_ROWS:,} more classes."]
    return [*lines, "", "</details>"]


def _format_procedure(
    spec: BundleSpec, history: pd.DataFrame, workers: str | None, seconds: float | None
) -> str:
    made, config = spec.provenance, _get_nested(spec.provenance, "config") or {}
    shown = {"model": ", ".join(_list_settings(config["model"]))} if config.get("model") else {}
    for name, value in config.items():
        if name not in _EXCLUDED_SETTINGS:
            shown[name] = (
                ", ".join(_list_settings(value)) if isinstance(value, Mapping) else str(value)
            )
    shown.setdefault("seed", str(made.get("seed", "")))
    if "precision" in made:
        shown["precision"] = str(made["precision"])
    shown["workers"] = workers or ""
    if seconds is None and "seconds" in history:
        seconds = float(history["seconds"].sum())
    shown["wall time"] = "" if seconds is None else _format_duration(seconds)
    rows = [f"| {name} | {escape_markdown(value, 500)} |" for name, value in shown.items() if value]
    if not rows:
        return ""
    return "\n".join(["## Training", "", "| setting | value |", "| --- | --- |", *rows, ""])


def _format_results(spec: BundleSpec, row: Mapping[str, float], history: pd.DataFrame) -> str:
    if not row:
        return ""
    best, last = int(row["epoch"]), int(history["epoch"].iloc[-1])
    # epoch 0 is the linear probe, before any other weight moved
    shown = {0: "epoch 0 (probe)", last: f"epoch {last} (last)", best: f"epoch {best} (kept)"}
    columns = {title: _find_epoch(history, epoch) for epoch, title in sorted(shown.items())}
    columns = {title: values for title, values in columns.items() if values}
    lines = [f"| | {' | '.join(columns)} |", f"| --- {'| --- ' * len(columns)}|"]
    is_multilabel = spec.task == "multilabel"
    for name, title in (_MULTILABEL_TITLES if is_multilabel else _RESULT_TITLES).items():
        if any(name in values for values in columns.values()):
            # decisions about one image are not independent, so that they have no interval
            has_interval = name == "val_accuracy" and not is_multilabel
            cells = [
                _format_metric(values, name, has_interval=has_interval)
                for values in columns.values()
            ]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(["## Results", "", *lines, ""])


def _format_limitations(
    spec: BundleSpec,
    row: Mapping[str, float],
    class_rows: Mapping[str, tuple[int, int]] | None,
) -> str:
    limits = [
        "The epoch was chosen on the validation images, so the results above are slightly better "
        "than on new images of the same kind.",
        "It was not evaluated on other data; run `imgcls evaluate` with a labeled manifest.",
        *_list_task_limits(spec),
    ]
    unseen = [name for name, (_, val) in (class_rows or {}).items() if val == 0]
    if unseen:
        names = ", ".join(escape_markdown(name) for name in unseen[:20])
        more = f" and {len(unseen) - 20:,} more" if len(unseen) > 20 else ""
        limits.append(f"No validation image shows these classes: {names}{more}.")
    if 0 < row.get("val_rows", 0) < 100:
        see = "" if spec.task == "multilabel" else ", see the intervals"
        limits.append(f"Few validation images: the results are uncertain{see}.")
    return "\n".join(["## Limitations", "", *(f"- {limit}" for limit in limits), ""])


def _list_task_limits(spec: BundleSpec) -> list[str]:
    if spec.task == "single_label":
        limits = ["Every image gets one of the classes, whatever it shows."]
        if spec.temperature == 1:
            limits.append("Confidences are not calibrated (temperature 1).")
        return limits
    limits = [
        "Each class is decided independently: labels that exclude each other can both be "
        "predicted, and an image can get no label."
    ]
    if spec.temperature == 1 and spec.vector_scaling is None:
        limits.append("Scores are not calibrated (temperature 1).")
    if not spec.thresholds:
        limits.append(
            f"All classes have the threshold {spec.threshold:g}, which was not chosen on data."
        )
    return limits


def _format_versions(spec: BundleSpec) -> str:
    made = spec.provenance
    versions = dict(made.get("versions") or {})
    if "python" in made:
        versions["python"] = made["python"]
    lines = []
    if made.get("created"):
        lines.append(f"- Created {made['created']}")
    if made.get("git_commit"):
        lines.append(f"- imgcls at commit {_format_code(made['git_commit'])}")
    if versions:
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return "\n".join(["## Provenance", "", *lines, ""]) if lines else ""


def _find_epoch(history: pd.DataFrame, epoch: int) -> dict[str, float]:
    """The numeric columns of one epoch, without NaN."""
    found = history[history["epoch"] == epoch].select_dtypes("number")
    values = found.iloc[-1].to_dict() if len(found) else {}
    return {str(name): float(value) for name, value in values.items() if math.isfinite(value)}


def _format_metric(row: Mapping[str, float], name: str, *, has_interval: bool = False) -> str:
    if name not in row:
        return ""
    if has_interval:
        return _format_accuracy(row)
    return f"{row[name]:.4f}" if name.endswith("loss") else f"{100 * row[name]:.1f} %"


def _format_accuracy(row: Mapping[str, float]) -> str:
    share = row["val_accuracy"]
    shown = f"{100 * share:.1f} %"
    if "val_rows" not in row:
        return shown
    low, high = wilson_interval(share * row["val_rows"], int(row["val_rows"]))
    return f"{shown} (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


def _get_nested(tree: Mapping[str, Any], *keys: str) -> Any:
    """The value below nested keys, or None."""
    value: Any = tree
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _list_settings(section: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name value` of every setting that is set, sections within named by dots."""
    pairs = []
    for name, value in section.items():
        if isinstance(value, Mapping):
            pairs += _list_settings(value, f"{prefix}{name}.")
        elif value is not None:
            pairs.append(f"{prefix}{name} {value}")
    return pairs


def _format_code(text: object) -> str:
    """Text as code, in a table too, whatever is in it."""
    shown = " ".join(str(text).split()).replace("|", "\\|")
    if "`" in shown:
        return f"`` {shown} ``" if "``" not in shown else escape_markdown(shown, len(shown))
    return f"`{shown}`" if shown else ""


def _format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
