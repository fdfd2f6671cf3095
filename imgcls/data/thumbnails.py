"""Thumbnails of images for an HTML page, read as inference reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image

from imgcls.data import image_files
from imgcls.data.decoding import open_image
from imgcls.data.encode_image import encode_data_uri
from imgcls.data.manifests.manifest import resolve_path
from imgcls.errors import ImageError, StorageError

THUMBNAIL_SIDE = 132
_QUALITY = 72


def build_thumbnails(
    paths: Sequence[str | None], root: str, side: int = THUMBNAIL_SIDE
) -> list[str | None]:
    """A JPEG data URI for each path; None if the image cannot be read.

    side: largest width and height; about 5 KB at 132, 20 KB at 320
    """
    urls: Iterable[str | None] = (resolve_path(path, root) for path in paths)
    return [_build_thumbnail(blob, side) for blob in image_files.read_ahead(urls)]


def _build_thumbnail(blob: bytes | StorageError | ImageError, side: int) -> str | None:
    if not isinstance(blob, bytes):
        return None
    try:
        upright = open_image.decode_preview(blob, 2 * side).image
    except ImageError:
        return None
    if max(upright.size) < side // 2:
        factor = side // max(upright.size)
        size = (upright.width * factor, upright.height * factor)
        upright = upright.resize(size, Image.Resampling.NEAREST)
    upright.thumbnail((side, side))
    return encode_data_uri(upright, _QUALITY)
