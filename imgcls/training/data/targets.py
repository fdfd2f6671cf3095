"""Training targets of images, from the codes of their labels.

The code of an image is the index of its class, or for multilabel the index of its labels in a table
of all combinations of labels that occur: so images travel with one number, whatever the task.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from imgcls.data.manifests.label_columns import UNKNOWN
from imgcls.models.bundle import TaskName
from imgcls.training.sampler import Int64Array

Int8Matrix = npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class TargetTable:
    """Targets by code.

    num_classes: C
    label_sets:  (K, C) int8 by code: 1, 0, or -1 where unknown; None for one label per image
    """

    num_classes: int
    label_sets: Int8Matrix | None = None

    @property
    def task(self) -> TaskName:
        """The task that the targets are for."""
        return "single_label" if self.label_sets is None else "multilabel"

    def encode(self, codes: Int64Array) -> torch.Tensor:
        """(N,) int64 class indices, or (N, C) float32 of 1, 0 and NaN where unknown."""
        if self.label_sets is None:
            return torch.from_numpy(codes)
        found = self.label_sets[codes].astype(np.float32)
        found[found == UNKNOWN] = np.nan
        return torch.from_numpy(found)

    def build_blank(self, count: int) -> torch.Tensor:
        """Targets of blank images, whose loss has no weight."""
        if self.label_sets is None:
            return torch.zeros(count, dtype=torch.int64)
        return torch.zeros(count, self.num_classes)
