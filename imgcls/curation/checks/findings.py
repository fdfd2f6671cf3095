"""What a check finds: one line per image and issue, and the table that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from imgcls.curation.checks.image_table import BoolArray, FloatArray, ImageTable, IntArray

Issue = Literal[
    "unreadable",
    "wrong-extension",
    "tiny",
    "extreme-aspect",
    "odd-size",
    "near-black",
    "near-white",
    "low-information",
    "blurry",
    "greyscale",
    "rotated",
    "exact-duplicates",
    "near-duplicates",
    "similar",
    "leakage",
    "label-conflict",
    "label-error",
    "outlier",
]
ISSUES: tuple[Issue, ...] = get_args(Issue)
DUPLICATE_ISSUES: tuple[Issue, ...] = ("exact-duplicates", "near-duplicates", "similar")
"""Issues of groups, of which one image is to be kept."""

MODEL_ISSUES: tuple[Issue, ...] = ("similar", "label-error", "outlier")
"""Issues that embeddings show."""

DuplicateTest = Callable[[IntArray, IntArray], BoolArray]
"""Of places (K,) and (M,): (K, M) bool, which of the ones are copies of which of the others."""

ISSUES_SCHEMA = pa.schema(
    [
        pa.field("manifest", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("path", pa.large_string()),
        pa.field("label", pa.string()),
        pa.field("issue", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("group", pa.int64()),
        pa.field("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Finding:
    """One issue of some images.

    at:     (K,) int64, places in `Images`
    score:  (K,) float32 in [0, 1], 1 the worst
    group:  (K,) int64, the same for images that belong together; None where each is by itself
    detail: what was found of each, for people
    alike:  of copies, which are so themselves; a group may hold others together
    """

    issue: Issue
    indices: IntArray
    score: FloatArray
    details: Sequence[str]
    group: IntArray | None = None
    is_duplicate: DuplicateTest | None = None

    def sort_worst_first(self) -> IntArray:
        """(K,) int64: the worst first; images of a group stay together, at their worst."""
        if self.group is None:
            return np.lexsort((self.indices, -self.score))
        _, group = np.unique(self.group, return_inverse=True)
        worst = np.zeros(len(self.indices))
        np.maximum.at(worst, group, self.score)
        return np.lexsort((self.indices, self.group, -worst[group]))


def build_issue_table(images: ImageTable, findings: Sequence[Finding]) -> pa.Table:
    """All findings as one table, by issue and with the worst first; groups stay together."""
    parts = []
    for finding in findings:
        order = finding.sort_worst_first()
        at = finding.indices[order]
        label = images.label[at]
        group = None if finding.group is None else finding.group[order]
        parts.append(
            pa.table(
                [
                    pa.array(images.manifests).take(pa.array(images.manifest_index[at])),
                    pa.array(images.row[at]),
                    images.path.take(pa.array(at)).combine_chunks(),
                    _get_label_names(images.classes, label),
                    pa.array([finding.issue] * len(at), pa.string()),
                    pa.array(finding.score[order], pa.float32()),
                    pa.nulls(len(at), pa.int64()) if group is None else pa.array(group),
                    pa.array([finding.details[i] for i in order], pa.string()),
                ],
                schema=ISSUES_SCHEMA,
            )
        )
    return pa.concat_tables(parts) if parts else ISSUES_SCHEMA.empty_table()


def _get_label_names(classes: Sequence[str], label: IntArray) -> pa.Array:
    named = label >= 0
    if not classes:
        return pa.nulls(len(label), pa.string())
    place = pa.array(np.where(named, label, 0), mask=~named)
    return pa.array(classes, pa.string()).take(place)
