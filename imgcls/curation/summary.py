"""What a data set is made of: its classes, sizes and formats, in numbers and as a page."""

from __future__ import annotations

from typing import Any

import numpy as np

from imgcls.curation.checks.image_table import FloatArray, ImageTable
from imgcls.data.thumbnails import build_thumbnails
from imgcls.html import render_page

PERCENTILES = (0, 5, 50, 95, 100)
UNNAMED = "(no label)"


def summarize_images(images: ImageTable) -> dict[str, Any]:
    """Counts by status, class and format; percentiles of pixels and bytes."""
    ok = images.is_ok
    classes = np.bincount(images.label[images.label >= 0], minlength=len(images.classes))
    statuses, counts = np.unique(images.features.column("status").to_pylist(), return_counts=True)
    formats = [each for each in images.features.column("format").to_pylist() if each is not None]
    kinds, of_kind = np.unique(formats, return_counts=True)
    order = np.argsort(-classes, kind="stable")
    there = classes[classes > 0]
    return {
        "rows": len(images),
        "status": dict(zip(statuses.tolist(), counts.tolist(), strict=True)),
        "labelled": int((images.label >= 0).sum()),
        "classes": {images.classes[i]: int(classes[i]) for i in order},
        "imbalance": float(there.max() / there.min()) if len(there) else None,
        "formats": dict(zip(kinds.tolist(), of_kind.tolist(), strict=True)),
        "width": _percentiles(images.get_numbers("width")[ok]),
        "height": _percentiles(images.get_numbers("height")[ok]),
        "bytes": _percentiles(images.get_numbers("bytes")[ok]),
        "total_bytes": int(np.nan_to_num(images.get_numbers("bytes").astype(np.float64)).sum()),
    }


def render_stats_page(
    images: ImageTable, told: dict[str, Any], *, shown: int, classes: int, seed: int
) -> str:
    """The numbers as a page, with a contact sheet of each class.

    shown:   images of a class, drawn with the seed
    classes: most that have a sheet, the largest first
    """
    rng = np.random.default_rng(seed)
    ok = images.is_ok
    names = {name: number for number, name in enumerate(images.classes)}
    groups = list(told["classes"])
    if told["labelled"] < len(images):
        names[UNNAMED] = -1
        groups.append(UNNAMED)
    sheets = []
    for name in groups[:classes]:
        at = np.flatnonzero(ok & (images.label == names[name]))
        drawn = np.sort(rng.choice(at, min(shown, len(at)), replace=False))
        paths = [images.path[int(place)].as_py() for place in drawn]
        pictures = [
            {"image": image, "path": path}
            for image, path in zip(build_thumbnails(paths, ""), paths, strict=True)
        ]
        sheets.append({"name": name, "count": len(at), "pictures": pictures})
    return render_page(
        "imgcls.curation",
        "stats.html.j2",
        {
            "title": f"{images.manifests[0]}: {len(images):,} rows",
            "stats": told,
            "most": max(told["classes"].values(), default=1),
            "percentiles": PERCENTILES,
            "sheets": sheets,
            "left_out": max(0, len(groups) - classes),
        },
    )


def _percentiles(values: FloatArray) -> dict[str, float]:
    if not values.size:
        return {}
    found = np.percentile(values, PERCENTILES)
    return {str(at): float(value) for at, value in zip(PERCENTILES, found, strict=True)}
