"""Fetched images: whether the bytes of an answer are an image, and what describes it.

An image is `ok` if it decodes completely, so that `manifest check`, training and prediction find
the same statuses in the written shards: a header alone does not show that a file is cut off.

Imported by every process that decodes fetched images, so it imports little.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from imgcls.data import formats
from imgcls.data.decoding import open_image
from imgcls.errors import OK, ImageError, StorageError, one_line

_CHECK_SIDE = 8
"""Side of the thumbnail that a check decodes to: JPEGs are decoded at an eighth of their size."""


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
