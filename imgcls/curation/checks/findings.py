"""Findings of a check: one row per image and issue, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pyarrow as pa

from imgcls.curation.checks.image_table import BoolArray, FloatArray, ImageTable, IntArray
from imgcls.curation.config import Issue

ISSUES: tuple[Issue, ...] = get_args(Issue)
DUPLICATE_ISSUES: tuple[Issue, ...] = ("exact-duplicates", "near-duplicates", "similar")
"""Issues of groups of duplicates, of which --drop keeps one image."""

MODEL_ISSUES: tuple[Issue, ...] = ("similar", "label-error", "outlier")
"""Issues that require the embeddings of a model."""

DuplicateTest = Callable[[IntArray, IntArray], BoolArray]
"""Called with images (K,) and (M,); returns (K, M) bool, whether each pair are duplicates."""

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
    """The images with one issue.

    indices:      (K,) int64, indices in `ImageTable`
    score:        (K,) float32 in [0, 1], 1 is the worst
    group:        (K,) int64, equal for images that belong together; None without groups
    details:      what was found about each image, as text
    is_duplicate: tests pairs of a group, which may contain images that are no duplicates
                  themselves; None where all of a group are
    """

    issue: Issue
    indices: IntArray
    score: FloatArray
    details: Sequence[str]
    group: IntArray | None = None
    is_duplicate: DuplicateTest | None = None

    def sort_worst_first(self) -> IntArray:
        """(K,) int64: the order by score, the worst first; groups stay together."""
        if self.group is None:
            return np.lexsort((self.indices, -self.score))
        _, group = np.unique(self.group, return_inverse=True)
        worst = np.zeros(len(self.indices))
        np.maximum.at(worst, group, self.score)
        return np.lexsort((self.indices, self.group, -worst[group]))


def build_issue_table(images: ImageTable, findings: Sequence[Finding]) -> pa.Table:
    """All findings as one table (`ISSUES_SCHEMA`), by issue, the worst first."""
    parts = []
    for finding in findings:
        order = finding.sort_worst_first()
        indices = finding.indices[order]
        group = None if finding.group is None else finding.group[order]
        parts.append(
            pa.table(
                [
                    pa.array(images.manifests).take(pa.array(images.manifest_index[indices])),
                    pa.array(images.row[indices]),
                    images.path.take(pa.array(indices)).combine_chunks(),
                    pa.array([images.describe_label(i) for i in indices.tolist()], pa.string()),
                    pa.array([finding.issue] * len(indices), pa.string()),
                    pa.array(finding.score[order], pa.float32()),
                    pa.nulls(len(indices), pa.int64()) if group is None else pa.array(group),
                    pa.array([finding.details[i] for i in order], pa.string()),
                ],
                schema=ISSUES_SCHEMA,
            )
        )
    return pa.concat_tables(parts) if parts else ISSUES_SCHEMA.empty_table()
