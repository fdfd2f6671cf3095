"""Parts of the reports of runs with one label per image: confusion matrix and galleries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from imgcls.data.manifests.manifest import normalize_labels
from imgcls.evaluation import confusion_plot
from imgcls.evaluation.compute import Evaluation
from imgcls.evaluation.explained import list_overlays
from imgcls.evaluation.gallery import Item, build_item, describe_shown
from imgcls.evaluation.report_parts import build_images
from imgcls.metrics.counts import WRONG
from imgcls.metrics.formatting import format_percent

_MAX_PAIRS = 100


def build_confusion_values(evaluation: Evaluation) -> dict[str, Any]:
    """Values of `confusion.html.j2`: the confusion matrix and the most frequent mistakes."""
    counts = evaluation.aggregate.counts
    small = confusion_plot.build_matrix(counts, confusion_plot.MAX_TABLE_CLASSES)
    large = None
    if small.omitted_classes:
        large = confusion_plot.build_matrix(counts, confusion_plot.MAX_PLOT_CLASSES)
    return {
        "pairs": [
            pair | {"share_text": format_percent(pair["share"], 1)}
            for pair in confusion_plot.find_confused_pairs(counts, _MAX_PAIRS)
        ],
        "small": confusion_plot.build_matrix_table(small) if small.classes else None,
        "matrix": large,
        "picture": confusion_plot.render_matrix(large) if large is not None else None,
    }


def build_galleries(evaluation: Evaluation, lists: Mapping[str, pa.Table]) -> dict[str, list[Item]]:
    """Items of each list of rows."""
    images = build_images(
        evaluation, {name: table["path"].to_pylist() for name, table in lists.items()}
    )
    names = evaluation.run.classes
    classes = frozenset([*names, *normalize_labels(pa.array(names)).to_pylist()])
    return {
        name: [
            build_item(
                row,
                image,
                list_overlays(evaluation.overlays, row) if name == "mistakes" else [],
                classes=classes,
                has_labels=evaluation.has_labels,
            )
            for row, image in zip(table.to_pylist(), images[name], strict=True)
        ]
        for name, table in lists.items()
    }


def describe_mistakes(evaluation: Evaluation, what: str = "misclassified image") -> str:
    """Which mistakes their gallery shows, and how many there are; what: the name of one."""
    return describe_shown(
        evaluation.mistakes.num_rows,
        int(evaluation.counts.bin_counts[WRONG].sum()),
        what,
        "the most confident",
    )
