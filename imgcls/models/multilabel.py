"""Task of any number of classes per image: sigmoid, a threshold per class, binary cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imgcls.models.bundle import BundleSpec, TaskName, VectorScaling
from imgcls.models.label_sets import LabelSets
from imgcls.models.ood import OodScores
from imgcls.models.task import (
    OOD_FIELDS,
    TOP_K_FIELDS,
    Decisions,
    ScoreScaling,
    Task,
    build_score_column,
    build_score_field,
    build_top_k_columns,
    take_top_k,
)

if TYPE_CHECKING:
    import torch


class MultiLabel(Task):
    """Any number of classes per image, each decided by itself."""

    name: TaskName = "multilabel"
    metrics = ("mean_average_precision", "accuracy", "balanced_accuracy", "loss")
    default_threshold = 0.5
    needs_scores = True

    def activate(self, logits: torch.Tensor, scaling: ScoreScaling) -> torch.Tensor:
        """Sigmoid of the calibrated logits."""
        return self._calibrate(logits, scaling).sigmoid()

    def compute_scores(self, logits: torch.Tensor, scaling: ScoreScaling) -> torch.Tensor:
        """As `activate`, in float32; sigmoid alone gives an infinite logit a score of 0 or 1."""
        import torch

        calibrated = self._calibrate(logits.float(), scaling)
        is_finite = torch.isfinite(calibrated).all(dim=1, keepdim=True)
        return calibrated.sigmoid().where(is_finite, torch.nan)

    @staticmethod
    def _calibrate(logits: torch.Tensor, scaling: ScoreScaling) -> torch.Tensor:
        logits = logits / scaling.temperature
        if scaling.scale is None or scaling.bias is None:
            return logits
        return logits * scaling.scale + scaling.bias

    def add_scaling(
        self, spec: BundleSpec, scale: NDArray[np.float32], bias: NDArray[np.float32] | None
    ) -> BundleSpec:
        """Divide the temperature, or scale and shift the logits of each class (Platt 1999)."""
        count, old = len(spec.classes), spec.vector_scaling
        if bias is None and old is None and len(scale) == 1:
            return spec.model_copy(update={"temperature": spec.temperature / float(scale[0])})
        scales = np.broadcast_to(np.asarray(scale, np.float64), count)
        biases = np.zeros(count) if bias is None else np.asarray(bias, np.float64)
        if old is not None:
            scales, biases = scales * np.array(old.scale), scales * np.array(old.bias) + biases
        scaling = VectorScaling(scale=scales.tolist(), bias=biases.tolist())
        return spec.model_copy(update={"vector_scaling": scaling})

    def decide(
        self,
        scores: NDArray[np.float32],
        thresholds: Sequence[float] | NDArray[np.float32],
        top_k: int,
        order: NDArray[np.int64] | None = None,
    ) -> Decisions:
        """The top k classes, and every class whose score reaches its threshold."""
        classes, values = take_top_k(scores, top_k, order)
        is_predicted = scores >= np.asarray(thresholds, np.float32)
        return Decisions(classes, values, np.logical_or.reduce(is_predicted, 1), is_predicted)

    def build_fields(
        self,
        *,
        has_labels: bool,
        has_label_sets: bool = False,
        has_ood: bool = False,
        classes: int | None = None,
        scores_type: str = "float32",
    ) -> list[pa.Field]:
        """Columns of the predicted labels, the top k and the scores of all classes."""
        assert classes is not None
        labels = pa.field("predicted_labels", pa.list_(pa.string()))
        fields = [labels, *TOP_K_FIELDS, *(OOD_FIELDS if has_ood else ())]
        return [*fields, build_score_field(classes, scores_type)]

    def build_columns(
        self,
        scores: NDArray[np.float32],
        classes: Sequence[str],
        thresholds: Sequence[float],
        *,
        top_k: int,
        order: NDArray[np.int64] | None = None,
        codes: NDArray[np.int64] | None = None,
        label_sets: LabelSets | None = None,
        ood: OodScores | None = None,
        scores_type: str | None = None,
    ) -> dict[str, pa.Array]:
        """Columns of the decisions; the predicted labels of a row have the best one first."""
        found = self.decide(scores, thresholds, top_k, order)
        assert found.is_predicted is not None
        return {
            "predicted_labels": build_label_lists(scores, found.is_predicted, classes),
            **build_top_k_columns(found, pa.array(classes, pa.string()), ood),
            "scores": build_score_column(scores, scores_type or "float32"),
        }

    def compare_decisions(
        self,
        expected: NDArray[np.float32],
        scores: NDArray[np.float32],
        thresholds: Sequence[float] | NDArray[np.float32],
        margin: float = 0.0,
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Compare the decision of each class; the margin is the distance from its threshold."""
        required = np.asarray(thresholds, np.float32)
        differs = (expected >= required) != (scores >= required)
        is_clear = np.abs(expected - required) > margin
        return ~np.logical_or.reduce(differs, 1), np.logical_or.reduce(differs & is_clear, 1)

    def compute_loss(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        *,
        weights: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        negative_gamma: float | None = None,
        negative_margin: float = 0.0,
    ) -> torch.Tensor:
        """Binary cross-entropy summed over the known classes, focal or asymmetric if requested.

        focal_gamma is that of the positives, and of the negatives unless `negative_gamma` is set.
        A negative with a score below `negative_margin` has no loss. Source: Ridnik et al., ICCV
        2021, "Asymmetric loss for multi-label classification".
        """
        import torch
        from torch.nn import functional as F

        is_known = ~targets.isnan()
        shares = targets.nan_to_num(0.0) * (1 - label_smoothing) + label_smoothing / 2
        if not (focal_gamma or negative_gamma or negative_margin):
            terms = F.binary_cross_entropy_with_logits(
                logits, shares, pos_weight=weights, reduction="none"
            )
            return terms.where(is_known, 0.0).sum()
        positive, negative = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        gamma = focal_gamma if negative_gamma is None else negative_gamma
        # a score of exactly 0 or 1 would have an infinite slope under a root
        tiny = torch.finfo(torch.float32).tiny
        scores = logits.sigmoid()
        positive = positive * (1 - scores).clamp_min(tiny) ** focal_gamma
        if negative_margin:
            scores = (scores - negative_margin).clamp_min(0)
            negative = -torch.log1p(-scores.clamp_max(1 - torch.finfo(torch.float32).eps))
        negative = negative * scores.clamp_min(tiny) ** gamma
        if weights is not None:
            positive = positive * weights
        terms = shares * positive + (1 - shares) * negative
        return terms.where(is_known, 0.0).sum()

    def count_correct(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of each row's share of known classes that a threshold of 0.5 decides correctly."""
        is_known = ~targets.isnan()
        correct = ((logits >= 0) == (targets > 0.5)) & is_known
        return (correct.sum(1) / is_known.sum(1).clamp_min(1)).sum()

    def compute_row_losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of each row, summed over the known classes."""
        from torch.nn import functional as F

        terms = F.binary_cross_entropy_with_logits(
            logits, targets.nan_to_num(0.0), reduction="none"
        )
        return terms.where(~targets.isnan(), 0.0).sum(1)


def build_label_lists(
    scores: NDArray[np.float32], is_predicted: NDArray[np.bool_], classes: Sequence[str]
) -> pa.ListArray:
    """Names of the predicted classes of each row, best first; ties in class order."""
    rows, codes = np.nonzero(is_predicted)
    order = np.lexsort((codes, -scores[rows, codes], rows))
    offsets = np.zeros(len(scores) + 1, np.int32)
    np.cumsum(is_predicted.sum(1), out=offsets[1:])
    names = pa.array(classes, pa.string()).take(pa.array(codes[order]))
    return pa.ListArray.from_arrays(pa.array(offsets), names)


MULTILABEL = MultiLabel()
