"""Requests and responses of the labeling routes."""

from __future__ import annotations

import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from imgcls.models.bundle import TaskName
from imgcls.serving.labeling.labeling import AnnotatorWork
from imgcls.serving.labeling.progress import LabelingProgress
from imgcls.serving.labeling.queue import LabelingQueue

MAX_LABELS = 1_000
PATH_TEXT = (
    "Path of the image as in the manifest, for display: a URL without credentials and query, such "
    "as a signature."
)
Annotator = Annotated[
    str, StringConstraints(strip_whitespace=True, pattern=r"^[\w.@ -]{1,64}$", max_length=64)
]
Submission = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class LabelingRequest(BaseModel):
    """Body of a request of an annotator."""

    model_config = ConfigDict(extra="forbid")

    queue: str = Field(max_length=64, description="ID of the queue, from `GET /v1/labeling/queue`.")
    annotator: Annotator | None = Field(
        default=None,
        description="Name of the annotator. Ignored if the service has API keys: the name of the "
        "key is used.",
    )


class DecisionRequest(LabelingRequest):
    """Body of `POST /v1/labeling/decisions`."""

    row: int = Field(ge=0, description="Index of the image in the queue.")
    submission: Submission = Field(
        description="ID chosen by the client: 32 hexadecimal digits. A request that is repeated "
        "with the same ID is stored once."
    )
    labels: list[str] | None = Field(
        max_length=MAX_LABELS,
        description="The classes of the image: exactly one, or with task multilabel any number. "
        "Null to skip the image.",
    )


class UndoRequest(LabelingRequest):
    """Body of `POST /v1/labeling/undo`."""

    submission: Submission = Field(description="ID of the decision to undo.")


class QueueDescription(BaseModel):
    """Response to `GET /v1/labeling/queue`."""

    queue: str = Field(
        description="ID of the queue; it changes with the list of images. All requests with a row "
        "need it, and are rejected (409) by a replica with another list."
    )
    task: TaskName
    classes: list[str] = Field(description="Classes to choose from.")
    images: int
    annotations_per_image: int = Field(description="Annotators who label each image.")
    annotator: str | None = Field(
        description="Name of the API key; null if the service has no keys, and a name must be sent."
    )


class QueueImage(BaseModel):
    """An image of the queue."""

    row: int
    path: str = Field(description=PATH_TEXT)


class StoredDecision(BaseModel):
    """A decision of an annotator."""

    submission: str
    row: int | None = Field(description="Null if the image is not in the queue any more.")
    path: str = Field(description=PATH_TEXT)
    labels: list[str] | None = Field(description="Null if the image was skipped.")
    labeled_at: datetime.datetime


class WorkResponse(BaseModel):
    """State of an annotator."""

    queue: str = Field(description="ID of the queue that the rows belong to.")
    annotator: str
    assigned: list[QueueImage] = Field(description="The next images of this annotator, in order.")
    last: StoredDecision | None = Field(description="The newest decision, which undo takes back.")
    labeled: int = Field(description="Images that this annotator labeled.")
    skipped: int
    remaining: int = Field(
        description="Images that need more labels and that this annotator has not decided about, "
        "including those assigned to others."
    )


class AnnotatorProgress(BaseModel):
    """Progress of one annotator."""

    name: str
    labeled: int
    skipped: int


class PairAgreement(BaseModel):
    """Agreement of two annotators on the images that both labeled."""

    first: str
    second: str
    images: int
    equal: float = Field(description="Share of the images with the same labels.")
    kappa: float | None = Field(
        description="Cohen's kappa, with task multilabel of the binary decisions (class applies "
        "or not); null if undefined."
    )


class Disagreement(BaseModel):
    """An image with different labels and no majority."""

    row: int
    path: str = Field(description=PATH_TEXT)
    labels: dict[str, list[str]] = Field(description="The labels by annotator.")


class ProgressResponse(BaseModel):
    """Response to `GET /v1/labeling/progress`."""

    images: int
    complete: int = Field(description="Images with as many labels as wanted.")
    annotators: list[AnnotatorProgress]
    agreements: list[PairAgreement]
    disagreements: list[Disagreement]


def build_work_response(work: AnnotatorWork, queue: LabelingQueue) -> WorkResponse:
    """Describe the state of an annotator."""
    record, last = work.record, work.record.last
    rows = [(queue.find_row(path), path) for path in record.assigned]
    return WorkResponse(
        queue=queue.queue_id,
        annotator=record.annotator,
        assigned=[
            QueueImage(row=row, path=queue.describe(path)) for row, path in rows if row is not None
        ],
        last=None
        if last is None
        else StoredDecision(
            submission=last.submission,
            row=queue.find_row(last.path),
            path=queue.describe(last.path),
            labels=None if last.labels is None else list(last.labels),
            labeled_at=last.labeled_at,
        ),
        labeled=len(record.labeled),
        skipped=record.num_skipped,
        remaining=work.remaining,
    )


def build_progress_response(progress: LabelingProgress, queue: LabelingQueue) -> ProgressResponse:
    """Describe the progress of all annotators."""
    rows = ((queue.find_row(path), path, labels) for path, labels in progress.disagreements)
    return ProgressResponse(
        images=len(queue),
        complete=progress.complete,
        annotators=[
            AnnotatorProgress(name=name, labeled=len(each.labeled), skipped=each.num_skipped)
            for name, each in sorted(progress.records.items())
        ],
        agreements=[PairAgreement(**vars(each)) for each in progress.agreements],
        disagreements=[
            Disagreement(
                row=row, path=queue.describe(path), labels={k: list(v) for k, v in labels.items()}
            )
            for row, path, labels in rows
            if row is not None
        ],
    )
