"""Resize the images of a batch on their device: by Triton kernels on a GPU, else one by one.

The kernels are compiled for a GPU at their first use, which requires Triton and a C compiler, and
their pixels are compared with those of a CPU. Where this fails, torch resizes image by image, and a
note has the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from imgcls import log
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.decoding.resize import (
    DecodedImage,
    apply_tensor_orientation,
    resize_on_device,
    resize_tensor,
)
from imgcls.errors import one_line

BatchResizeFn = Callable[[Sequence[DecodedImage], Preprocess], torch.Tensor]

MAX_DIFFERENCE = 1
"""Largest accepted difference of a sample's pixels from a CPU's, in steps of 8 bits."""
SAMPLE_SIZES = ((1, 1), (3, 11), (40, 31), (97, 64))
"""(width, height) of the images of the sample."""

_kernels: dict[tuple[torch.device, str, int], BatchResizeFn | None] = {}
"""By device, filter and crop, for which kernels are compiled; None where they cannot be used."""
_lock = threading.Lock()


def resize_batch(images: Sequence[DecodedImage], spec: Preprocess) -> list[torch.Tensor]:
    """Resize and crop images on their device, which is the current one; undo their orientation.

    Returns (3, crop, crop) uint8 of each. Kernels run on the current stream.
    Raises torch.OutOfMemoryError, or torch.AcceleratorError for a device that has failed.
    """
    if not images:
        return []
    device = images[0].pixels.device
    kernel = _find_kernel(device, spec) if device.type == "cuda" else None
    if kernel is None:
        return [_resize_one(image, spec) for image in images]
    try:
        return list(kernel(images, spec).unbind())
    except RuntimeError:
        torch.cuda.synchronize(device)  # Triton reports a device that has failed as RuntimeError
        raise


def _resize_one(image: DecodedImage, spec: Preprocess) -> torch.Tensor:
    upright = apply_tensor_orientation(image.pixels, image.orientation)
    return resize_on_device(upright, image.display_size, spec)


def _find_kernel(device: torch.device, spec: Preprocess) -> BatchResizeFn | None:
    """The function that resizes a batch at once; None if it cannot be used on this device."""
    key = (device, spec.interpolation, spec.crop)
    with _lock:
        if key not in _kernels:
            _kernels[key] = _load_kernel(device, spec)
        return _kernels[key]


def _load_kernel(device: torch.device, spec: Preprocess) -> BatchResizeFn | None:
    try:
        from imgcls.data.decoding.triton_resize import resize_with_triton as kernel

        _verify(kernel, device, spec)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # noqa: BLE001  any error of the compiler, the driver or a C compiler
        reason = f"{type(error).__name__}: {one_line(error)}"[:300]
        log.emit("note", f"{device} resizes images one by one, which is slower: {reason}")
        return None
    return kernel


class _WrongPixels(Exception):
    """A kernel's pixels are not those of a CPU."""


def _verify(kernel: BatchResizeFn, device: torch.device, spec: Preprocess) -> None:
    """Raise _WrongPixels if the pixels of a sample differ from a CPU's by over MAX_DIFFERENCE."""
    generator = np.random.default_rng(0)
    sample, expected = [], []
    for orientation, (width, height) in enumerate(SAMPLE_SIZES, start=5):
        noise = generator.integers(0, 256, (height, width, 3), np.uint8)
        pixels = torch.from_numpy(noise).permute(2, 0, 1)
        upright = apply_tensor_orientation(pixels, orientation)
        size = (upright.shape[2], upright.shape[1])
        sample.append(DecodedImage(pixels.to(device), orientation, size))
        expected.append(resize_tensor(upright, size, spec))
    found = kernel(sample, spec).cpu().numpy()
    difference = int(np.abs(found.astype(np.int16) - np.stack(expected)).max())
    if difference > MAX_DIFFERENCE:
        raise _WrongPixels(f"its kernel's pixels differ from a CPU's by up to {difference} of 255")
