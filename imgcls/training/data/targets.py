"""Training targets of images, from the codes of their labels.

The code of an image is the index of its class, or for multilabel the index of its labels in a table
of all combinations of labels that occur. Higher codes are those of images with scores of a teacher,
in the order of these. So images travel with one number, whatever the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imgcls.data.manifests.label_columns import UNKNOWN
from imgcls.models.bundle import TaskName
from imgcls.training.sampler import Int64Array

Int8Matrix = npt.NDArray[np.int8]
Float16Matrix = npt.NDArray[np.float16]

NO_LABEL = -1
"""Label code of an image that has scores of a teacher alone."""


@dataclass(frozen=True, eq=False)
class TeacherTargets:
    """Scores of a teacher for some of the training images.

    scores:      (M, C) float16, in the order of the classes; for one label per image their
                 logarithms, see `compute_log_scores`
    labels:      (M,) int64 label code of the image, or NO_LABEL
    temperature: of the soft targets
    weight:      share of the teacher in the loss of an image with a label
    """

    scores: Float16Matrix
    labels: Int64Array
    temperature: float
    weight: float


@dataclass(frozen=True, eq=False)
class TargetTable:
    """Targets by code.

    num_classes: C
    label_sets:  (K, C) int8 by code: 1, 0, or -1 where unknown; None for one label per image
    teacher:     of the codes from `num_label_codes` on; None without
    """

    num_classes: int
    label_sets: Int8Matrix | None = None
    teacher: TeacherTargets | None = None

    @property
    def task(self) -> TaskName:
        """The task that the targets are for."""
        return "single_label" if self.label_sets is None else "multilabel"

    @property
    def num_label_codes(self) -> int:
        """Number of codes of labels: C, or K for multilabel."""
        return self.num_classes if self.label_sets is None else len(self.label_sets)

    def encode(self, codes: Int64Array) -> torch.Tensor:
        """(N,) int64 class indices, or (N, C) float32 of 1, 0 and NaN where unknown.

        codes: (N,) int64, of labels alone
        """
        if self.label_sets is None:
            return torch.from_numpy(codes)
        found = self.label_sets[codes].astype(np.float32)
        found[found == UNKNOWN] = np.nan
        return torch.from_numpy(found)

    def encode_for_training(self, codes: Int64Array) -> torch.Tensor:
        """Targets of any codes; without a teacher those of `encode`.

        With a teacher and one label per image: (N, 2 C) float32, the label as shares of classes and
        then the soft targets, each times its weight in the loss. The weights of an image add up to
        1. For multilabel: `blend`.
        """
        teacher = self.teacher
        if teacher is None:
            return self.encode(codes)
        if self.label_sets is not None:
            return self.blend(codes)
        labels, scores, weights = self._split(codes)
        soft = weights[:, None] * _soften(scores, teacher.temperature)
        labels *= 1 - weights[:, None]
        return torch.from_numpy(np.concatenate([labels, soft], axis=1))

    def blend(self, codes: Int64Array) -> torch.Tensor:
        """(N, C) float32: shares of classes, of the label and of the teacher's scores by weight.

        A binary cross-entropy is linear in its target, so that for multilabel this is the blend of
        both losses. A class whose label is unknown has the score alone.
        """
        labels, scores, weights = self._split(codes)
        if self.label_sets is None:
            scores = _soften(scores)
        share = np.where(np.isnan(labels) & (weights[:, None] > 0), 1, weights[:, None])
        return torch.from_numpy(np.where(share == 1, scores, labels * (1 - share) + scores * share))

    def decide(self, codes: Int64Array) -> torch.Tensor:
        """As `encode`, with the teacher's decision for an image without a label.

        The decision is the best class; for multilabel, every class with a score of at least 0.5.
        """
        labels = self.find_labels(codes)
        is_unlabeled = labels == NO_LABEL
        known = self.encode(np.where(is_unlabeled, 0, labels))
        if self.teacher is None or not is_unlabeled.any():
            return known
        scores = self.teacher.scores[codes[is_unlabeled] - self.num_label_codes]
        decided = scores.argmax(1) if self.label_sets is None else (scores >= 0.5)
        known[torch.from_numpy(is_unlabeled)] = torch.from_numpy(decided).to(known.dtype)
        return known

    def find_labels(self, codes: Int64Array) -> Int64Array:
        """(N,) int64 label codes, NO_LABEL for an image without one."""
        if self.teacher is None:
            return codes
        first = self.num_label_codes
        labels: Int64Array = codes.copy()
        is_taught = codes >= first
        labels[is_taught] = self.teacher.labels[codes[is_taught] - first]
        return labels

    def build_blank(self, count: int) -> torch.Tensor:
        """Targets of blank images, whose loss has no weight."""
        if self.label_sets is None and self.teacher is None:
            return torch.zeros(count, dtype=torch.int64)
        width = 2 if self.label_sets is None else 1
        return torch.zeros(count, width * self.num_classes)

    def _split(
        self, codes: Int64Array
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(N, C) targets of the labels, (N, C) scores as stored and (N,) weights of the scores.

        An image without a label has the weight 1, one without scores the weight 0.
        """
        assert self.teacher is not None
        first, labels = self.num_label_codes, self.find_labels(codes)
        is_labeled, is_taught = labels != NO_LABEL, codes >= first
        targets = np.zeros((len(codes), self.num_classes), np.float32)
        known = self.encode(labels[is_labeled]).numpy()
        if self.label_sets is None:
            targets[np.flatnonzero(is_labeled), known] = 1
        else:
            targets[is_labeled] = known
        scores = np.zeros_like(targets)
        scores[is_taught] = self.teacher.scores[codes[is_taught] - first]
        weights = np.where(is_taught, np.where(is_labeled, self.teacher.weight, 1), 0)
        return targets, scores, weights.astype(np.float32)


def compute_log_scores(scores: npt.NDArray[np.floating[Any]]) -> Float16Matrix:
    """(M, C) float16 natural logarithms of scores.

    float16 holds the logarithm of any score, but not the small scores themselves, which a
    temperature makes large. A score that was rounded to 0 counts as half the smallest number of its
    type: 3e-8 for float16.

    scores: (M, C) float16 or float32

    >>> compute_log_scores(np.array([[1.0, 0.0]], np.float16)).tolist()
    [[0.0, -17.328125]]
    """
    smallest = np.log(float(np.finfo(scores.dtype).smallest_subnormal)) - np.log(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(scores.astype(np.float32))
    found: Float16Matrix = np.where(scores == 0, np.float32(smallest), logs).astype(np.float16)
    return found


def _soften(
    log_scores: npt.NDArray[np.float32], temperature: float = 1.0
) -> npt.NDArray[np.float32]:
    """(N, C) float32 softmax of the log scores over the temperature."""
    soft: npt.NDArray[np.float32] = (torch.from_numpy(log_scores) / temperature).softmax(1).numpy()
    return soft
