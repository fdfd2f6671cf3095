"""Features of an image file without a model: format, size, brightness, sharpness, two hashes.

The perceptual hash and the measures of brightness, detail and blur hardly change when an image is
saved again or resized. Limits for these values are in `curation.checks`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from imgcls.data.decoding import open_image

MAX_FEATURE_SIDE = 256
"""Maximum width and height at which the measures are computed, in pixels."""
HASH_SIDE = 32
HASH_BITS = 256
DIGEST_BYTES = 16
_MIN_RELATIVE_AMPLITUDE = 0.01
"""Relative amplitude, to the root mean square of all frequencies, below which a frequency counts as
absent. In symmetric graphics most are, and their signs are rounding errors."""
FEATURE_FIELDS = (
    pa.field("format", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("orientation", pa.int8()),
    pa.field("digest", pa.binary(DIGEST_BYTES)),
    pa.field("hash", pa.binary(HASH_BITS // 8)),
    pa.field("dark", pa.float32()),
    pa.field("bright", pa.float32()),
    pa.field("contrast", pa.float32()),
    pa.field("entropy", pa.float32()),
    pa.field("sharpness", pa.float32()),
    pa.field("colour", pa.float32()),
)
"""Columns of `ImageFeatures` in a table."""


@dataclass(frozen=True)
class ImageFeatures:
    """Features of one image file. The field names are columns of output tables.

    format:        Pillow's name, such as JPEG
    width, height: in pixels, after EXIF orientation
    orientation:   EXIF, 1 to 8; 1 is upright
    digest:        BLAKE2b of the bytes
    hash:          (32,) uint8, the perceptual hash, most stable bits first
    dark, bright:  5th and 95th percentile of the luma, 0 black to 1 white
    contrast:      standard deviation of the luma, 0 to 0.5
    entropy:       of the histogram of the luma, in bits, 0 to 8
    sharpness:     standard deviation of the Laplacian of the luma over `contrast`
    `colour`:      95th percentile of the difference between channels, 0 to 1
    """

    format: str
    width: int
    height: int
    orientation: int
    digest: bytes
    hash: npt.NDArray[np.uint8]
    dark: float
    bright: float
    contrast: float
    entropy: float
    sharpness: float
    colour: float

    def to_columns(self) -> dict[str, Any]:
        """Values by the names of `FEATURE_FIELDS`."""
        return vars(self) | {"hash": self.hash.tobytes()}


def compute_features(data: bytes, *, max_pixels: int = open_image.MAX_PIXELS) -> ImageFeatures:
    """Compute the features of an image file.

    Raises an ImageError as `decode.decode_image` does.
    """
    preview = open_image.decode_preview(data, MAX_FEATURE_SIDE, max_pixels=max_pixels)
    red, green, blue = (np.asarray(band) for band in preview.image.split())
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    gray = preview.image.convert("L")
    luma = np.asarray(gray, np.float32) / 255
    histogram = np.bincount(np.asarray(gray).ravel(), minlength=256) / luma.size
    present = histogram[histogram > 0]
    contrast = float(luma.std())
    return ImageFeatures(
        format=preview.format,
        width=preview.display_size[0],
        height=preview.display_size[1],
        orientation=preview.orientation,
        digest=compute_digest(data),
        hash=compute_perceptual_hash(gray),
        dark=_compute_percentile(histogram, 5),
        bright=_compute_percentile(histogram, 95),
        contrast=contrast,
        entropy=float(-(present * np.log2(present)).sum()),
        sharpness=_compute_laplacian_std(luma) / contrast if contrast else 0.0,
        colour=_compute_percentile(np.bincount(spread.ravel(), minlength=256) / spread.size, 95),
    )


def compute_digest(data: bytes) -> bytes:
    """16-byte digest that identifies the content of a file."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def compute_perceptual_hash(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Signs of an image's 256 lowest spatial frequencies, without its mean.

    Returns (32,) uint8, the lowest frequencies first. Similar images differ in few bits, others in
    128 on average. Source: discrete cosine transform of Zauner, "Implementation and Benchmarking of
    Perceptual Image Hash Functions", 2010, section 3.2; with signs instead of a median, so that
    mirroring an image flips known bits (`MIRROR_BITS`).
    """
    small = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, np.float32)
    spectrum = (_COSINES @ pixels @ _COSINES.T)[_ROWS, _COLUMNS]
    return np.packbits(spectrum > _MIN_RELATIVE_AMPLITUDE * np.sqrt(np.square(spectrum).mean()))


def _compute_percentile(shares: npt.NDArray[Any], percent: float) -> float:
    """Percentile, from 0 to 1, of values from 0 to 255, given the share of each value."""
    return float(np.searchsorted(shares.cumsum(), percent / 100 - 1e-9)) / 255


def _compute_laplacian_std(luma: npt.NDArray[Any]) -> float:
    """Standard deviation of the four-neighbor Laplacian; 0 for an image that is too small."""
    if min(luma.shape) < 3:
        return 0.0
    inner = luma[1:-1, 1:-1]
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float((around - 4 * inner).std())


def _build_cosines() -> npt.NDArray[np.float32]:
    frequency, position = np.mgrid[:HASH_SIDE, :HASH_SIDE]
    angle = np.pi * frequency * (2 * position + 1) / (2 * HASH_SIDE)
    cosines: npt.NDArray[np.float32] = np.cos(angle).astype(np.float32)
    return cosines


def _find_lowest_frequencies() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    rows, columns = (each.ravel() for each in np.mgrid[:HASH_SIDE, :HASH_SIDE])
    order = np.lexsort((columns, rows + columns))[1 : HASH_BITS + 1]
    return rows[order], columns[order]


_COSINES = _build_cosines()
_ROWS, _COLUMNS = _find_lowest_frequencies()

MIRROR_BITS = np.packbits(_COLUMNS % 2 == 1)
"""(32,) uint8: the bits of a hash that flip when the image is mirrored left to right."""
