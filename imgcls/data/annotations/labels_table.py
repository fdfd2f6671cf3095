"""The labels table: what people labeled, one row per decision about an image.

The page of `imgcls serve` writes it, and the exports of labeling tools are read into it.
"""

from __future__ import annotations

import pyarrow as pa


def build_labels_schema(*, several: bool) -> pa.Schema:
    """The columns of a labels table.

    path:       of the image, as the queue or the tool had it
    label:      string, or a list of strings with `several`; null where the annotator skipped the
                image. An empty list: no class applies.
    annotator:  name or email address of who labeled it, null where a tool does not export it
    labeled_at: when, null where a tool does not export it
    tool:       label-studio, cvat, fiftyone, csv or imgcls

    several: images may have several labels
    """
    label = pa.list_(pa.string()) if several else pa.string()
    return pa.schema(
        [
            pa.field("path", pa.string(), nullable=False),
            pa.field("label", label),
            pa.field("annotator", pa.string()),
            pa.field("labeled_at", pa.timestamp("us", tz="UTC")),
            pa.field("tool", pa.string(), nullable=False),
        ]
    )
