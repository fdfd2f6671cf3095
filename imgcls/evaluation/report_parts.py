"""Parts that the reports of all kinds of runs have: cards, metrics, errors, images, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from imgcls.data.thumbnails import THUMBNAIL_SIDE, build_thumbnails
from imgcls.evaluation import charts
from imgcls.evaluation.gallery import Item, choose_side
from imgcls.evaluation.how_made import describe_making, list_settings, spell_date
from imgcls.evaluation.result import RunEvaluation
from imgcls.formatting import format_count
from imgcls.metrics import tables
from imgcls.metrics.formatting import (
    format_interval,
    format_percent,
    format_value,
    list_headlines,
)
from imgcls.metrics.registry import find_headline, find_unit

MAX_CLASSES_SHOWN = 1_000
MAX_SLICES_SHOWN = 300
MAX_NOTEBOOK_IMAGES = 8
TEMPLATES = "imgcls.evaluation"
_GENERAL_NAMES = ("manifest", "images", "data", "labels", "index")
"""Names of files and folders that do not name a data set."""
STATUS_MEANINGS = {
    "missing": "there is no such file or object",
    "forbidden": "the store does not permit to read it",
    "opted_out": "the server refuses automated access",
    "throttled": "the server refused too many requests",
    "unavailable": "the store or server did not respond",
    "empty": "the file has no bytes",
    "truncated": "the end of the image is missing",
    "not_an_image": "the content is not an image",
    "unsupported": "an image of a type that is not decoded",
    "too_large": "more bytes or pixels than the limit",
    "unreadable": "the image is damaged",
    "crashed": "each worker that processed it crashed or hung",
    "not_finite": "the scores of the network are NaN or infinite",
}


def build_title(evaluation: RunEvaluation) -> dict[str, Any]:
    """Common part of a report and a notebook: the title, the headline number and the cards."""
    run, counts = evaluation.run, evaluation.counts
    config = run.provenance["config"]
    model = run.run_record.get("architecture") or base_name(config["model"])
    data = name_data(config["manifest"]["path"])
    date = spell_date(run.success_record["committed"])
    classes = format_count(len(run.classes), "class", "classes")
    cards = list(_build_cards(evaluation))  # none of a run without rows
    return {
        "title": f"{model} on {data}, {date}",
        "subtitle": f"Predictions of {format_count(counts.rows, 'image')}, {classes}, bundle "
        f"{config['model']}. Run {'/'.join(run.url.rstrip('/').split('/')[-2:])}.",
        "has_labels": evaluation.has_labels,
        "headline": cards[0] if cards else None,
        "cards": cards[1:],
        "all_cards": cards,
    }


def build_frame(evaluation: RunEvaluation) -> dict[str, Any]:
    """Values of the sections that do not depend on the task."""
    counts, run = evaluation.counts, evaluation.run
    return {
        "omitted": evaluation.omitted,
        "slices": evaluation.slices.to_pylist()[:MAX_SLICES_SHOWN],
        "small_slice": evaluation.config.small_slice,
        "errors": [
            {
                "status": status,
                "meaning": STATUS_MEANINGS.get(status, ""),
                "rows": rows,
                "share": rows / counts.rows,
            }
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
        "made": describe_making(evaluation),
        "settings": list_settings(run.provenance["config"]),
        "percent": format_optional_percent,
        "has_tables": True,
        **build_class_rows(evaluation),
    }


def build_images(
    evaluation: RunEvaluation, lists: Mapping[str, list[str]]
) -> dict[str, list[str | None]]:
    """Thumbnails of lists of paths, read in one go; None for an image that is not shown."""
    if not evaluation.config.thumbnails:
        return {name: [None] * len(paths) for name, paths in lists.items()}
    unique = list(dict.fromkeys(path for paths in lists.values() for path in paths))
    side = choose_side(sum(len(paths) for paths in lists.values()), THUMBNAIL_SIDE)
    images = dict(zip(unique, build_thumbnails(unique, evaluation.run.root, side), strict=True))
    return {name: [images[path] for path in paths] for name, paths in lists.items()}


def build_map(evaluation: RunEvaluation, galleries: Mapping[str, Any]) -> dict[str, Any]:
    """The embedding map of a run with embeddings.

    galleries: images of the clusters, by `name_cluster`
    """
    found = evaluation.embedding_map
    if found is None:
        return {"map": None}
    return {
        "map": charts.plot_embedding_map(found.points, found.predicted),
        "map_rows": len(found.points),
        "map_explained": format_optional_percent(found.explained),
        "clusters": [
            {
                "rows": each.rows,
                "share": format_optional_percent(each.share),
                "label": each.label,
                "purity": format_optional_percent(each.purity),
                "accuracy": format_optional_percent(each.accuracy),
                "confidence": format_optional_percent(each.mean_confidence),
                "images": galleries[name_cluster(number)],
            }
            for number, each in enumerate(found.clusters)
        ],
    }


def build_samples(
    evaluation: RunEvaluation, samples: pa.Table, items: Sequence[Item]
) -> dict[str, Any] | None:
    """Sampled images by the class that is predicted; None without any.

    samples: with the column `sampled_class`; items: of its rows
    """
    if not items:
        return None
    numbers = {row["label"]: row for row in evaluation.per_class.to_pylist()}
    names = samples["sampled_class"].to_pylist()
    predicted = sum(1 for row in numbers.values() if row["predicted"])
    classes = [
        {
            "label": label,
            "rows": numbers[label]["predicted"],
            "confidence": format_optional_percent(numbers[label].get("mean_confidence")),
            "items": [item for name, item in zip(names, items, strict=True) if name == label],
        }
        for label in dict.fromkeys(names)
    ]
    return {"classes": classes, "omitted_classes": predicted - len(classes)}


def list_cluster_images(evaluation: RunEvaluation) -> dict[str, Any]:
    """Rows of each cluster of the embedding map, by `name_cluster`."""
    found = evaluation.embedding_map
    clusters = [] if found is None else found.clusters
    return {name_cluster(number): each.images for number, each in enumerate(clusters)}


def name_cluster(number: int) -> str:
    """Name of the gallery of a cluster."""
    return f"cluster{number}"


def list_sections(sections: Mapping[str, tuple[str, Any]]) -> list[dict[str, str]]:
    """Links to the sections that are shown; sections: name and whether it is shown, by id."""
    return [{"id": key, "name": name} for key, (name, is_shown) in sections.items() if is_shown]


def _build_cards(evaluation: RunEvaluation) -> Iterator[dict[str, Any]]:
    metrics: dict[str, tables.Metric] = {metric.name: metric for metric in evaluation.metrics}
    for number, name in enumerate(list_headlines(list(metrics))):
        metric = metrics[name]
        card = {
            "name": find_headline(name) or name,
            "value": format_value(name, metric.value),
            "note": format_interval(name, metric.interval),
        }
        yield card if number else card | _describe_headline(evaluation, metric)


def _describe_headline(evaluation: RunEvaluation, metric: tables.Metric) -> dict[str, Any]:
    """The interval of the first metric, as text and as a range, and the number of its images."""
    counts = evaluation.counts
    is_labeled = evaluation.has_labels
    images = counts.labeled if is_labeled else counts.ok
    basis = f"n = {format_count(images, 'labeled image' if is_labeled else 'image')}"
    if metric.interval is None:
        return {"note": basis, "range": None}
    low, high = metric.interval
    ends = [format_value(metric.name, end) for end in (low, high)]
    return {
        "note": f"95% interval {ends[0]} to {ends[1]}, {basis}",
        "range": {
            "left": f"{100 * low:.2f}",
            "width": f"{100 * (high - low):.2f}",
            "at": f"{100 * metric.value:.2f}",
        }
        if find_unit(metric.name) == "fraction"
        else None,
    }


def build_class_rows(evaluation: RunEvaluation) -> dict[str, Any]:
    """The table of the classes with the most rows."""
    table, by = evaluation.per_class, "support" if evaluation.has_labels else "predicted"
    rows = table.sort_by([(by, "descending")]).slice(0, MAX_CLASSES_SHOWN).to_pylist()
    return {"classes": rows, "omitted_classes": table.num_rows - len(rows)}


def format_optional_percent(value: float | None) -> str:
    """A percentage with one decimal; empty for None."""
    return "" if value is None else format_percent(value, 1)


def base_name(url: str) -> str:
    """Last part of a URL."""
    return url.rstrip("/").rpartition("/")[2] or url


def name_data(path: str) -> str:
    """Name of a data set: the last part of its path that is no wildcard or general name."""
    parts = [_remove_extension(part) for part in path.split("/") if part and "*" not in part]
    named = [part for part in parts if part not in _GENERAL_NAMES]
    return (named or parts or [path])[-1]


def _remove_extension(name: str) -> str:
    stem, _, extension = name.rpartition(".")
    return stem if stem and extension.isalnum() and len(extension) <= 7 else name
