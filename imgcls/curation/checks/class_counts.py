"""Counts of the classes of a multi-label data set, and the classes that training may not learn.

A class is known for an image if it is positive or negative; an unknown one counts as neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from imgcls.curation.checks.image_table import IntArray
from imgcls.data.manifests.label_columns import NEGATIVE, POSITIVE, UNKNOWN
from imgcls.formatting import format_count

Targets = npt.NDArray[np.int8]
"""(N, C): POSITIVE, NEGATIVE or UNKNOWN."""

ClassIssueName = Literal["few-positives", "no-negatives", "always-together"]
_BLOCK_ROWS = 65_536
_MAX_PAIRS = 20
_MAX_PAIRED = 2000
"""Number of classes whose pairs are counted, to bound the memory to 64 MB."""


@dataclass(frozen=True)
class ClassIssue:
    """A class that a model may not learn from the data set.

    detail: what was found, as text
    """

    name: str
    issue: ClassIssueName
    detail: str


@dataclass(frozen=True)
class LabelCounts:
    """Images of each of C classes, and of each pair of the P most frequent ones.

    positives, negatives, unknown: (C,) int64
    paired:    (P,) int64, ascending numbers of the classes whose pairs are counted
    together:  (P, P) int64, images with both classes
    excluded:  (P, P) int64, images with the class of the row that are known not to have that of
               the column
    """

    classes: Sequence[str]
    positives: IntArray
    negatives: IntArray
    unknown: IntArray
    paired: IntArray
    together: IntArray
    excluded: IntArray

    def find_issues(self, min_positives: int) -> Iterator[ClassIssue]:
        """Classes with fewer positives, without negatives, or that never occur alone.

        A class with few positives is not compared with others.
        """
        for code, name in enumerate(self.classes):
            positives = int(self.positives[code])
            if positives < min_positives:
                detail = f"{format_count(positives, 'image')}, fewer than {min_positives}"
                yield ClassIssue(name, "few-positives", detail)
            if not self.negatives[code]:
                unknown = int(self.unknown[code])
                detail = "no image is known not to have it"
                if unknown:
                    detail += f"; it is unknown for {format_count(unknown, 'image')}"
                yield ClassIssue(name, "no-negatives", detail)
            elif positives >= max(min_positives, 1):
                others = self._find_implied(code)
                if others:
                    detail = f"every image with it also has {', '.join(others)}"
                    yield ClassIssue(name, "always-together", detail)

    def _find_implied(self, code: int) -> list[str]:
        """Texts of the classes that all images with a class have, but not all images.

        Images for which the other class is unknown do not count.
        """
        row = int(np.searchsorted(self.paired, code))
        if row == len(self.paired) or self.paired[row] != code:
            return []
        has_negatives = self.negatives[self.paired] > 0
        is_implied = (self.together[row] > 0) & (self.excluded[row] == 0) & has_negatives
        is_implied[row] = False
        is_known = self.together[row] == self.positives[code]
        return [
            repr(self.classes[self.paired[at]]) + ("" if is_known[at] else " (where known)")
            for at in np.flatnonzero(is_implied).tolist()
        ]

    def list_top_pairs(self, count: int = _MAX_PAIRS) -> list[dict[str, Any]]:
        """The pairs of classes that most images have, with their Jaccard index."""
        rows, columns = np.triu_indices(len(self.paired), 1)
        images = self.together[rows, columns]
        one, other = self.paired[rows], self.paired[columns]
        order = np.argsort(-images, kind="stable")[:count]
        pairs = []
        for at in order[images[order] > 0].tolist():
            either = self.positives[one[at]] + self.positives[other[at]] - images[at]
            pairs.append(
                {
                    "classes": [self.classes[one[at]], self.classes[other[at]]],
                    "images": int(images[at]),
                    "jaccard": float(images[at] / either),
                }
            )
        return pairs


def count_classes(targets: Targets, classes: Sequence[str]) -> LabelCounts:
    """Count the values of each class, and of each pair of the most frequent classes."""
    positives = (targets == POSITIVE).sum(axis=0)
    paired = np.sort(np.argsort(-positives, kind="stable")[:_MAX_PAIRED])
    together = np.zeros((len(paired), len(paired)), np.int64)
    excluded = np.zeros_like(together)
    for start in range(0, len(targets), _BLOCK_ROWS):
        block = targets[start : start + _BLOCK_ROWS, paired]
        # float32 counts of up to 65,536 are exact, and its matrix product is fast
        has = (block == POSITIVE).astype(np.float32)
        together += (has.T @ has).astype(np.int64)
        excluded += (has.T @ (block == NEGATIVE).astype(np.float32)).astype(np.int64)
    return LabelCounts(
        classes,
        positives,
        (targets == NEGATIVE).sum(axis=0),
        (targets == UNKNOWN).sum(axis=0),
        paired,
        together,
        excluded,
    )


def summarize_classes(
    targets: Targets, classes: Sequence[str], min_positives: int
) -> dict[str, Any]:
    """The entry `multilabel` of stats.json.

    min_positives: a class with fewer images is listed in `issues`
    """
    counts = count_classes(targets, classes)
    is_labeled = (targets != UNKNOWN).any(axis=1)
    per_image = (targets[is_labeled] == POSITIVE).sum(axis=1)
    distribution = enumerate(np.bincount(per_image).tolist())
    order = np.argsort(-counts.positives, kind="stable").tolist()
    return {
        "classes": {
            classes[code]: {
                "positives": int(counts.positives[code]),
                "negatives": int(counts.negatives[code]),
                "unknown": int(counts.unknown[code]),
            }
            for code in order
        },
        "labels_per_image": {
            "mean": float(per_image.mean()) if len(per_image) else None,
            "distribution": {str(number): count for number, count in distribution if count},
        },
        "unlabeled": int((~is_labeled).sum()),
        "pairs": counts.list_top_pairs(),
        "issues": [asdict(issue) for issue in counts.find_issues(min_positives)],
    }
