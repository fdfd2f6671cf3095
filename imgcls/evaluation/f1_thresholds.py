"""Choose the thresholds of a multilabel bundle with the best F1.

A threshold that was chosen for the best F1 has a lower one on new rows, so the F1 of the result is
cross-fitted. Source: Lipton, Elkan, Naryanaswamy, "Optimal thresholding of classifiers to maximize
F1 measure", ECML 2014.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imgcls.data.manifests.label_columns import POSITIVE, UNKNOWN
from imgcls.errors import RequestError
from imgcls.evaluation.calibration_fit import F1Quality
from imgcls.evaluation.config import CalibrateConfig
from imgcls.metrics.columns import Bools
from imgcls.metrics.intervals import wilson_interval
from imgcls.metrics.selective import Threshold

Scores = NDArray[np.float32]
Targets = NDArray[np.int8]


class BestF1(NamedTuple):
    """Chosen thresholds.

    thresholds: of all classes (`label` None), then of single classes
    update:     fields of the bundle's description
    """

    thresholds: list[Threshold]
    update: dict[str, Any]
    quality: F1Quality


class _Chosen(NamedTuple):
    """shared: threshold of all classes; per_class: (C,), NaN for a class without its own."""

    shared: float
    per_class: Scores

    def resolve(self) -> Scores:
        """(C,) thresholds."""
        found: Scores = np.where(np.isnan(self.per_class), self.shared, self.per_class)
        return found.astype(np.float32)


def choose_best_f1(
    scores: Scores,
    targets: Targets,
    old_scores: Scores,
    old_thresholds: Sequence[float],
    classes: Sequence[str],
    config: CalibrateConfig,
) -> BestF1:
    """Choose the thresholds with the best F1 of the known cells.

    scores, targets: (C, N)
    old_scores, old_thresholds: of the old bundle, to measure the improvement
    Raises RequestError for fewer than `min_rows` positives.
    """
    positives = int((targets == POSITIVE).sum())
    if positives < config.min_rows:
        raise RequestError(
            f"best_f1: needs {config.min_rows:,} labels of the held-out images, found "
            f"{positives:,}; hold out more images, or lower --min-rows"
        )
    per_class = config.has_class_thresholds
    found = _choose(scores, targets, per_class=per_class, min_rows=config.min_rows)
    thresholds = [_describe(None, found.shared, scores, targets)]
    own = np.flatnonzero(~np.isnan(found.per_class)).tolist()
    thresholds += [
        _describe(classes[c], float(found.per_class[c]), scores[c], targets[c]) for c in own
    ]
    update = {
        "threshold": found.shared,
        "thresholds": {classes[c]: float(found.per_class[c]) for c in own},
    }
    before = compute_class_f1(old_scores >= np.array(old_thresholds, np.float32)[:, None], targets)
    after = _cross_evaluate(scores, targets, per_class=per_class, min_rows=config.min_rows)
    is_known = (targets != UNKNOWN).any(1)
    quality = F1Quality(
        float(before[is_known].mean()),
        float(after[is_known].mean()),
        {classes[c]: float(after[c]) for c in np.flatnonzero(is_known).tolist()},
    )
    return BestF1(thresholds, update, quality)


def _choose(scores: Scores, targets: Targets, *, per_class: bool, min_rows: int) -> _Chosen:
    known = targets != UNKNOWN
    shared = find_best_threshold(scores[known], targets[known] == POSITIVE)
    own = np.full(len(scores), np.nan, np.float32)
    for c in np.flatnonzero((targets == POSITIVE).sum(1) >= min_rows) if per_class else ():
        own[c] = find_best_threshold(scores[c][known[c]], targets[c][known[c]] == POSITIVE)
    return _Chosen(shared, own)


def find_best_threshold(scores: Scores, is_positive: Bools) -> float:
    """The threshold with the best F1, in the middle between two scores; ties go to the higher one.

    scores: (N,) of one class, or of all
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(is_positive[order])
    # equal scores are predicted together
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    f1 = 2 * hits[ends] / (ends + 1 + hits[-1])
    best = int(ends[f1.argmax()])
    lowest = ranked[best]
    below = ranked[best + 1] if best + 1 < len(ranked) else np.float32(0)
    middle = np.float32((float(lowest) + float(below)) / 2)
    return float(middle if middle > below else lowest)


def compute_class_f1(is_predicted: Bools, targets: Targets) -> NDArray[np.float64]:
    """(C,) F1 of the known cells; 0 for a class without labels and predictions."""
    called = (is_predicted & (targets != UNKNOWN)).sum(1)
    hits = (is_predicted & (targets == POSITIVE)).sum(1)
    labeled = (targets == POSITIVE).sum(1)
    found: NDArray[np.float64] = 2 * hits / np.maximum(called + labeled, 1)
    return found


def _cross_evaluate(
    scores: Scores, targets: Targets, *, per_class: bool, min_rows: int
) -> NDArray[np.float64]:
    """(C,) F1 of all rows, each half with thresholds that were chosen on the other half."""
    is_predicted = np.zeros(scores.shape, bool)
    for half in (0, 1):
        fitted, rest = (slice(None), slice(half, None, 2)), (slice(None), slice(1 - half, None, 2))
        if not (targets[fitted] == POSITIVE).any():
            return np.full(len(scores), np.nan)
        # a half has half of the labels
        found = _choose(
            scores[fitted], targets[fitted], per_class=per_class, min_rows=max(1, min_rows // 2)
        )
        is_predicted[rest] = scores[rest] >= found.resolve()[:, None]
    return compute_class_f1(is_predicted, targets)


def _describe(label: str | None, threshold: float, scores: Scores, targets: Targets) -> Threshold:
    known = targets != UNKNOWN
    is_predicted = (scores >= np.float32(threshold)) & known
    support, hits = int(is_predicted.sum()), int((is_predicted & (targets == POSITIVE)).sum())
    low, high = wilson_interval(hits, support)
    return Threshold(
        label, threshold, hits / support, low, high, support / int(known.sum()), support
    )
