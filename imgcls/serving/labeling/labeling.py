"""Labeling of a queue by several annotators: next images, decisions, undo and progress."""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from imgcls.data.storage.credentials import hide_credentials
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import ImgclsError, RequestError
from imgcls.serving.config import LabelingConfig
from imgcls.serving.labeling.assignment import (
    ASSIGNMENT_S,
    choose_images,
    count_remaining,
    is_assignment_valid,
)
from imgcls.serving.labeling.decisions import AnnotatorRecord, Decision
from imgcls.serving.labeling.progress import LabelingProgress, ProgressMeter
from imgcls.serving.labeling.queue import LabelingQueue, read_queue
from imgcls.serving.labeling.store import Change, DecisionStore
from imgcls.serving.problems import Problem

MAX_NEWCOMERS = 100
"""Annotators without a decision whose first images are reserved in a replica."""
_STORE_THREADS = 4

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class AnnotatorWork:
    """State of one annotator: the record, and the number of images that are left to decide."""

    record: AnnotatorRecord
    remaining: int


class Labeling:
    """The queue and the decisions about it.

    Its methods block: they are called in `threads`, and `measure_progress` in `progress_thread`,
    so that neither slow storage nor a long computation delays other work of the replica.

    several: images may have several labels
    """

    def __init__(
        self, config: LabelingConfig, queue: LabelingQueue, store: DecisionStore, *, several: bool
    ) -> None:
        self.queue = queue
        self.several = several
        self.added_classes = config.classes
        self.annotations_per_image = config.annotations_per_image
        self.threads = create_thread_pool(_STORE_THREADS, "labels")
        self.progress_thread = create_thread_pool(1, "progress")
        self._store = store
        self._meter = ProgressMeter(queue, config.annotations_per_image, several=several)
        self._newcomers: dict[str, AnnotatorRecord] = {}
        self._newcomers_lock = threading.Lock()

    @classmethod
    def open(cls, config: LabelingConfig, *, several: bool) -> Labeling | None:
        """Read the queue and open the folder of the labels; None if labeling is off.

        Raises RequestError, ManifestError or OutputError.
        """
        if config.manifest is None or config.output is None:
            return None
        if "" in config.classes or len(set(config.classes)) < len(config.classes):
            raise RequestError("labeling.classes: has an empty name, or a name twice; remove it")
        queue = read_queue(config.manifest)
        store = DecisionStore.open(config.output, several=several)
        return cls(config, queue, store, several=several)

    def assign(self, annotator: str) -> AnnotatorWork:
        """Assign the next images to an annotator.

        Creates no record for an annotator without decisions, because MAX_ANNOTATORS limits the
        records.
        """

        def change(
            own: AnnotatorRecord, records: Mapping[str, AnnotatorRecord]
        ) -> AnnotatorRecord | None:
            now = datetime.datetime.now(datetime.UTC)
            if own.version == 0:
                assigned = self._with_assignment(self._find_newcomer(own), records, now)
                self._keep_newcomer(assigned, now)
                return None
            changed = self._with_assignment(own, records, now)
            is_recent = own.assigned_at is not None and (
                (now - own.assigned_at).total_seconds() < ASSIGNMENT_S / 2
            )
            return None if changed.assigned == own.assigned and is_recent else changed

        return self._update(annotator, change, publish=False)

    def submit(
        self, annotator: str, row: int, labels: Sequence[str] | None, submission: str
    ) -> AnnotatorWork:
        """Store a decision; repeated with the same submission, it is stored once.

        labels: None to skip the image
        Raises a Problem (409) for a submission that was used for another decision.
        """
        path = self.queue.paths[row]
        chosen = None if labels is None else tuple(labels)

        def change(
            own: AnnotatorRecord, records: Mapping[str, AnnotatorRecord]
        ) -> AnnotatorRecord | None:
            earlier = own.find(submission)
            if earlier is not None:
                if (earlier.path, earlier.labels) != (path, chosen):
                    raise Problem(
                        409,
                        "submission_reused",
                        "this submission was used for another decision; send a new ID with each",
                    )
                return None
            now = datetime.datetime.now(datetime.UTC)
            added = self._find_newcomer(own).add(Decision(path, chosen, now, submission))
            return self._with_assignment(added, records, now)

        return self._update(annotator, change, publish=True)

    def undo(self, annotator: str, submission: str) -> AnnotatorWork:
        """Undo a decision; repeated, it has no further effect.

        Raises a Problem (404) for an unknown submission.
        """

        def change(
            own: AnnotatorRecord, records: Mapping[str, AnnotatorRecord]
        ) -> AnnotatorRecord | None:
            decision = own.find(submission)
            if decision is None:
                raise Problem(404, "submission_unknown", "there is no such decision to undo")
            if decision.is_undone:
                return None
            undone = own.undo(submission)
            first = (decision.path, *(p for p in own.assigned if p != decision.path))
            now = datetime.datetime.now(datetime.UTC)
            return self._with_assignment(replace(undone, assigned=first), records, now)

        return self._update(annotator, change, publish=True)

    def measure_progress(self, classes: Sequence[str]) -> LabelingProgress:
        """Count the labels of all annotators and compare them."""
        return self._meter.measure(self._store.read_all(), classes)

    def _find_newcomer(self, own: AnnotatorRecord) -> AnnotatorRecord:
        """The record of an annotator, or the first assignment of one who has no record yet."""
        with self._newcomers_lock:
            return own if own.version else self._newcomers.get(own.annotator, own)

    def _keep_newcomer(self, record: AnnotatorRecord, now: datetime.datetime) -> None:
        with self._newcomers_lock:
            valid = {k: v for k, v in self._newcomers.items() if is_assignment_valid(v, now)}
            self._newcomers = dict(list(valid.items())[-MAX_NEWCOMERS:])
            self._newcomers[record.annotator] = record

    def _with_assignment(
        self,
        own: AnnotatorRecord,
        records: Mapping[str, AnnotatorRecord],
        now: datetime.datetime,
    ) -> AnnotatorRecord:
        with self._newcomers_lock:
            everyone = {**self._newcomers, **records}
        chosen = choose_images(self.queue, own, everyone, self.annotations_per_image, now)
        return replace(own, assigned=chosen, assigned_at=now)

    def _update(self, annotator: str, change: Change, *, publish: bool) -> AnnotatorWork:
        record, records = self._store.update(annotator, change, publish=publish)
        record = self._find_newcomer(record)
        remaining = count_remaining(self.queue, record, records, self.annotations_per_image)
        return AnnotatorWork(record, remaining)


@dataclass(frozen=True)
class UnavailableLabeling:
    """Labeling that a replica could not open.

    reason: the error, without credentials
    """

    reason: str


def open_in_replica(
    config: LabelingConfig, *, several: bool
) -> Labeling | UnavailableLabeling | None:
    """As `Labeling.open`, but an error is logged and returned: the replica serves predictions."""
    try:
        return Labeling.open(config, several=several)
    except ImgclsError as error:
        reason = hide_credentials(str(error))
        logger.error("labeling is not available in this replica: %s", reason)
        return UnavailableLabeling(reason)
