"""Decode batches of image files on a GPU, with nvJPEG.

With `decode: fast`, JPEGs are decoded and resized on the device, after a check of their image data
on the CPU: nvJPEG does not report missing data. All other files, and those that nvJPEG rejects, go
through `decode.decode_image`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from imgcls.data import jpeg
from imgcls.data.cuda import DecodeStage
from imgcls.data.decode import JPEG_SIGNATURE, MAX_PIXELS, decode_image, read_header
from imgcls.data.device_resize import resize_batch
from imgcls.data.lazy_torchvision import torchvision
from imgcls.data.preprocess import Preprocess
from imgcls.data.resize import MAX_RESIZE_PIXELS, DecodedImage, compute_resized_size
from imgcls.errors import ImageError

MAX_DECODED_BYTES = 512_000_000
"""Maximum size of the full-size images that are on the device at a time, unless one is larger."""

DecodeResult = tuple[torch.Tensor, tuple[int, int]] | ImageError
"""Pixels on the device, (3, crop, crop) uint8, and display size (width, height); or the error."""


@dataclass(frozen=True)
class _DeviceJpeg:
    """A verified JPEG for the device to decode.

    index: its place in the batch
    """

    index: int
    data: bytes
    orientation: int
    display_size: tuple[int, int]


def decode_batch(
    blobs: Sequence[bytes],
    spec: Preprocess,
    *,
    device: torch.device,
    max_pixels: int = MAX_PIXELS,
) -> list[DecodeResult]:
    """Decode a batch of images on a device; returns the pixels or the error of each.

    The pixels are ready for kernels that the calling thread launches on its current stream.
    Raises torch.OutOfMemoryError, or torch.AcceleratorError for a device that has failed.
    """
    results: dict[int, DecodeResult] = {}
    files = _select_jpegs(blobs, spec, max_pixels, results)
    with DecodeStage(device) as stage:
        for group in _split_by_size(files):
            _decode_group(group, spec, stage, results)
        for index, data in enumerate(blobs):
            if index not in results:
                try:
                    pixels, size = decode_image(data, spec, max_pixels=max_pixels)
                    results[index] = torch.from_numpy(pixels).to(device), size
                except ImageError as error:
                    results[index] = error
        stage.hand_over(result[0] for result in results.values() if isinstance(result, tuple))
    return [results[index] for index in range(len(blobs))]


def check_jpegs(blobs: Sequence[bytes]) -> list[bytes | ImageError]:
    """Verify the image data of JPEGs, on all CPUs that this process may use.

    Returns the result or the error of `jpeg.verify_jpeg` for each.
    """

    def check(data: bytes) -> bytes | ImageError:
        try:
            return jpeg.verify_jpeg(data)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(check, blobs))


def _select_jpegs(
    blobs: Sequence[bytes], spec: Preprocess, max_pixels: int, results: dict[int, DecodeResult]
) -> list[_DeviceJpeg]:
    """The files that the device is to decode; adds the errors of damaged ones to `results`."""
    if spec.decode != "fast":
        return []  # nvJPEG's pixels are not those of libjpeg
    found = []
    for index, data in enumerate(blobs):
        if not data.startswith(JPEG_SIGNATURE):
            continue
        try:
            header = read_header(data, max_pixels)
        except ImageError as error:
            results[index] = error
            continue
        small = math.prod(compute_resized_size(header.display_size, spec)) <= MAX_RESIZE_PIXELS
        if header.is_plain_jpeg and small and not jpeg.may_store_rgb(data):
            found.append(_DeviceJpeg(index, data, header.orientation, header.display_size))
    sound = []
    for file, checked in zip(found, check_jpegs([file.data for file in found]), strict=True):
        if isinstance(checked, ImageError):
            results[file.index] = checked
        else:
            sound.append(_DeviceJpeg(file.index, checked, file.orientation, file.display_size))
    return sound


def _split_by_size(files: Sequence[_DeviceJpeg]) -> Iterator[list[_DeviceJpeg]]:
    """Consecutive groups of at most MAX_DECODED_BYTES each, or of one larger image."""
    group: list[_DeviceJpeg] = []
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
    group: Sequence[_DeviceJpeg],
    spec: Preprocess,
    stage: DecodeStage,
    results: dict[int, DecodeResult],
) -> None:
    """Decode and resize JPEGs; those that the decoder rejects get no result."""
    encoded = [torch.frombuffer(bytearray(file.data), dtype=torch.uint8) for file in group]
    decoded = {
        file.index: DecodedImage(tensor, file.orientation, file.display_size)
        for file, tensor in zip(group, _decode_jpegs(encoded, stage), strict=True)
        if tensor is not None
    }
    resized = resize_batch(list(decoded.values()), spec)
    for (index, image), pixels in zip(decoded.items(), resized, strict=True):
        results[index] = pixels, image.display_size


def _decode_jpegs(encoded: list[torch.Tensor], stage: DecodeStage) -> list[torch.Tensor | None]:
    """Decode JPEGs to (3, H, W) uint8; None for those that the decoder rejects.

    One such file fails its batch, which is then bisected.
    """
    stage.wait_for_kernels()
    try:
        return list(
            torchvision.io.decode_jpeg(
                encoded, torchvision.io.ImageReadMode.RGB, device=stage.device
            )
        )
    except RuntimeError as error:
        stage.raise_device_failure(error)
    if len(encoded) == 1:
        return [None]
    middle = len(encoded) // 2
    return [*_decode_jpegs(encoded[:middle], stage), *_decode_jpegs(encoded[middle:], stage)]
