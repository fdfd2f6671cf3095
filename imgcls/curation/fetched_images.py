"""Fetched images: whether the bytes of an answer are an image, and the columns that describe it.

An image is `ok` if it decodes completely, so that `manifest check`, training and prediction find
the same statuses in the written shards: a header alone does not show that a file is cut off.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pyarrow as pa

from imgcls.data import formats
from imgcls.data.decoding import open_image
from imgcls.data.manifests.manifest import Manifest
from imgcls.errors import OK, ImageError, ManifestError, StorageError, one_line

_CHECK_SIDE = 8
"""Side of the thumbnail that a check decodes to: JPEGs are decoded at an eighth of their size."""

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


@dataclass(frozen=True)
class FetchedImage:
    """Result of one read; width, height, type and sha256 are those of an ok image, else None.

    error:         the reason where the status is not ok
    width, height: in pixels, after EXIF orientation
    type:          media type, by the bytes: the header of an answer is often wrong
    sha256:        of the bytes, hexadecimal
    """

    status: str
    error: str | None = None
    width: int | None = None
    height: int | None = None
    type: str | None = None
    sha256: str | None = None

    def to_columns(self, row: int) -> dict[str, object]:
        """Values by the names of `FACT_FIELDS`."""
        values = (
            row, self.status, self.error, self.width, self.height, self.type, self.sha256
        )  # fmt: skip
        return {field.name: value for field, value in zip(FACT_FIELDS, values, strict=True)}

    @classmethod
    def from_columns(cls, columns: dict[str, object]) -> FetchedImage:
        """The reverse of `to_columns`."""
        _, *values = (columns[field.name] for field in FACT_FIELDS)
        return cls(*values)  # type: ignore[arg-type]


def inspect_image(outcome: bytes | StorageError | ImageError, max_pixels: int) -> FetchedImage:
    """Check the result of a read, by decoding it."""
    try:
        if not isinstance(outcome, bytes):
            raise outcome
        preview = open_image.decode_preview(outcome, _CHECK_SIDE, max_pixels=max_pixels)
    except (StorageError, ImageError) as error:
        return FetchedImage(error.status, one_line(error))
    width, height = preview.display_size
    return FetchedImage(
        OK,
        None,
        width,
        height,
        formats.FORMAT_BY_PILLOW_NAME[preview.format].mime_types[0],
        hashlib.sha256(outcome).hexdigest(),
    )


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
