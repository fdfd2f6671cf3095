"""Images of a queue as a browser shows them: the file itself, or a JPEG of a format it lacks."""

from __future__ import annotations

import asyncio

from imgcls.data import image_files
from imgcls.data.decoding import open_image
from imgcls.data.encode_image import encode_jpeg
from imgcls.data.formats import identify_format
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import ImageError, StorageError
from imgcls.serving.config import LimitsConfig
from imgcls.serving.labeling.queue import LabelingQueue, hide_secrets
from imgcls.serving.problems import Problem, build_busy_problem, build_image_problem

BROWSER_FORMATS = frozenset(("JPEG", "PNG", "WebP", "GIF", "BMP", "AVIF", "ICO"))
"""Formats that all current browsers show; images of other formats are converted."""
CONVERTED_SIDE = 2_048
"""Maximum width and height of a converted image, in pixels."""
MAX_WAITING_IMAGES = 64
"""Maximum number of images that wait to be read in one replica."""
MAX_READS = 8
"""Maximum number of images that one replica reads at the same time."""
_QUALITY = 90
_RETRY_AFTER_S = 5


class QueueImages:
    """Reads images of a queue in threads of its own, a limited number at a time.

    limits: of the bytes of a file
    """

    def __init__(self, queue: LabelingQueue, limits: LimitsConfig) -> None:
        self._queue = queue
        self._limits = limits
        self._threads = create_thread_pool(MAX_READS, "label-images")
        self._waiting = 0

    async def read(self, row: int) -> bytes:
        """The bytes of an image file.

        Raises a Problem: 503 if too many images wait or a retry may help, else 413, 415 or 422.
        """
        if self._waiting >= MAX_WAITING_IMAGES:
            raise build_busy_problem(1)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, read_queue_image, self._queue.paths[row], self._limits
            )
        finally:
            self._waiting -= 1


def read_queue_image(url: str, limits: LimitsConfig) -> bytes:
    """The bytes of an image file.

    Raises a Problem with the image's status: 503 if a retry may help, otherwise 413, 415 or 422.
    """
    try:
        return image_files.read_image(url, limits.image_bytes)
    except (StorageError, ImageError) as error:
        detail = hide_secrets(str(error))
        if isinstance(error, StorageError) and error.is_temporary:
            raise Problem(503, error.status, detail, retry_after=_RETRY_AFTER_S) from error
        raise build_image_problem(error.status, detail) from error


def convert_for_browser(data: bytes, limits: LimitsConfig) -> tuple[bytes, str]:
    """The bytes to show for an image file, and their media type.

    Raises a Problem for bytes that are not an image, and for more pixels than allowed.
    """
    try:
        open_image.read_header(data, limits.pixels)
        format_ = identify_format(data)
        if format_ is not None and format_.name in BROWSER_FORMATS:
            return data, format_.mime_types[0]
        preview = open_image.decode_preview(data, CONVERTED_SIDE, max_pixels=limits.pixels)
    except ImageError as error:
        raise build_image_problem(error.status, str(error)) from error
    return encode_jpeg(preview.image, _QUALITY), "image/jpeg"
