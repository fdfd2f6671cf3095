"""Task of exactly one class per image: softmax, arg max, cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imgcls.models.bundle import BundleSpec, TaskName, VectorScaling
from imgcls.models.label_sets import LabelSets, build_set_column, find_label_sets
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

AnyFloat = TypeVar("AnyFloat", bound=np.floating[Any])

_BLOCK_VALUES = 4_000_000
"""Number of log scores that are scaled at a time."""


class SingleLabel(Task):
    """Exactly one class per image: softmax, arg max, cross-entropy."""

    name: TaskName = "single_label"
    metrics = ("accuracy", "balanced_accuracy", "loss")

    def activate(self, logits: torch.Tensor, scaling: ScoreScaling) -> torch.Tensor:
        """Softmax of the calibrated logits."""
        return self._calibrate(logits, scaling).softmax(dim=1)

    def compute_scores(self, logits: torch.Tensor, scaling: ScoreScaling) -> torch.Tensor:
        """As `activate`, in float32; softmax alone gives a logit of minus infinity a score of 0."""
        import torch

        calibrated = self._calibrate(logits.float(), scaling)
        is_finite = torch.isfinite(calibrated).all(dim=1, keepdim=True)
        return calibrated.softmax(dim=1).where(is_finite, torch.nan)

    @staticmethod
    def _calibrate(logits: torch.Tensor, scaling: ScoreScaling) -> torch.Tensor:
        logits = logits / scaling.temperature
        if scaling.scale is None or scaling.bias is None:
            return logits
        return logits.log_softmax(dim=1) * scaling.scale + scaling.bias

    def iter_scaled_scores(
        self,
        log_scores: NDArray[np.float32],
        scale: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Softmax in blocks of rows."""
        block = max(1, _BLOCK_VALUES // log_scores.shape[1])
        for start in range(0, len(log_scores), block):
            part = slice(start, start + block)
            scores = log_scores[part] * scale
            if bias is not None:
                scores = scores + bias
            scores -= scores.max(1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(1, keepdims=True)
            yield part, scores

    def compute_confidences(
        self,
        log_scores: NDArray[np.float32],
        scale: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Maximum and arg max of the softmax, in blocks of rows."""
        confidence = np.empty(len(log_scores), np.float32)
        predicted = np.empty(len(log_scores), np.int64)
        for part, scores in self.iter_scaled_scores(log_scores, scale, bias):
            predicted[part] = scores.argmax(1)
            confidence[part] = scores.max(1)
        return confidence, predicted

    def add_scaling(
        self, spec: BundleSpec, scale: NDArray[np.float32], bias: NDArray[np.float32] | None
    ) -> BundleSpec:
        """Set vector scaling where there is a bias, else divide the temperature."""
        if bias is not None:
            scaling = VectorScaling(scale=scale.tolist(), bias=bias.tolist())
            return spec.model_copy(update={"vector_scaling": scaling})
        factor, old = float(scale[0]), spec.vector_scaling
        if old is None:
            return spec.model_copy(update={"temperature": spec.temperature / factor})
        scaling = VectorScaling(
            scale=[factor * value for value in old.scale],
            bias=[factor * value for value in old.bias],
        )
        return spec.model_copy(update={"vector_scaling": scaling})

    def decide(
        self,
        scores: NDArray[np.float32],
        thresholds: Sequence[float] | NDArray[np.float32],
        top_k: int,
        order: NDArray[np.int64] | None = None,
    ) -> Decisions:
        """The top k classes; ties go to the lower index."""
        classes, values = take_top_k(scores, top_k, order)
        required = np.asarray(thresholds, np.float32)[classes[:, 0]]
        return Decisions(classes, values, values[:, 0] >= required)

    def compare_decisions(
        self,
        expected: NDArray[np.float32],
        scores: NDArray[np.float32],
        thresholds: Sequence[float] | NDArray[np.float32],
        margin: float = 0.0,
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Compare the arg max; the margin is the lead of the best score over the next."""
        is_same = expected.argmax(axis=1) == scores.argmax(axis=1)
        if expected.shape[1] < 2:
            return is_same, ~is_same
        ranked = np.sort(expected, axis=1)
        return is_same, ~is_same & (ranked[:, -1] - ranked[:, -2] > margin)

    def rank_labels(
        self, scores: NDArray[AnyFloat], codes: NDArray[np.int64]
    ) -> tuple[NDArray[AnyFloat], NDArray[np.int64]]:
        """Score and rank of each label; equal scores rank in class order, as in the top k."""
        own = np.take_along_axis(scores, codes[:, None], axis=1)
        is_earlier = np.arange(scores.shape[1])[None, :] < codes[:, None]
        rank: NDArray[np.int64] = 1 + ((scores > own) | ((scores == own) & is_earlier)).sum(1)
        return own[:, 0], rank

    def build_fields(
        self,
        *,
        has_labels: bool,
        has_label_sets: bool = False,
        has_ood: bool = False,
        classes: int | None = None,
        scores_type: str = "float32",
    ) -> list[pa.Field]:
        """Columns of the predicted class, its confidence, the top k and the label set."""
        fields = [
            pa.field("predicted_label", pa.string()),
            pa.field("confidence", pa.float32()),
            *TOP_K_FIELDS,
        ]
        if has_label_sets:
            fields.append(pa.field("label_set", pa.list_(pa.string())))
        if has_ood:
            fields += OOD_FIELDS
        if has_labels:
            fields += [pa.field("label_score", pa.float32()), pa.field("label_rank", pa.int32())]
        if classes is not None:
            fields.append(build_score_field(classes, scores_type))
        return fields

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
        """Columns of the decisions; the score and rank of a label that is no class are null."""
        sets: dict[str, pa.Array] = {}
        if label_sets is not None:
            every, is_included = find_label_sets(scores, label_sets)
            sets["label_set"] = build_set_column(every, is_included, classes)
            order = every[:, :top_k]
        found = self.decide(scores, thresholds, top_k, order)
        names = pa.array(classes, pa.string())
        columns: dict[str, pa.Array] = {
            "predicted_label": names.take(pa.array(found.classes[:, 0])),
            "confidence": pa.array(found.scores[:, 0]),
            **build_top_k_columns(found, names, ood),
            **sets,
        }
        if codes is not None:
            is_known = codes >= 0
            score, rank = np.zeros(len(codes), np.float32), np.zeros(len(codes), np.int32)
            score[is_known], rank[is_known] = self.rank_labels(scores[is_known], codes[is_known])
            columns["label_score"] = pa.array(score, mask=~is_known)
            columns["label_rank"] = pa.array(rank, mask=~is_known)
        if scores_type is not None:
            columns["scores"] = build_score_column(scores, scores_type)
        return columns

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
        """Cross-entropy, or the focal loss (Lin et al. 2017) with `focal_gamma` above 0."""
        import torch
        from torch.nn import functional as F

        if focal_gamma == 0:
            return F.cross_entropy(
                logits, targets, weight=weights, reduction="sum", label_smoothing=label_smoothing
            )
        shares = targets if targets.dim() == 2 else F.one_hot(targets, logits.shape[1]).float()
        shares = shares * (1 - label_smoothing) + label_smoothing / logits.shape[1]
        log_scores = logits.log_softmax(dim=1)
        # a score of exactly 1 would have an infinite slope under a root, and so no gradient at all
        missing = (-torch.expm1(log_scores)).clamp_min(torch.finfo(torch.float32).tiny)
        terms = -shares * missing**focal_gamma * log_scores
        return (terms if weights is None else terms * weights).sum()

    def count_correct(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Number of rows whose arg max is that of the target."""
        classes = targets.argmax(1) if targets.dim() == 2 else targets
        return (logits.argmax(1) == classes).sum()

    def compute_row_losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each row."""
        from torch.nn import functional as F

        return F.cross_entropy(logits, targets, reduction="none")


SINGLE_LABEL = SingleLabel()
