"""What calibration fits for bundles of every task: the scaling of scores, and thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgcls import log
from imgcls.errors import RequestError
from imgcls.evaluation.label_set_calibration import SetQuality
from imgcls.formatting import format_list
from imgcls.metrics.selective import Threshold
from imgcls.models.acceptance import NEVER_ACCEPT
from imgcls.models.bundle import BundleSpec
from imgcls.runs.committed import CommittedRun

Scaling = tuple[NDArray[np.float32], NDArray[np.float32] | None]
"""(1,) or (C,) scale and (C,) bias, if any, of the log scores, or of the logits of multilabel."""

IDENTITY_SCALE = np.ones(1, np.float32)
MAX_SCORES = 50_000_000
"""Maximum number of scores in memory; of larger runs every n-th labeled row is used."""
SCORE_FLOORS = {
    np.dtype(np.float16): np.float32(2.0**-25),
    np.dtype(np.float32): np.finfo(np.float32).tiny,
}
"""Replaces scores that underflow to 0, by the type of the column."""
_MAX_LISTED = 20
_MAX_NEVER = 10


@dataclass(frozen=True)
class F1Quality:
    """F1 of the thresholds that a calibration chose, which are those with the best F1.

    Attributes
    ----------
    before : float
        Macro F1 with the thresholds of the old bundle: the mean over classes with a known label,
        0 for a class without labels and predictions.
    after : float
        Macro F1 of the chosen thresholds, cross-fitted.
    per_class : dict of str to float
        Cross-fitted F1 of each of these classes.
    """

    before: float
    after: float
    per_class: dict[str, float]


@dataclass(frozen=True)
class FittedCalibration:
    """Result of fitting, before the new bundle is written.

    spec:        of the new bundle, without its detector and its provenance
    rows:        number of labeled rows
    ece_before, ece_after, thresholds, label_set_quality, unchanged_reason, f1: as in `Calibration`
    record:      entries for the provenance, besides those of every calibration
    """

    spec: BundleSpec
    rows: int
    ece_before: float
    ece_after: float
    thresholds: list[Threshold]
    label_set_quality: SetQuality | None = None
    unchanged_reason: str | None = None
    f1: F1Quality | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


def search_temperature(compute_loss: Callable[[float], float]) -> float:
    """Temperature with the minimum loss, within [0.02, 50].

    Golden-section search over log T, in which the loss has one minimum.
    """
    low, high = float(np.log(0.02)), float(np.log(50.0))
    ratio = (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = compute_loss(float(np.exp(a))), compute_loss(float(np.exp(b)))
    while high - low > 1e-4:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = compute_loss(float(np.exp(a)))
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = compute_loss(float(np.exp(b)))
    return float(np.exp((low + high) / 2))


def apply_class_thresholds(spec: BundleSpec, thresholds: Sequence[Threshold]) -> BundleSpec:
    """Set one threshold per class; a class that does not reach the target is never accepted."""
    chosen = {
        each.label: NEVER_ACCEPT if each.threshold is None else each.threshold
        for each in thresholds
        if each.label is not None
    }
    strictest = max(
        (value for value in chosen.values() if value < NEVER_ACCEPT), default=NEVER_ACCEPT
    )
    return spec.model_copy(update={"threshold": strictest, "thresholds": chosen})


def check_finite_scores(run: CommittedRun, scores: NDArray[np.floating[Any]]) -> None:
    """Raise RequestError if a score of the run is NaN or infinite."""
    if not np.isfinite(scores).all():
        raise RequestError(
            f"{run.url}: some scores are NaN or infinite; predict again with a bundle "
            "whose network outputs finite scores"
        )


def log_thresholds(thresholds: Sequence[Threshold], taken: str, never_taken: str) -> None:
    """Show the thresholds, and name the classes without one.

    taken, never_taken: what happens to the predictions above a threshold, and without one
    """
    reached = [each for each in thresholds if each.threshold is not None]
    for each in reached[:_MAX_LISTED]:
        name = "all classes" if each.label is None else each.label
        assert each.precision is not None
        assert each.lower is not None
        assert each.upper is not None
        log.show(
            f"threshold  {each.threshold:.6g} for {name}: {each.precision:.2%} correct "
            f"({each.lower:.2%} to {each.upper:.2%}), {each.coverage:.2%} {taken}"
        )
    if len(reached) > _MAX_LISTED:
        log.show(f"           and {len(reached) - _MAX_LISTED:,} more classes")
    never = [each.label for each in thresholds if each.threshold is None]
    if never:
        log.emit(
            "note",
            f"{len(never):,} of {len(thresholds):,} classes never reach the target "
            f"({format_list(never, _MAX_NEVER)}); {never_taken}",
        )
