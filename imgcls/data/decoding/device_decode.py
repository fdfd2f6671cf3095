"""Decode JPEGs in batches on a GPU, with nvJPEG.

A CPU decides by file (`prepare_file`). With `decode: fast`, baseline JPEGs are left for the device;
their image data are verified first, because nvJPEG does not report missing data. Every other file
is decoded on the CPU by `decode.decode_image`. The device decodes and resizes the JPEGs
(`decode_batch`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from imgcls.data.cuda import DecodeStage
from imgcls.data.decoding import jpeg
from imgcls.data.decoding.decode import decode_image
from imgcls.data.decoding.device_resize import resize_batch
from imgcls.data.decoding.nvjpeg import decode_jpegs
from imgcls.data.decoding.open_image import JPEG_SIGNATURE, MAX_PIXELS, ImageHeader, read_header
from imgcls.data.decoding.pixels import Pixels
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.decoding.resize import MAX_RESIZE_PIXELS, DecodedImage, compute_resized_size
from imgcls.errors import ImageError

MAX_DECODED_BYTES = 512_000_000
"""Maximum size of the full-size images that are on the device at a time, unless one is larger."""

DecodeResult = tuple[torch.Tensor, tuple[int, int]] | ImageError
"""Pixels on the device, (3, crop, crop) uint8, and display size (width, height); or the error."""

_BASELINE = 0xC0
_LUMA_SAMPLING = ((1, 1), (2, 1), (1, 2), (2, 2))
"""Sampling factors of the first component in 4:4:4, 4:2:2, 4:4:0 and 4:2:0, which all of nvJPEG's
decoders take."""


@dataclass(frozen=True)
class DeviceJpeg:
    """A verified JPEG for the device to decode.

    orientation:  EXIF, 1 to 8
    display_size: (width, height) in pixels, after EXIF orientation
    """

    data: bytes
    orientation: int
    display_size: tuple[int, int]


def prepare_file(
    data: bytes, spec: Preprocess, *, max_pixels: int = MAX_PIXELS
) -> DeviceJpeg | tuple[Pixels, tuple[int, int]]:
    """Verify a baseline JPEG for the device to decode, or decode any other file.

    Returns the JPEG, or pixels and display size as `decode_image` does. Raises as it does.
    """
    # nvJPEG's pixels are not those of libjpeg, which `exact` promises
    if spec.decode == "fast" and data.startswith(JPEG_SIGNATURE):
        header = read_header(data, max_pixels)
        if _is_for_device(data, header, spec):
            return DeviceJpeg(jpeg.verify_jpeg(data), header.orientation, header.display_size)
    return decode_image(data, spec, max_pixels=max_pixels)


def decode_batch(
    files: Sequence[DeviceJpeg], spec: Preprocess, *, device: torch.device
) -> list[DecodeResult]:
    """Decode a batch of JPEGs on a device; returns the pixels or the error of each.

    A file that nvJPEG rejects is decoded on the CPU. The pixels are ready for kernels that the
    calling thread launches on its current stream.
    Raises torch.OutOfMemoryError, or torch.AcceleratorError for a device that has failed.
    """
    results: list[DecodeResult] = []
    with DecodeStage(device) as stage:
        for group in _split_by_size(files):
            for file, pixels in zip(group, _decode_group(group, spec, stage), strict=True):
                if pixels is None:
                    results.append(_decode_rejected(file, spec, device))
                else:
                    results.append((pixels, file.display_size))
        stage.hand_over(result[0] for result in results if isinstance(result, tuple))
    return results


def _is_for_device(data: bytes, header: ImageHeader, spec: Preprocess) -> bool:
    """Whether every decoder of nvJPEG takes a JPEG, and decodes it to the colors of libjpeg."""
    frame = jpeg.read_frame_header(data)
    if not header.is_plain_jpeg or frame is None or jpeg.may_store_rgb(data):
        return False
    luma, *chroma = frame.sampling_factors.values()
    gray = header.image.mode == "L" and not chroma and luma == (1, 1)
    color = header.image.mode == "RGB" and chroma == [(1, 1)] * 2 and luma in _LUMA_SAMPLING
    return (
        (gray or color)
        and frame.process == _BASELINE
        and not frame.has_multiple_scans
        and math.prod(compute_resized_size(header.display_size, spec)) <= MAX_RESIZE_PIXELS
    )


def _decode_rejected(file: DeviceJpeg, spec: Preprocess, device: torch.device) -> DecodeResult:
    """Decode a file on the CPU that the device's decoder rejects."""
    try:
        pixels, size = decode_image(file.data, spec, max_pixels=math.prod(file.display_size))
    except ImageError as error:
        return error
    return torch.from_numpy(pixels).to(device), size


def _split_by_size(files: Sequence[DeviceJpeg]) -> Iterator[list[DeviceJpeg]]:
    """Consecutive groups of at most MAX_DECODED_BYTES each, or of one larger image."""
    group: list[DeviceJpeg] = []
    total = 0
    for file in files:
        size = 3 * math.prod(file.display_size)
        if group and total + size > MAX_DECODED_BYTES:
            yield group
            group, total = [], 0
        group.append(file)
        total += size
    if group:
        yield group


def _decode_group(
    group: Sequence[DeviceJpeg], spec: Preprocess, stage: DecodeStage
) -> list[torch.Tensor | None]:
    """Decode and resize JPEGs; None for those that the decoder rejects."""
    tensors = decode_jpegs([file.data for file in group], stage)
    decoded = {
        index: DecodedImage(tensor, file.orientation, file.display_size)
        for index, (file, tensor) in enumerate(zip(group, tensors, strict=True))
        if tensor is not None
    }
    resized = dict(zip(decoded, resize_batch(list(decoded.values()), spec), strict=True))
    return [resized.get(index) for index in range(len(group))]
