"""Drawn pictures and encoded files for the tests of images."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from imgcls.data.decoding import decode, device_decode, open_image
from imgcls.data.decoding.device_decode import DeviceJpeg
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import ImageError

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}

# What turns an upright picture into the one that a camera stores with this EXIF orientation
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def decode_by_device(
    files: Sequence[bytes], spec: Preprocess, device: str | torch.device = "cpu"
) -> list[Any]:
    """(pixels, size) or the error of each file, of which the device decodes those that are for it;
    the pixels of others are arrays.
    """
    found: list[Any] = []
    for data in files:
        try:
            found.append(device_decode.prepare_file(data, spec))
        except ImageError as error:
            found.append(error)
    jpegs = [file for file in found if isinstance(file, DeviceJpeg)]
    decoded = iter(device_decode.decode_batch(jpegs, spec, device=torch.device(device)))
    return [next(decoded) if isinstance(file, DeviceJpeg) else file for file in found]


def drawn(width: int, height: int) -> Image.Image:
    """A smooth picture with edges in it that no turning or mirroring leaves alike."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    ramps = np.stack([x, y, 0.5 + 0.4 * np.sin(7 * x + 3 * y)], axis=-1)
    image = Image.fromarray((ramps * 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    pen.ellipse((width * 0.1, height * 0.15, width * 0.5, height * 0.4), fill=(250, 240, 30))
    pen.polygon(
        [(width * 0.6, height * 0.9), (width * 0.95, height * 0.6), (width * 0.3, height * 0.7)],
        fill=(20, 30, 160),
    )
    return image


def encoded(
    image: Image.Image, format: str, orientation: int | None = None, **options: Any
) -> bytes:
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def stored(upright: Image.Image, format: str, orientation: int, **options: Any) -> bytes:
    """The file of a camera that was held so that `orientation` must be undone."""
    turn = STORED[orientation]
    image = upright if turn is None else upright.transpose(turn)
    return encoded(image, format, orientation, **options)


def reference(image: Image.Image, spec: Preprocess) -> npt.NDArray[np.uint8]:
    """(3, crop, crop): Pillow's pixels through torchvision's Resize and CenterCrop."""
    filter_ = InterpolationMode(spec.interpolation)
    size = (spec.crop, spec.crop) if spec.mode == "squash" else spec.resize
    resized = Resize(size, filter_)(image.convert("RGB"))
    return np.asarray(CenterCrop(spec.crop)(resized)).transpose(2, 0, 1)


def difference(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def png_of_size(width: int, height: int, bits: int = 8, rows: bytes = bytes(1000)) -> bytes:
    """An RGB PNG of bare rows; its header may announce a size that they do not have."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def enlarged(format: str, width: int, height: int) -> bytes:
    """A small file of the format with other numbers in its header."""
    if format == "PNG":
        return png_of_size(width, height)
    data = bytearray(encoded(Image.new("RGB", (7, 5), (200, 60, 40)), format))
    if format == "JPEG":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    elif format == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif format == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif format == "TIFF":
        for tag, value in ((256, width), (257, height)):
            entry = data.index(struct.pack("<HHI", tag, 4, 1), 8)
            data[entry + 8 : entry + 12] = struct.pack("<I", value)
    return bytes(data)


def fast(**settings: Any) -> Preprocess:
    """The setting that has every decode route."""
    return Preprocess(decode="fast", **settings)


SPEC = fast()
SMALL = fast(resize=32, crop=28)
COLOR = (200, 60, 40)
NOISE = np.random.default_rng(0).integers(0, 256, (100, 120))
FILES: dict[str, bytes] = {
    "jpeg": encoded(drawn(150, 110), "JPEG"),
    "jpeg progressive": encoded(drawn(150, 110), "JPEG", progressive=True),
    "jpeg dct": encoded(drawn(1300, 1040), "JPEG"),
    "jpeg dct progressive": encoded(drawn(1300, 1040), "JPEG", progressive=True),
    "jpeg cmyk": encoded(drawn(150, 110).convert("CMYK"), "JPEG"),
    "jpeg turned": encoded(drawn(150, 110), "JPEG", 6),
    "png": encoded(drawn(150, 110), "PNG"),
    "png 16": encoded(Image.fromarray(NOISE.astype(np.uint16) * 257), "PNG"),
    "webp": encoded(drawn(150, 110), "WEBP"),
    "webp lossless": encoded(drawn(150, 110), "WEBP", lossless=True),
    "gif": encoded(drawn(150, 110), "GIF"),
    "bmp": encoded(drawn(150, 110), "BMP"),
    "tiff": encoded(drawn(150, 110), "TIFF"),
    "tiff lzw": encoded(drawn(150, 110), "TIFF", compression="tiff_lzw"),
}

STATUSES = {"empty", "truncated", "not_an_image", "unsupported", "too_large", "unreadable"}


def decodes_or_is_refused(data: bytes) -> None:
    try:
        pixels, (width, height) = decode.decode_image(data, SMALL, max_pixels=4_000_000)
    except ImageError as error:
        refusal = error
        assert refusal.status in STATUSES
        assert str(refusal)
    else:
        assert pixels.shape == (3, 28, 28)
        assert pixels.dtype == np.uint8
        assert 0 < width * height <= 4_000_000
    try:
        small = open_image.decode_preview(data, 20).image
    except ImageError:
        return
    assert max(small.size) <= 20
