"""The columns that a fetch adds to those of its manifest."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from imgcls.curation.fetched_images import FetchedImage
from imgcls.data.manifests.manifest import Manifest
from imgcls.errors import ManifestError

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""The type of the feature `Image` of Hugging Face datasets."""

IMAGE_COLUMN, STATUS_COLUMN, ROW_COLUMN = "image", "fetch_status", "fetch_row"
FACT_FIELDS = (
    pa.field(ROW_COLUMN, pa.int64(), nullable=False),
    pa.field(STATUS_COLUMN, pa.string(), nullable=False),
    pa.field("fetch_error", pa.string()),
    pa.field("image_width", pa.int32()),
    pa.field("image_height", pa.int32()),
    pa.field("image_type", pa.string()),
    pa.field("image_sha256", pa.string()),
)
"""Columns that are added to those of the manifest, without the image. The names differ from the
output columns of predict (status, width, ...), so that a fetched table can be its manifest."""


def build_columns(row: int, image: FetchedImage) -> dict[str, object]:
    """Values by the names of `FACT_FIELDS`."""
    values = (row, *dataclasses.astuple(image))
    return {field.name: value for field, value in zip(FACT_FIELDS, values, strict=True)}


def read_columns(columns: dict[str, object]) -> FetchedImage:
    """The reverse of `build_columns`."""
    _, *values = (columns[field.name] for field in FACT_FIELDS)
    return FetchedImage(*values)  # type: ignore[arg-type]


def check_added_columns(manifest: Manifest) -> None:
    """Raise ManifestError for a column with the name of an added one, in any case."""
    added = {field.name.casefold() for field in FACT_FIELDS} | {IMAGE_COLUMN}
    for name in manifest.schema.names:
        if name.casefold() in added:
            raise ManifestError(
                f"manifest {manifest.source}: column {name!r} is an output column of `imgcls "
                f"manifest fetch`. Rename it in the manifest, or leave it out with "
                f"--manifest.drop-columns {name} (output columns: "
                f"{', '.join((IMAGE_COLUMN, *(field.name for field in FACT_FIELDS)))})"
            )
