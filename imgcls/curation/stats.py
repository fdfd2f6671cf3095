"""Statistics of a data set: classes, sizes and formats, as JSON and as a page."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from imgcls import log
from imgcls.curation.checks.class_counts import summarize_classes
from imgcls.curation.checks.image_table import (
    BoolArray,
    FloatArray,
    ImageTable,
    IntArray,
    build_image_table,
)
from imgcls.curation.config import StatsConfig
from imgcls.curation.scan import hold_output, scan_manifests
from imgcls.curation.split import NO_LABEL
from imgcls.data.manifests.label_columns import POSITIVE
from imgcls.data.manifests.manifest import open_manifest
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.data.thumbnails import build_thumbnails
from imgcls.formatting import format_count, format_list
from imgcls.html import render_page

STATS_FILE = "stats.json"
STATS_PAGE = "stats.html"
PERCENTILES = (0, 5, 50, 95, 100)


@with_config_storage
def compute_stats(config: StatsConfig) -> dict[str, Any]:
    """Describe a data set: classes, sizes and formats, with sample images of each class.

    Scans every image, writes stats.json and stats.html, and returns the content of stats.json.
    Raises RequestError when the request is wrong, RunFailed when the scan was interrupted (rerun to
    resume).
    """
    output = filesystem.absolute(config.output)
    manifest = open_manifest(config.manifest)
    results = (STATS_FILE, STATS_PAGE)
    with (
        hold_output(output, results) as held,
        scan_manifests(config, held, [manifest], results=results) as [scanned],
    ):
        images = build_image_table([(manifest, scanned.read_tables())])
        stats = summarize_images(images, config.min_positives)
        held.lease.check()
        body = json.dumps(stats, indent=2) + "\n"
        filesystem.write(filesystem.join(output, STATS_FILE), body.encode())
        page = render_stats_page(
            images,
            stats,
            sheet_images=config.sheet_images,
            max_sheets=config.max_sheets,
            seed=config.seed,
        )
        filesystem.write(filesystem.join(output, STATS_PAGE), page.encode())
    readable = stats["status"].get("ok", 0)
    log.emit(
        "stats", f"{stats['rows']:,} rows, {readable:,} images, {len(stats['classes']):,} classes"
    )
    if "multilabel" in stats:
        _log_label_sets(stats["multilabel"])
    log.emit("stats", filesystem.join(output, STATS_PAGE))
    return stats


def _log_label_sets(sets: dict[str, Any]) -> None:
    mean = sets["labels_per_image"]["mean"]
    per_image = "no labels" if mean is None else f"{mean:.2f} classes per image"
    unlabeled = format_count(sets["unlabeled"], "image")
    log.emit("stats", f"{per_image}, {unlabeled} without labels")
    names = [each["name"] for each in sets["issues"] if each["issue"] == "few-positives"]
    if names:
        shown = format_list(map(repr, names), 10)
        log.emit("note", f"{format_count(len(names), 'class', 'classes')} with few images: {shown}")


def summarize_images(images: ImageTable, min_positives: int = 10) -> dict[str, Any]:
    """Counts by status, class and format; percentiles of sizes in pixels and bytes.

    min_positives: of a multi-label manifest, a class with fewer images is reported
    """
    ok = images.is_ok
    counts = _count_images(images)
    order = np.argsort(-counts, kind="stable")
    nonzero = counts[counts > 0]
    stats: dict[str, Any] = {
        "rows": len(images),
        "status": _count_values(images, "status"),
        "labelled": int(images.is_labeled.sum()),
        "classes": {images.classes[i]: int(counts[i]) for i in order},
        "imbalance": float(nonzero.max() / nonzero.min()) if len(nonzero) else None,
        "formats": _count_values(images, "format"),
        "width": _compute_percentiles(images.get_numbers("width")[ok]),
        "height": _compute_percentiles(images.get_numbers("height")[ok]),
        "bytes": _compute_percentiles(images.get_numbers("bytes")[ok]),
        "total_bytes": int(np.nan_to_num(images.get_numbers("bytes").astype(np.float64)).sum()),
    }
    if images.targets is not None:
        stats["multilabel"] = summarize_classes(images.targets, images.classes, min_positives)
    return stats


def _count_images(images: ImageTable) -> IntArray:
    """Images of each class."""
    if images.targets is not None:
        return np.asarray((images.targets == POSITIVE).sum(axis=0))
    return np.bincount(images.label[images.label >= 0], minlength=len(images.classes))


def _has_class(images: ImageTable, name: str) -> BoolArray:
    """(N,) bool: whether an image has a class; NO_LABEL for none."""
    if name == NO_LABEL and name not in images.classes:
        return ~images.is_labeled
    code = images.classes.index(name)
    if images.targets is not None:
        return np.asarray(images.targets[:, code] == POSITIVE)
    return np.asarray(images.label == code)


def _count_values(images: ImageTable, name: str) -> dict[str, int]:
    values = [each for each in images.features.column(name).to_pylist() if each is not None]
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))


def _compute_percentiles(values: FloatArray) -> dict[str, float]:
    if not values.size:
        return {}
    percentiles = np.percentile(values, PERCENTILES)
    return {str(p): float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)}


def render_stats_page(
    images: ImageTable, stats: dict[str, Any], *, sheet_images: int, max_sheets: int, seed: int
) -> str:
    """Render the statistics as HTML, with a contact sheet of each class.

    sheet_images: number of images of a class, drawn with the seed
    max_sheets:   maximum number of classes with a sheet, the largest first
    """
    rng = np.random.default_rng(seed)
    groups = list(stats["classes"])
    if stats["labelled"] < len(images):
        groups.append(NO_LABEL)
    sheets = []
    for name in groups[:max_sheets]:
        indices = np.flatnonzero(images.is_ok & _has_class(images, name))
        drawn = np.sort(rng.choice(indices, min(sheet_images, len(indices)), replace=False))
        paths = [images.path[int(index)].as_py() for index in drawn]
        pictures = [
            {"image": image, "path": path}
            for image, path in zip(build_thumbnails(paths, ""), paths, strict=True)
        ]
        sheets.append({"name": name, "count": len(indices), "pictures": pictures})
    return render_page(
        "imgcls.curation",
        "stats.html.j2",
        {
            "title": f"{images.manifests[0]}: {len(images):,} rows",
            "stats": stats,
            "largest": max(stats["classes"].values(), default=1),
            "percentiles": PERCENTILES,
            "sheets": sheets,
            "omitted": max(0, len(groups) - max_sheets),
        },
    )
