"""Columns of the predictions that a run writes, and the status of a row without an error."""

from __future__ import annotations

import pyarrow as pa

OK = "ok"
"""Status of an image with a prediction; the others are the `status` of an error's class."""

PREDICTION_COLUMNS = (
    "row",
    "predicted_label",
    "confidence",
    "accepted",
    "topk_labels",
    "topk_scores",
    "label_score",
    "label_rank",
    "scores",
    "embedding",
    "width",
    "height",
    "status",
    "error",
)

PROVENANCE_COLUMNS = ("run", "bundle_sha256", "labelled_at")
"""Columns that `history compact` adds to the rows of many runs."""


def build_prediction_schema(
    *,
    labelled: bool,
    scores: int | None = None,
    scores_type: str = "float32",
    embedding: int | None = None,
) -> pa.Schema:
    """Schema of the columns that a run adds to its manifest.

    labelled:    add the score and the rank of the manifest's label
    scores:      number of classes, to add the score of every class
    scores_type: float32, or float16, which Spark cannot read
    embedding:   width of the embedding, to add it
    """
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("predicted_label", pa.string()),
        pa.field("confidence", pa.float32()),
        pa.field("accepted", pa.bool_(), nullable=False),
        pa.field("topk_labels", pa.list_(pa.string())),
        pa.field("topk_scores", pa.list_(pa.float32())),
    ]
    if labelled:
        fields += [pa.field("label_score", pa.float32()), pa.field("label_rank", pa.int32())]
    if scores is not None:
        kind = pa.float16() if scores_type == "float16" else pa.float32()
        fields.append(pa.field("scores", pa.list_(kind, scores)))
    if embedding is not None:
        fields.append(pa.field("embedding", pa.list_(pa.float32(), embedding)))
    fields += [
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("status", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("error", pa.string()),
    ]
    return pa.schema(fields)
