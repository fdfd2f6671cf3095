"""Small pictures of images for a page, read as labelling reads them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from imgcls.data import decode, filesystem
from imgcls.data.manifest import resolve
from imgcls.errors import ImageError, StorageError

SIDE = 132
_QUALITY = 72


def thumbnails(paths: Sequence[str | None], root: str) -> list[str | None]:
    """A JPEG data URI for each path, about 5 KB; None where the image cannot be had any more."""
    urls: Iterable[str | None] = (resolve(path, root) for path in paths)
    return [_thumbnail(blob) for blob in filesystem.read_ahead(urls)]


def _thumbnail(blob: bytes | StorageError) -> str | None:
    if isinstance(blob, StorageError):
        return None
    try:
        upright = decode.picture(blob, 2 * SIDE).image
    except ImageError:
        return None
    if max(upright.size) < SIDE // 2:
        factor = SIDE // max(upright.size)
        size = (upright.width * factor, upright.height * factor)
        upright = upright.resize(size, Image.Resampling.NEAREST)
    upright.thumbnail((SIDE, SIDE))
    sink = io.BytesIO()
    upright.save(sink, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()
