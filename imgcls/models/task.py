"""Task of a model: activation, decision, prediction columns, loss and metrics.

A task defines what the outputs of a network mean. The classifier, inference, export, calibration
and training all call it, so that a bundle has the same scores and decisions everywhere. A new kind
of task is a subclass of `Task` with an entry in `tasks.TASKS`.
Importing these modules does not import torch: the driver of a run needs the columns only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imgcls.models.bundle import BundleSpec, TaskName
from imgcls.models.label_sets import LabelSets
from imgcls.models.ood import OodScores

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScoreScaling:
    """Confidence calibration of a network's logits, on one device.

    temperature: the logits are divided by it
    scale, bias: (C,) float32, applied to the log-softmax, or to the logits of multilabel (vector
        scaling); None without it
    """

    temperature: float = 1.0
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @classmethod
    def from_spec(cls, spec: BundleSpec, device: torch.device | None = None) -> ScoreScaling:
        """The calibration of a bundle, with its tensors on `device` (default: CPU)."""
        if spec.vector_scaling is None:
            return cls(spec.temperature)
        import torch

        vectors = (spec.vector_scaling.scale, spec.vector_scaling.bias)
        scale, bias = (torch.tensor(each, device=device) for each in vectors)
        return cls(spec.temperature, scale, bias)


@dataclass(frozen=True, eq=False)
class Decisions:
    """Predictions of N images.

    classes:  (N, k) int64 class indices, best first
    scores:   (N, k) float32 scores of these classes
    accepted: (N,) bool, whether the best score reaches the threshold of its class; for multilabel,
        whether any score does
    is_predicted: (N, C) bool, whether each score reaches its threshold; None for single_label
    """

    classes: NDArray[np.int64]
    scores: NDArray[np.float32]
    accepted: NDArray[np.bool_]
    is_predicted: NDArray[np.bool_] | None = None


class Task(ABC):
    """Interface of a task.

    name:    key in `TASKS`
    metrics: metrics of a validation, as `training` and a bundle name them, the main one first
    default_threshold: threshold of a new bundle
    needs_scores: whether a table always has the scores of all classes
    """

    name: TaskName
    metrics: tuple[str, ...]
    default_threshold: float = 0.0
    needs_scores: bool = False

    @abstractmethod
    def activate(self, logits: torch.Tensor, scaling: ScoreScaling) -> torch.Tensor:
        """Calibrated scores of (N, C) logits."""

    @abstractmethod
    def compute_scores(self, logits: torch.Tensor, scaling: ScoreScaling) -> torch.Tensor:
        """As `activate`, in float32, with NaN in all scores of a row with a non-finite logit."""

    @abstractmethod
    def add_scaling(
        self, spec: BundleSpec, scale: NDArray[np.float32], bias: NDArray[np.float32] | None
    ) -> BundleSpec:
        """The bundle description whose scores are those of `spec` after scaling."""

    @abstractmethod
    def decide(
        self,
        scores: NDArray[np.float32],
        thresholds: Sequence[float] | NDArray[np.float32],
        top_k: int,
        order: NDArray[np.int64] | None = None,
    ) -> Decisions:
        """Predictions of (N, C) scores.

        thresholds: (C,), in class order
        order:      (N, k) class indices as `rank_on_device` returns them; None to compute them
        """

    @abstractmethod
    def compare_decisions(
        self,
        expected: NDArray[np.float32],
        scores: NDArray[np.float32],
        thresholds: Sequence[float] | NDArray[np.float32],
        margin: float = 0.0,
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Compare the predictions of (N, C) scores with those of the expected scores.

        thresholds: (C,), in class order
        Returns (N,) whether the prediction is the same, and (N,) whether it differs although the
        expected scores decide it by more than `margin`.
        """

    @abstractmethod
    def build_fields(
        self,
        *,
        has_labels: bool,
        has_label_sets: bool = False,
        has_ood: bool = False,
        classes: int | None = None,
        scores_type: str = "float32",
    ) -> list[pa.Field]:
        """Prediction columns of a table, in their order.

        has_labels:  whether the rows have labels, whose scores and ranks become columns
        has_label_sets: whether the bundle has conformal label sets
        has_ood:     whether the bundle has an out-of-distribution detector
        classes:     number of classes when all scores become a column
        scores_type: float32, or float16, which Spark cannot read
        """

    @abstractmethod
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
        """Prediction columns of (N, C) finite scores, by the names of `build_fields`.

        order:       as for `decide`
        codes:       (N,) class index of each row's label, negative for none; None without labels
        ood:         of the rows, none of which is accepted that is out of distribution
        scores_type: numpy dtype of the column of all scores; None without this column
        """

    @abstractmethod
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
        """Sum of the losses of (N, C) float32 logits.

        targets: (N,) int64 class indices, or (N, C) float32 shares of classes; for multilabel,
            (N, C) float32 with NaN where unknown
        weights: (C,) float32 per class, for multilabel of its positives; None for equal weights
        negative_gamma, negative_margin: of the asymmetric loss of multilabel
        """

    @abstractmethod
    def count_correct(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum over N rows of whether the prediction is the target, as (N, C) logits predict it."""

    @abstractmethod
    def compute_row_losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(N,) losses of (N, C) float32 logits, without weights."""


def select_top_k(
    scores: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(N, k) class indices and their scores, best first; ties go to the lower index. k >= 1."""
    k = min(k, scores.shape[1])
    if k == 1:
        order = scores.argmax(1)[:, None]
    else:
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def take_top_k(
    scores: NDArray[np.float32], k: int, order: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """As `select_top_k`; with an `order`, the classes are those of it, (N, k)."""
    if order is None:
        return select_top_k(scores, k)
    return order, np.take_along_axis(scores, order, axis=1)


def build_top_k_columns(
    found: Decisions, names: pa.Array, ood: OodScores | None
) -> dict[str, pa.Array]:
    """The columns of every task: accepted, the top k, and those of the detector.

    names: of the classes, strings
    """
    width = found.classes.shape[1]
    return {
        "accepted": pa.array(found.accepted if ood is None else found.accepted & ~ood.is_ood),
        "topk_labels": build_lists(names.take(pa.array(found.classes.ravel())), width),
        "topk_scores": build_lists(pa.array(found.scores.ravel()), width),
        **({} if ood is None else ood.build_columns()),
    }


def build_score_column(scores: NDArray[np.float32], scores_type: str) -> pa.FixedSizeListArray:
    """The column of all scores; scores_type: numpy dtype of its values."""
    flat = pa.array(scores.astype(scores_type).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, scores.shape[1])


def build_score_field(classes: int, scores_type: str) -> pa.Field:
    """The field of `build_score_column`, for a number of classes."""
    kind = pa.float16() if scores_type == "float16" else pa.float32()
    return pa.field("scores", pa.list_(kind, classes))


TOP_K_FIELDS = (
    pa.field("accepted", pa.bool_(), nullable=False),
    pa.field("topk_labels", pa.list_(pa.string())),
    pa.field("topk_scores", pa.list_(pa.float32())),
)
OOD_FIELDS = (pa.field("ood_score", pa.float32()), pa.field("is_ood", pa.bool_()))
"""Fields of `build_top_k_columns`: of every bundle, and of one with a detector."""


def rank_on_device(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The indices of `select_top_k` for a tensor of finite scores, on its device: (N, k) int64.

    A core takes 20 ms to sort 256 rows of 1,000 classes. The sort is a stable one, because `topk`
    returns equal scores in any order.
    """
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


def build_lists(values: pa.Array, width: int) -> pa.ListArray:
    """Lists of `width` values each."""
    offsets = pa.array(np.arange(0, len(values) + 1, width, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, values)
