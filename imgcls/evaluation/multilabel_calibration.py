"""Calibrate a multilabel bundle: the score of each class, and the thresholds of predicted labels.

A cell is one class of one row. Cells whose label is unknown are left out everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imgcls import log
from imgcls.data.manifests.label_columns import NEGATIVE, POSITIVE, UNKNOWN
from imgcls.errors import OK, RequestError
from imgcls.evaluation.aggregate import read_piece
from imgcls.evaluation.calibration_fit import (
    IDENTITY_SCALE,
    SCORE_FLOORS,
    FittedCalibration,
    Scaling,
    apply_class_thresholds,
    check_finite_scores,
    log_thresholds,
    search_temperature,
)
from imgcls.evaluation.config import CalibrateConfig
from imgcls.evaluation.f1_thresholds import choose_best_f1
from imgcls.evaluation.label_list_join import (
    JoinedLabelLists,
    LabelReader,
    require_label_lists,
)
from imgcls.formatting import format_count, format_list
from imgcls.metrics import expected_calibration_error, selective
from imgcls.metrics.columns import Bools, take_scores
from imgcls.metrics.counts import CORRECT, WRONG
from imgcls.metrics.selective import THRESHOLD_GRID, SelectiveCounts, Threshold
from imgcls.models.bundle import Bundle, BundleSpec
from imgcls.models.multilabel import MULTILABEL
from imgcls.runs.committed import CommittedRun

Logits = NDArray[np.float32]
Targets = NDArray[np.int8]

MAX_CELLS = 20_000_000
"""Maximum number of cells in memory, 2 GB; of larger runs every n-th labeled row is used."""
SCORE_GAPS = {
    np.dtype(np.float16): np.float32(2.0**-12),
    np.dtype(np.float32): np.float32(2.0**-25),
}
"""Replaces the distance from 1 of scores that round to 1, by the type of the column."""
MIN_PLATT_CELLS = 10
"""A class with fewer positives, or negatives, keeps the scale of all classes, and no bias."""
_PENALTY = 0.1
"""Weight of the squared distances from this scale and bias, where a cell's loss has weight 1."""
_MAX_STEPS = 50


@dataclass(frozen=True, eq=False)
class HeldOutCells:
    """Labeled rows with their scores; C classes, N rows.

    logits:  (C, N) float32, of the stored scores
    targets: (C, N) int8, as in `LabelMatrix`
    """

    logits: Logits
    targets: Targets

    @property
    def rows(self) -> int:
        """Number of rows N."""
        return len(self.targets.T)

    @property
    def known(self) -> int:
        """Number of cells with a known label."""
        return int(np.count_nonzero(self.targets != UNKNOWN))

    def split(self) -> tuple[HeldOutCells, HeldOutCells]:
        """Two halves: the even and the odd rows."""
        first, second = (
            HeldOutCells(self.logits[:, half::2], self.targets[:, half::2]) for half in (0, 1)
        )
        return first, second


def check_multilabel(config: CalibrateConfig) -> None:
    """Raise RequestError for settings that are for one label per image."""
    if config.coverage is not None:
        raise RequestError(
            "coverage: label sets are for one label per image, not for multilabel; pass "
            "--target-precision or --best-f1"
        )


def fit_multilabel(config: CalibrateConfig, bundle: Bundle, run: CommittedRun) -> FittedCalibration:
    """Fit the scores of a multilabel bundle, and choose its thresholds.

    Raises RequestError if the run has no labels, or no threshold can be chosen.
    """
    cells = load_held_out_cells(run, *require_label_lists(run, config.labels, config.on))
    before = compute_class_ece(compute_scores(cells.logits, IDENTITY_SCALE, None), cells.targets)
    fit = {"temperature": _fit_temperature_scaling, "vector": fit_platt_scaling}.get(config.method)
    reason = explain_undetermined_cells(cells) if fit is not None else None
    same = fit is None or reason is not None
    scaling: Scaling = (IDENTITY_SCALE, None)
    if fit is not None and reason is None:
        scaling = fit(cells)
    after = _compute_cross_fitted_ece(cells, fit) if fit is not None and not same else before
    spec = MULTILABEL.add_scaling(bundle.spec, *scaling) if not same else bundle.spec
    record: dict[str, float] = {"cells": cells.known, "best_f1": config.best_f1}
    scores = compute_scores(cells.logits, *scaling)
    if not same:
        standard = {"threshold": MULTILABEL.default_threshold, "thresholds": {}}
        spec = spec.model_copy(update=standard)
    if config.best_f1:
        old = bundle.spec.resolve_thresholds()
        old_scores = compute_scores(cells.logits, IDENTITY_SCALE, None)
        found = choose_best_f1(scores, cells.targets, old_scores, old, run.classes, config)
        spec = spec.model_copy(update=found.update)
        record |= {"f1_before": found.quality.before, "f1_after": found.quality.after}
        return FittedCalibration(
            spec, cells.rows, before, after, found.thresholds, None, reason, found.quality, record
        )
    thresholds = _choose_precise_thresholds(config, run, scores, cells.targets)
    spec = _apply_thresholds(spec, config, thresholds)
    return FittedCalibration(
        spec, cells.rows, before, after, thresholds, unchanged_reason=reason, record=record
    )


def load_held_out_cells(
    run: CommittedRun, labels: LabelReader, joined: JoinedLabelLists | None
) -> HeldOutCells:
    """Load the labeled rows of a run, evenly subsampled above `MAX_CELLS`.

    labels, joined: as `require_label_lists` returns them
    Raises RequestError if no row has a label.
    """
    if not run.has_scores:
        raise RequestError(run.describe_missing_scores("calibration"))
    every = max(1, -(-run.rows * len(run.classes) // MAX_CELLS))
    logits, targets = [], []
    seen = foreign = 0
    for piece in run.split_row_groups(10**9):
        keys = [] if joined is None else joined.required_columns
        names = list(dict.fromkeys(["status", "scores", *labels.names, *keys]))
        for table in read_piece(run, piece, names):
            table = table if joined is None else joined.join(table)
            encoded = labels.encode(table, run.classes)
            found, is_foreign = encoded.targets, encoded.has_unknown_name
            # a row without a label that is a class would be a negative of every class
            found[is_foreign & ~(found == POSITIVE).any(1)] = UNKNOWN
            foreign += int(is_foreign.sum())
            ok = pc.equal(table["status"].cast(pa.string()), OK).to_numpy()
            at = np.flatnonzero((found != UNKNOWN).any(1) & ok)
            kept = at[(seen + np.arange(len(at))) % every == 0]
            seen += len(at)
            scores = take_scores(table["scores"], kept)
            check_finite_scores(run, scores)
            logits.append(compute_logits(scores))
            targets.append(found[kept])
    if joined is not None:
        joined.finish()
    if not seen:
        raise RequestError(f"{run.url}: no prediction has a label that is a class of the model")
    if foreign:
        log.emit(
            "note",
            f"{format_count(foreign, 'row')} with a label that is no class of the model; those "
            "without any other label are left out. If labels are separated by a character, name it "
            "with --labels.label-delimiter",
        )
    # class by class, because each is fitted by itself
    return HeldOutCells(
        np.ascontiguousarray(np.concatenate(logits).T),
        np.ascontiguousarray(np.concatenate(targets).T),
    )


def compute_logits(scores: NDArray[np.float16] | NDArray[np.float32]) -> Logits:
    """Logits of scores; those that round to 0 or 1 get a finite logit."""
    wide = scores.astype(np.float32)
    above = np.log(np.maximum(wide, SCORE_FLOORS[scores.dtype]))
    above -= np.log(np.maximum(1 - wide, SCORE_GAPS[scores.dtype]))
    return np.asarray(above, np.float32)


def compute_scores(
    logits: Logits, scale: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> Logits:
    """(C, N) scores of logits under a scaling."""
    import torch

    scaled = logits * scale[:, None]
    if bias is not None:
        scaled += bias[:, None]
    found: Logits = torch.from_numpy(scaled).sigmoid_().numpy()
    return found


def compute_class_ece(scores: Logits, targets: Targets) -> float:
    """Expected calibration error of each class against the rest: mean over classes with labels."""
    errors = [
        expected_calibration_error(score[target != UNKNOWN], target[target != UNKNOWN] == POSITIVE)
        for score, target in zip(scores, targets, strict=True)
        if (target != UNKNOWN).any()
    ]
    return float(np.mean(errors)) if errors else float("nan")


def _compute_cross_fitted_ece(cells: HeldOutCells, fit: Callable[[HeldOutCells], Scaling]) -> float:
    """Calibration error of all rows, each half with the scaling fitted to the other half."""
    halves = cells.split()
    if not halves[1].rows:
        return float("nan")
    found = [compute_scores(rest.logits, *fit(fitted)) for fitted, rest in (halves, halves[::-1])]
    targets = np.concatenate([half.targets for half in halves[::-1]], axis=1)
    return compute_class_ece(np.concatenate(found, axis=1), targets)


def explain_undetermined_cells(cells: HeldOutCells) -> str | None:
    """Why the cells do not determine a temperature; None if they do.

    If every score is on the right side of 0.5, the loss decreases without bound with it.
    """
    if (_compute_margins(cells) >= 0).all():
        return "all held-out labels are predicted correctly, so they determine no temperature"
    return None


def _compute_margins(cells: HeldOutCells) -> Logits:
    """Logits of the known cells, negated for negatives: the loss of m is log(1 + exp(-m))."""
    signed = np.where(cells.targets == POSITIVE, cells.logits, -cells.logits)
    found: Logits = signed[cells.targets != UNKNOWN]
    return found


def fit_shared_temperature(cells: HeldOutCells) -> float:
    """Temperature of all classes with the minimum mean log loss of the cells, within [0.02, 50].

    1 (no change) if the cells do not determine it.
    """
    import torch

    if explain_undetermined_cells(cells) is not None:
        return 1.0
    margins = torch.from_numpy(_compute_margins(cells))

    def compute_loss(temperature: float) -> float:
        return float(torch.nn.functional.softplus(-margins / temperature).mean())

    return search_temperature(compute_loss)


def _fit_temperature_scaling(cells: HeldOutCells) -> Scaling:
    return np.array([1 / fit_shared_temperature(cells)], np.float32), None


def fit_platt_scaling(cells: HeldOutCells) -> Scaling:
    """(C,) scale and bias of the logits of each class, by maximum likelihood (Platt 1999).

    The targets are smoothed as Platt does, and an L2 penalty pulls a class towards the shared
    temperature and a bias of 0. A class with few positives or negatives, or whose scores do not
    increase with the label, keeps these.
    """
    start = 1 / fit_shared_temperature(cells)
    scale = np.full(len(cells.logits), start, np.float32)
    bias = np.zeros(len(cells.logits), np.float32)
    for place, (logit, target) in enumerate(zip(cells.logits, cells.targets, strict=True)):
        known = target != UNKNOWN
        counts = [int((target == kind).sum()) for kind in (POSITIVE, NEGATIVE)]
        if min(counts) < MIN_PLATT_CELLS:
            continue
        found = _fit_class(logit[known].astype(np.float64), target[known] == POSITIVE, start)
        if found[0] > 0:
            scale[place], bias[place] = found
    return scale, bias


def _fit_class(logit: NDArray[np.float64], is_positive: Bools, start: float) -> NDArray[np.float64]:
    """Scale and bias of one class, by Newton's method with step halving.

    Source: Platt, "Probabilistic outputs for support vector machines" (1999); Lin, Lin, Weng, "A
    note on Platt's probabilistic outputs", Machine Learning 68 (2007).
    """
    positives = np.count_nonzero(is_positive)
    smoothed = ((positives + 1) / (positives + 2), 1 / (len(logit) - positives + 2))
    share = np.where(is_positive, *smoothed)
    inputs = np.stack([logit, np.ones_like(logit)])
    center = np.array([start, 0.0])

    def compute_loss(weights: NDArray[np.float64]) -> float:
        scaled = weights @ inputs
        losses = np.logaddexp(0, scaled) - share * scaled
        return float(losses.sum() + _PENALTY * ((weights - center) ** 2).sum())

    weights = center.copy()
    loss = compute_loss(weights)
    for _ in range(_MAX_STEPS):
        scores = 1 / (1 + np.exp(-np.clip(weights @ inputs, -500, 500)))
        slope = inputs @ (scores - share) + 2 * _PENALTY * (weights - center)
        curve = (inputs * (scores * (1 - scores))) @ inputs.T + 2 * _PENALTY * np.eye(2)
        step = np.linalg.solve(curve, slope)
        size = 1.0
        while size > 1e-6 and (after := compute_loss(weights - size * step)) > loss:
            size /= 2
        if size <= 1e-6:
            break
        weights, change, loss = weights - size * step, loss - after, after
        if change < 1e-9 * (1 + abs(loss)):
            break
    return weights


def _choose_precise_thresholds(
    config: CalibrateConfig, run: CommittedRun, scores: Logits, targets: Targets
) -> list[Threshold]:
    """Lowest thresholds whose predicted labels reach the target precision."""
    if config.target_precision is None:
        return []
    counts = count_cells(scores, targets, run.classes)
    target, min_rows = config.target_precision, config.min_rows
    if config.has_class_thresholds:
        return [
            selective.choose_threshold(counts, target, name, min_rows=min_rows)
            for name in run.classes
        ]
    found = selective.choose_threshold(counts, target, min_rows=min_rows)
    if found.threshold is None:
        raise RequestError(
            f"target_precision {target:g}: no threshold reaches it with {min_rows} predicted "
            f"labels of {int(counts.counts.sum()):,}; lower it, or hold out more images"
        )
    return [found]


def count_cells(scores: Logits, targets: Targets, classes: tuple[str, ...]) -> SelectiveCounts:
    """Count the known cells as predictions of their class, which are correct for a positive."""
    counts = SelectiveCounts.empty(classes).counts
    size = len(THRESHOLD_GRID)
    for place, (score, target) in enumerate(zip(scores, targets, strict=True)):
        cell = np.maximum(np.searchsorted(THRESHOLD_GRID, score, side="right") - 1, 0)
        for outcome, kind in ((CORRECT, POSITIVE), (WRONG, NEGATIVE)):
            counts[outcome, place] = np.bincount(cell[target == kind], minlength=size)
    return SelectiveCounts(classes, counts)


def _apply_thresholds(
    spec: BundleSpec, config: CalibrateConfig, thresholds: list[Threshold]
) -> BundleSpec:
    if not thresholds:
        return spec
    if config.has_class_thresholds:
        return apply_class_thresholds(spec, thresholds)
    return spec.model_copy(update={"threshold": thresholds[0].threshold, "thresholds": {}})


def log_multilabel(config: CalibrateConfig, bundle: Bundle, fitted: FittedCalibration) -> None:
    """Show the errors, the thresholds, and what was not fitted."""
    spec = fitted.spec
    log.show(f"held out   {fitted.rows:,} labeled rows, {fitted.record['cells']:,} known labels")
    if config.method == "temperature" and spec.vector_scaling is None:
        log.show(f"temperature {bundle.spec.temperature:.4f} -> {spec.temperature:.4f}")
    if config.method != "none":
        log.show(
            f"ECE        {fitted.ece_before:.4f} before, {fitted.ece_after:.4f} after (mean over "
            "classes, two-fold cross-fitting)"
        )
    log_thresholds(fitted.thresholds, "predicted", "they are never predicted")
    if fitted.f1 is not None:
        log.show(
            f"macro F1   {fitted.f1.before:.4f} before, {fitted.f1.after:.4f} after (two-fold "
            "cross-fitting)"
        )
        chosen = {each.label for each in fitted.thresholds}
        few = [name for name in bundle.spec.classes if name not in chosen]
        if config.has_class_thresholds and few:
            log.emit(
                "note",
                f"{len(few):,} of {len(bundle.spec.classes):,} classes have fewer than "
                f"{config.min_rows} images with the class ({format_list(few, 10)}); "
                "they get the threshold of all classes",
            )
    old = set(bundle.spec.resolve_thresholds())
    if fitted.unchanged_reason is not None:
        log.emit(
            "note",
            f"{fitted.unchanged_reason}; the scores are unchanged. Hold out more images, "
            "including some that the model predicts wrong",
        )
    elif (
        not fitted.thresholds and config.method != "none" and old != {MULTILABEL.default_threshold}
    ):
        log.emit(
            "note",
            "the old thresholds do not apply to the new scores and are now "
            f"{MULTILABEL.default_threshold:g}; pass --best-f1 or --target-precision to choose "
            "others",
        )
