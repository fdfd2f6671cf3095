"""Assignment of images to annotators: each image to as many different ones as are wanted.

An assignment is stored in the record of its annotator and expires, so that the images of an
annotator who stops labeling are assigned to another one. It keeps annotators apart, and is not a
lock: two annotators who ask in the same instant may get the same image, which then has one label
more than wanted. The same holds for the first images of an annotator without a record, if different
replicas answer: the record is created with the first decision, and until then only the replica that
assigned the images knows about it.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Mapping

from imgcls.serving.labeling.decisions import AnnotatorRecord
from imgcls.serving.labeling.queue import LabelingQueue

ASSIGNED_IMAGES = 3
"""Images assigned to an annotator at a time: the one shown, and those that the page preloads."""
ASSIGNMENT_S = 600.0
"""Time without a decision after which the assigned images are given to other annotators."""


def is_assignment_valid(record: AnnotatorRecord, now: datetime.datetime) -> bool:
    """Whether the images assigned to an annotator are still reserved."""
    at = record.assigned_at
    return at is not None and (now - at).total_seconds() < ASSIGNMENT_S


def choose_images(
    queue: LabelingQueue,
    own: AnnotatorRecord,
    records: Mapping[str, AnnotatorRecord],
    annotations_per_image: int,
    now: datetime.datetime,
) -> tuple[str, ...]:
    """Choose the next images of an annotator: those assigned already, then in queue order.

    records: of all annotators
    """
    labels = _count_labels_of_others(own, records)
    taken = labels.copy()
    for name, each in records.items():
        if name != own.annotator and is_assignment_valid(each, now):
            taken.update(path for path in each.assigned if path not in each.current)

    unavailable = labels if is_assignment_valid(own, now) else taken

    def iter_choices() -> Iterator[str]:
        for path in own.assigned:
            if unavailable[path] < annotations_per_image and queue.find_row(path) is not None:
                yield path
        for path in queue.paths:
            if taken[path] < annotations_per_image:
                yield path

    chosen: dict[str, None] = {}
    for path in iter_choices():
        if path not in own.current:
            chosen[path] = None
        if len(chosen) == ASSIGNED_IMAGES:
            break
    return tuple(chosen)


def count_remaining(
    queue: LabelingQueue,
    own: AnnotatorRecord,
    records: Mapping[str, AnnotatorRecord],
    annotations_per_image: int,
) -> int:
    """Number of images that an annotator has not decided about and that need more labels."""
    labels = _count_labels_of_others(own, records)
    return sum(
        labels[path] < annotations_per_image and path not in own.current for path in queue.paths
    )


def _count_labels_of_others(
    own: AnnotatorRecord, records: Mapping[str, AnnotatorRecord]
) -> Counter[str]:
    """Number of other annotators who labeled each image, by path."""
    return Counter(
        path for name, each in records.items() if name != own.annotator for path in each.labeled
    )
