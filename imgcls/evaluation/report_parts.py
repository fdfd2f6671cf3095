"""Parts that the reports of all kinds of runs have: cards, metrics, errors, images, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from imgcls.data.thumbnails import build_thumbnails
from imgcls.evaluation import charts
from imgcls.evaluation.result import RunEvaluation
from imgcls.metrics import tables
from imgcls.metrics.formatting import (
    format_interval,
    format_percent,
    format_value,
    list_headlines,
)
from imgcls.metrics.registry import find_headline

MAX_CLASSES_SHOWN = 1_000
MAX_SLICES_SHOWN = 300
MAX_NOTEBOOK_IMAGES = 8
TEMPLATES = "imgcls.evaluation"


def build_title(evaluation: RunEvaluation) -> dict[str, Any]:
    """Common part of a report and a notebook: the title and the cards."""
    return {
        "title": f"{base_name(evaluation.run.url)}: {evaluation.counts.rows:,} rows",
        "has_labels": evaluation.has_labels,
        "cards": list(_build_cards(evaluation)),
    }


def build_frame(evaluation: RunEvaluation) -> dict[str, Any]:
    """Values of the sections that do not depend on the task."""
    counts, run = evaluation.counts, evaluation.run
    return {
        "subtitle": f"{len(run.classes):,} classes, committed {run.success_record['committed']}",
        "omitted": evaluation.omitted,
        "slices": evaluation.slices.to_pylist()[:MAX_SLICES_SHOWN],
        "small_slice": evaluation.config.small_slice,
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
        "percent": format_optional_percent,
        **_build_class_rows(evaluation),
    }


def build_images(
    evaluation: RunEvaluation, lists: Mapping[str, list[str]]
) -> dict[str, list[str | None]]:
    """Thumbnails of lists of paths, read in one go; None for an image that is not shown."""
    paths = [path for each in lists.values() for path in each]
    thumbnails: list[str | None] = [None] * len(paths)
    if evaluation.config.thumbnails:
        thumbnails = build_thumbnails(paths, evaluation.run.root)
    found, start = {}, 0
    for name, each in lists.items():
        found[name] = thumbnails[start : start + len(each)]
        start += len(each)
    return found


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


def _build_cards(evaluation: RunEvaluation) -> Iterator[dict[str, str]]:
    metrics: dict[str, tables.Metric] = {metric.name: metric for metric in evaluation.metrics}
    for name in list_headlines(list(metrics)):
        yield {
            "name": find_headline(name) or name,
            "value": format_value(name, metrics[name].value),
            "note": format_interval(name, metrics[name].interval),
        }


def _build_class_rows(evaluation: RunEvaluation) -> dict[str, Any]:
    table, by = evaluation.per_class, "support" if evaluation.has_labels else "predicted"
    rows = table.sort_by([(by, "descending")]).slice(0, MAX_CLASSES_SHOWN).to_pylist()
    return {"classes": rows, "omitted_classes": table.num_rows - len(rows)}


def _list_provenance(evaluation: RunEvaluation) -> Iterator[tuple[str, str]]:
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


def format_optional_percent(value: float | None) -> str:
    """A percentage with one decimal; empty for None."""
    return "" if value is None else format_percent(value, 1)


def base_name(url: str) -> str:
    """Last part of a URL."""
    return url.rstrip("/").rpartition("/")[2] or url
