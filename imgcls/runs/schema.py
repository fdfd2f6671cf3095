"""Columns of the predictions that a run writes, and the status of a row without an error."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

from imgcls.models.single_label import SINGLE_LABEL
from imgcls.models.task import Task

EmbeddingType = Literal["float32", "float16"]

PREDICTION_COLUMNS = (
    "row",
    "predicted_label",
    "predicted_labels",
    "confidence",
    "accepted",
    "topk_labels",
    "topk_scores",
    "label_set",
    "ood_score",
    "is_ood",
    "label_score",
    "label_rank",
    "scores",
    "embedding",
    "width",
    "height",
    "status",
    "error",
)

_NEW_COLUMNS = {
    "predicted_labels": pa.list_(pa.string()),
    "label_set": pa.list_(pa.string()),
    "ood_score": pa.float32(),
    "is_ood": pa.bool_(),
}
"""Columns that versions before 0.2 let a manifest have, and their types here."""
PROVENANCE_COLUMNS = ("run", "bundle_sha256", "labelled_at")
"""Columns that `history compact` adds to the rows of many runs."""


def list_prediction_columns(schema: pa.Schema) -> list[str]:
    """The columns of a run that are not of its manifest."""
    return [
        name
        for name in PREDICTION_COLUMNS
        if name in schema.names
        and (name not in _NEW_COLUMNS or schema.field(name).type == _NEW_COLUMNS[name])
    ]


def build_prediction_schema(
    *,
    labeled: bool,
    has_predictions: bool = True,
    has_label_sets: bool = False,
    has_ood: bool = False,
    scores: int | None = None,
    scores_type: str = "float32",
    embedding: int | None = None,
    embedding_type: EmbeddingType = "float32",
    task: Task = SINGLE_LABEL,
) -> pa.Schema:
    """Schema of the columns that a run adds to its manifest.

    labeled:     add the score and the rank of the manifest's label
    has_predictions: false for the run of a backbone, which has embeddings alone
    has_label_sets: true for a bundle with conformal label sets
    has_ood:     true for a bundle with an out-of-distribution detector
    scores:      number of classes, to add the score of every class; required for multilabel
    scores_type: float32, or float16, which Spark cannot read
    embedding:   width of the embedding, to add it
    embedding_type: float32, or float16, which Spark cannot read
    """
    fields = [pa.field("row", pa.int64(), nullable=False)]
    if has_predictions:
        fields += task.build_fields(
            has_labels=labeled,
            has_label_sets=has_label_sets,
            has_ood=has_ood,
            classes=scores,
            scores_type=scores_type,
        )
    if embedding is not None:
        kind = pa.float16() if embedding_type == "float16" else pa.float32()
        fields.append(pa.field("embedding", pa.list_(kind, embedding)))
    fields += [
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("status", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("error", pa.string()),
    ]
    return pa.schema(fields)
