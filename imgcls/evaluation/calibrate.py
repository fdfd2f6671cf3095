"""Calibrate a bundle, choose acceptance thresholds and label sets, on a held-out run.

Fits a temperature (or a scale and a bias per class) to the scores of a run, so no image is read
again, and writes a new bundle. Errors after fitting are cross-fitted: each half of the rows is
evaluated with the parameters fitted to the other half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imgcls import log
from imgcls.data.manifests.manifest import normalize_labels
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import OK, RequestError
from imgcls.evaluation.aggregate import read_piece
from imgcls.evaluation.calibration_fit import (
    IDENTITY_SCALE,
    MAX_SCORES,
    SCORE_FLOORS,
    F1Quality,
    FittedCalibration,
    Scaling,
    apply_class_thresholds,
    check_finite_scores,
    log_thresholds,
    search_temperature,
)
from imgcls.evaluation.config import CalibrateConfig
from imgcls.evaluation.label_join import JoinedLabels, resolve_labels
from imgcls.evaluation.label_set_calibration import (
    ScaledRows,
    SetQuality,
    choose_label_sets,
    cross_evaluate,
    log_label_sets,
)
from imgcls.evaluation.multilabel_calibration import (
    check_multilabel,
    fit_multilabel,
    log_multilabel,
)
from imgcls.evaluation.ood_calibration import (
    MadeDetector,
    check_runs,
    log_detector,
    make_detector,
)
from imgcls.metrics import expected_calibration_error, selective
from imgcls.metrics.columns import Ints, OkRows, encode_classes, take_scores
from imgcls.metrics.selective import SelectiveCounts, Threshold
from imgcls.models.bundle import (
    Bundle,
    BundleSpec,
    check_bundle_output,
    load_bundle,
    load_bundle_weights,
    load_int8_model,
    load_ood_arrays,
    save_bundle,
)
from imgcls.models.single_label import SINGLE_LABEL
from imgcls.models.tasks import find_task
from imgcls.runs.committed import CommittedRun, open_run

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration.

    Attributes
    ----------
    bundle : Bundle
        The new bundle.
    temperature : float
        Its temperature.
    ece_before, ece_after : float
        Expected calibration error, as fractions; `ece_after` is cross-fitted.
    thresholds : list of Threshold
        Chosen thresholds: none, one for all classes, or one per class.
    label_set_quality : SetQuality or None
        Cross-fitted coverage and size of the label sets; None if none were chosen, or for too few
        rows.
    unchanged_reason : str or None
        Why the confidences are those of the old bundle; None if they were fitted.
    f1 : F1Quality or None
        Macro F1 before and after; None unless thresholds with the best F1 were chosen.
    """

    bundle: Bundle
    temperature: float
    ece_before: float
    ece_after: float
    thresholds: list[Threshold]
    label_set_quality: SetQuality | None = None
    unchanged_reason: str | None = None
    f1: F1Quality | None = None


@dataclass(frozen=True, eq=False)
class HeldOutScores:
    """Labeled rows with their scores.

    Attributes
    ----------
    log_scores : ndarray of float32, shape (N, C)
        Logits up to a constant per row.
    label : ndarray of int64, shape (N,)
        Class indices.
    is_rounded : bool
        Whether the scores were stored as float16.
    """

    log_scores: Logits
    label: Ints
    is_rounded: bool = False


@with_config_storage
def calibrate(config: CalibrateConfig) -> Calibration:
    """Calibrate a bundle, choose thresholds and label sets, and write the new bundle.

    Parameters
    ----------
    config : CalibrateConfig
        Settings of `imgcls calibrate`.

    Returns
    -------
    Calibration
        The new bundle, the calibration errors before and after, and the thresholds.

    Raises
    ------
    RequestError
        If the run was made by another bundle, has no labels or no scores, no threshold reaches the
        target precision, or there are too few rows for the label sets.
    OutputError
        If the run is not committed, or the output has a bundle.
    """
    bundle = load_bundle(config.model)
    run = open_run(config.predictions)
    run.check_predictions()
    run.check_bundle(bundle)
    check_bundle_output(config.output, overwrite=config.overwrite, source=bundle.url)
    _check_purpose(config, bundle)
    if config.max_ood_rate is not None:
        check_runs(config, bundle, run)
    is_multilabel = bundle.spec.task == "multilabel"
    fitted = (fit_multilabel if is_multilabel else _fit_single_label)(config, bundle, run)
    made, ood = _save_calibrated(config, bundle, run, fitted)
    result = Calibration(
        made,
        made.spec.temperature,
        fitted.ece_before,
        fitted.ece_after,
        fitted.thresholds,
        fitted.label_set_quality,
        fitted.unchanged_reason,
        fitted.f1,
    )
    if is_multilabel:
        log_multilabel(config, bundle, fitted)
    else:
        _log_result(config, bundle, result, fitted.rows)
    if ood is not None:
        log_detector(ood)
    log.show(f"bundle     {made.url}")
    return result


def _fit_single_label(
    config: CalibrateConfig, bundle: Bundle, run: CommittedRun
) -> FittedCalibration:
    """Fit the confidences, and choose thresholds and label sets."""
    rows = load_held_out(run, *resolve_labels(run, config.labels, config.on, required=True))
    before = _compute_ece(rows, IDENTITY_SCALE, None)
    fit = {"temperature": _fit_temperature_scaling, "vector": fit_vector_scaling}.get(config.method)
    reason = explain_undetermined(rows) if fit is not None else None
    scaling = fit(rows) if fit is not None else (IDENTITY_SCALE, None)
    after = _compute_cross_fitted_ece(rows, fit) if fit is not None and reason is None else before
    thresholds = list(_choose_thresholds(config, run, rows, *scaling))
    same = fit is None or reason is not None
    scaled = find_task(bundle.spec).add_scaling(bundle.spec, *scaling)
    spec = _apply_thresholds(scaled, config, thresholds, same=same)
    quality, scaled_rows = None, ScaledRows(rows.log_scores, rows.label, *scaling)
    if config.coverage is not None:
        sets = choose_label_sets(config, scaled_rows, is_rounded=rows.is_rounded)
        spec = spec.model_copy(update={"label_sets": sets})
        quality = cross_evaluate(config, scaled_rows)
    elif not same:
        spec = spec.model_copy(update={"label_sets": None})
    count = len(rows.label)
    return FittedCalibration(spec, count, before, after, thresholds, quality, reason)


def _save_calibrated(
    config: CalibrateConfig, bundle: Bundle, run: CommittedRun, fitted: FittedCalibration
) -> tuple[Bundle, MadeDetector | None]:
    """Write the new bundle, with its detector and its provenance."""
    spec = fitted.spec
    ood = None if config.max_ood_rate is None else make_detector(config, bundle, run)
    ood_arrays = load_ood_arrays(bundle) if ood is None else ood.detector.serialize()
    if ood is not None:
        spec = spec.model_copy(update={"ood": ood.spec})
    record = {
        "bundle_sha256": bundle.sha256,
        "predictions": run.url,
        "manifest_fingerprint": run.manifest_fingerprint,
        "rows": fitted.rows,
        "method": config.method,
        "ece_before": fitted.ece_before,
        "ece_after": fitted.ece_after,
        "target_precision": config.target_precision,
        "coverage": config.coverage,
        "max_ood_rate": config.max_ood_rate,
        **fitted.record,
    }
    spec = spec.model_copy(update={"provenance": spec.provenance | {"calibration": record}})
    spec = _forget_int8_accuracy(bundle.spec, spec)
    made = save_bundle(
        config.output,
        spec,
        load_bundle_weights(bundle),
        int8_model=load_int8_model(bundle),
        ood_arrays=ood_arrays,
    )
    return made, ood


def _forget_int8_accuracy(old: BundleSpec, new: BundleSpec) -> BundleSpec:
    """The new description without the measured accuracy of int8 where it decides otherwise."""
    deciding = {"vector_scaling"}
    if new.task == "multilabel":
        deciding |= {"temperature", "threshold", "thresholds"}
    if new.int8 is None or all(getattr(old, name) == getattr(new, name) for name in deciding):
        return new
    forgotten = {"agreement": None, "accuracy": None, "accuracy_fp32": None}
    return new.model_copy(update={"int8": new.int8.model_copy(update=forgotten)})


def _check_purpose(config: CalibrateConfig, bundle: Bundle) -> None:
    """Raise RequestError for settings that have no effect, or are for another task."""
    if bundle.spec.task == "multilabel":
        check_multilabel(config)
    elif config.best_f1:
        raise RequestError(
            f"best_f1: is for multilabel bundles, {bundle.url} has one label per image; pass "
            "--target-precision"
        )
    elif config.method == "vector" and bundle.spec.vector_scaling is not None:
        raise RequestError(
            f"{bundle.url}: is vector-scaled already; calibrate the bundle it was made from"
        )
    chosen = (config.target_precision, config.coverage, config.max_ood_rate)
    if config.method == "none" and chosen == (None, None, None) and not config.best_f1:
        other = "--coverage" if bundle.spec.task == "single_label" else "--best-f1"
        raise RequestError(
            f"method none: has no effect without --target-precision, {other} or --max-ood-rate; "
            "pass one, or another --method"
        )
    if config.max_ood_rate is None and (config.ood_reference or config.ood_method != "knn"):
        name = "ood_reference" if config.ood_reference else "ood_method"
        raise RequestError(f"{name}: has no effect without --max-ood-rate; pass it, such as 0.05")
    if config.coverage is None and (config.coverage_per_class or config.rank_penalty):
        name = "coverage_per_class" if config.coverage_per_class else "rank_penalty"
        raise RequestError(f"{name}: has no effect without --coverage; pass --coverage 0.9")


def load_held_out(
    run: CommittedRun, label_column: str | None, joined: JoinedLabels | None
) -> HeldOutScores:
    """Load the labeled rows of a run with all scores, evenly subsampled above `MAX_SCORES`.

    label_column, joined: as `resolve_labels` returns them
    Raises RequestError if there are no scores, or no row has a label.
    """
    if not run.has_scores:
        raise RequestError(run.describe_missing_scores("calibration"))
    size = len(run.classes)
    every = max(1, -(-run.rows * size // MAX_SCORES))
    names = [
        "status",
        "scores",
        *(joined.required_columns if joined is not None else [str(label_column)]),
    ]
    logs, labels = [], []
    seen = 0
    for piece in run.split_row_groups(10**9):
        for table in read_piece(run, piece, list(dict.fromkeys(names))):
            if joined is not None:
                table = joined.join(table)
            text = normalize_labels(table[label_column])
            code = encode_classes(pa.chunked_array([text]), run.classes)
            ok = pc.equal(table["status"].cast(pa.string()), OK).to_numpy()
            at = np.flatnonzero((code >= 0) & ok)
            at = at[(seen + np.arange(len(at))) % every == 0]
            seen += int(((code >= 0) & ok).sum())
            scores = take_scores(table["scores"], at)
            check_finite_scores(run, scores)
            floor = SCORE_FLOORS[scores.dtype]
            logs.append(np.log(np.maximum(scores.astype(np.float32), floor)))
            labels.append(code[at])
    if joined is not None:
        joined.finish()
    if not seen:
        raise RequestError(f"{run.url}: no prediction has a label that is a class of the model")
    is_rounded = pa.types.is_float16(run.schema.field("scores").type.value_type)
    return HeldOutScores(np.concatenate(logs), np.concatenate(labels), is_rounded)


def explain_undetermined(rows: HeldOutScores) -> str | None:
    """Why the rows do not determine a temperature; None if they do.

    If every label has the highest score of its row, the log loss decreases without bound with the
    temperature. If labels score no better than other classes, the loss has its minimum at the upper
    bound of the temperature: nearly equal scores.
    """
    own = np.take_along_axis(rows.log_scores, rows.label[:, None], axis=1)[:, 0]
    if (own >= rows.log_scores.max(axis=1)).all():
        return "all held-out predictions are correct, so they determine no temperature"
    return None


def fit_temperature(rows: HeldOutScores) -> float:
    """Temperature with the minimum mean log loss, within [0.02, 50].

    1 (no change) if the rows do not determine it.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    import torch

    if explain_undetermined(rows) is not None:
        return 1.0
    logs, label = torch.from_numpy(rows.log_scores), torch.from_numpy(rows.label)

    def compute_loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logs / temperature, label))

    return search_temperature(compute_loss)


def _fit_temperature_scaling(rows: HeldOutScores) -> Scaling:
    return np.array([1 / fit_temperature(rows)], np.float32), None


def fit_vector_scaling(rows: HeldOutScores) -> Scaling:
    """(C,) scale and bias of the log scores with the minimum regularized mean log loss.

    (1,) and no bias if the rows do not determine a temperature. L-BFGS; the L2 penalty (1e-3 of the
    mean square distance from the temperature's scale and bias 0) bounds the parameters of classes
    with few rows. Source: Guo et al., ICML 2017, vector scaling.
    """
    import torch

    if explain_undetermined(rows) is not None:
        return IDENTITY_SCALE, None
    logs, label = torch.from_numpy(rows.log_scores), torch.from_numpy(rows.label)
    scale = torch.full((logs.shape[1],), 1 / fit_temperature(rows), requires_grad=True)
    bias = torch.zeros(logs.shape[1], requires_grad=True)
    start = scale.detach().clone()
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logs * scale + bias, label)
        loss = loss + 1e-3 * (((scale - start) ** 2).mean() + (bias**2).mean())
        loss.backward()
        return loss

    optimizer.step(closure)
    return scale.detach().numpy(), bias.detach().numpy()


def compute_confidences(
    rows: HeldOutScores, scale: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], Ints]:
    """(N,) confidence and predicted class index under a scaling of the log scores."""
    return SINGLE_LABEL.compute_confidences(rows.log_scores, scale, bias)


def _compute_ece(
    rows: HeldOutScores, scale: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> float:
    confidence, predicted = compute_confidences(rows, scale, bias)
    return expected_calibration_error(confidence, predicted == rows.label)


def _compute_cross_fitted_ece(
    rows: HeldOutScores, fit: Callable[[HeldOutScores], Scaling]
) -> float:
    """Calibration error of all rows, each half with the scaling fitted to the other half."""
    halves = [np.arange(half, len(rows.label), 2) for half in (0, 1)]
    if min(len(half) for half in halves) == 0:
        return float("nan")
    parts = [HeldOutScores(rows.log_scores[half], rows.label[half]) for half in halves]
    found = [
        (*compute_confidences(rest, *fit(fitted)), rest.label)
        for rest, fitted in (parts, parts[::-1])
    ]
    confidence = np.concatenate([each[0] for each in found])
    correct = np.concatenate([each[1] == each[2] for each in found])
    return expected_calibration_error(confidence, correct)


def _choose_thresholds(
    config: CalibrateConfig,
    run: CommittedRun,
    rows: HeldOutScores,
    scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
) -> Iterator[Threshold]:
    if config.target_precision is None:
        return
    confidence, predicted = compute_confidences(rows, scale, bias)
    ok_rows = OkRows(
        status={OK: len(predicted)},
        position=np.arange(len(predicted)),
        predicted=predicted,
        label=rows.label,
        confidence=np.minimum(confidence, 1.0).astype(np.float64),
        accepted=np.ones(len(predicted), bool),
        label_score=np.full(len(predicted), np.nan),
        label_rank=np.zeros(0, np.int64),
    )
    counts = SelectiveCounts.from_rows(ok_rows, run.classes)
    target, min_rows = config.target_precision, config.min_rows
    if not config.per_class:
        found = selective.choose_threshold(counts, target, min_rows=min_rows)
        if found.threshold is None:
            raise RequestError(
                f"target_precision {target:g}: no threshold reaches it with {min_rows} accepted "
                f"rows of {len(predicted):,}; lower it, or hold out more images"
            )
        yield found
        return
    for name in run.classes:
        yield selective.choose_threshold(counts, target, name, min_rows=min_rows)


def _apply_thresholds(
    spec: BundleSpec, config: CalibrateConfig, thresholds: list[Threshold], *, same: bool
) -> BundleSpec:
    """Set the thresholds of the bundle; thresholds of other confidences are removed.

    same: whether the confidences are those of the old bundle
    """
    if not thresholds:
        return spec if same else spec.model_copy(update={"threshold": 0.0, "thresholds": {}})
    if not config.per_class:
        return spec.model_copy(update={"threshold": thresholds[0].threshold, "thresholds": {}})
    return apply_class_thresholds(spec, thresholds)


def _log_result(config: CalibrateConfig, bundle: Bundle, result: Calibration, rows: int) -> None:
    log.show(f"held out   {rows:,} labeled rows")
    if config.method == "temperature":
        log.show(f"temperature {bundle.spec.temperature:.4f} -> {result.temperature:.4f}")
    if config.method != "none":
        log.show(
            f"ECE        {result.ece_before:.4f} before, {result.ece_after:.4f} after (two-fold "
            "cross-fitting)"
        )
    log_thresholds(result.thresholds, "accepted", "their predictions are not accepted")
    sets = result.bundle.spec.label_sets
    if config.coverage is not None and sets is not None:
        log_label_sets(sets, result.label_set_quality, tuple(bundle.spec.classes))
    elif bundle.spec.label_sets is not None and sets is None:
        log.emit(
            "note",
            "the old label sets do not apply to the new confidences and are removed; pass "
            "--coverage to choose new ones",
        )
    changed = bundle.spec.threshold or bundle.spec.thresholds
    if result.unchanged_reason is not None:
        log.emit(
            "note",
            f"{result.unchanged_reason}; the confidences are unchanged. Hold out more "
            "images, including some that the model predicts wrong",
        )
    elif config.target_precision is None and changed and config.method != "none":
        log.emit(
            "note",
            "the old threshold does not apply to the new confidences and is now 0; pass "
            "--target-precision to choose one",
        )
