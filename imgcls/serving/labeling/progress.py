"""Progress of all annotators: counts, agreement and disagreements."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imgcls.serving.labeling.agreement import AnnotatorAgreement, AnnotatorLabels, Labels
from imgcls.serving.labeling.decisions import AnnotatorRecord
from imgcls.serving.labeling.queue import LabelingQueue

MAX_DISAGREEMENTS = 200
"""Maximum number of images in the list of disagreements."""


@dataclass(frozen=True)
class LabelingProgress:
    """Progress of all annotators.

    complete:      images with as many labels as wanted
    disagreements: path and labels by annotator, at most MAX_DISAGREEMENTS
    """

    records: Mapping[str, AnnotatorRecord]
    complete: int
    agreements: list[AnnotatorAgreement]
    disagreements: list[tuple[str, dict[str, Labels]]]


class ProgressMeter:
    """Computes the progress, and keeps it until a record changes. Used by one thread.

    several: images may have several labels
    """

    def __init__(self, queue: LabelingQueue, annotations_per_image: int, *, several: bool) -> None:
        self._annotations_per_image = annotations_per_image
        self._several = several
        self._matrix = AnnotatorLabels(queue.paths)
        self._state: object = None
        self._known: LabelingProgress | None = None

    def measure(
        self, records: Mapping[str, AnnotatorRecord], classes: Sequence[str]
    ) -> LabelingProgress:
        """Count the labels of all annotators and compare them."""
        state = ({name: each.version for name, each in records.items()}, tuple(classes))
        if self._known is None or state != self._state:
            self._matrix.update(records)
            disagreements = self._matrix.iter_disagreements()
            self._known = LabelingProgress(
                records,
                self._matrix.count_complete(self._annotations_per_image),
                self._matrix.compute_agreements(classes, several=self._several),
                list(itertools.islice(disagreements, MAX_DISAGREEMENTS)),
            )
            self._state = state
        return self._known
