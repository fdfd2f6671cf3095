"""Inputs of `Classifier.predict`: paths, URLs, bytes, Pillow images or arrays; one or many."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from imgcls.data import image_files
from imgcls.data.decoding import decode, open_image
from imgcls.data.decoding.decode import Pixels
from imgcls.data.decoding.pixels import convert_to_rgb
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import ImgclsError, RequestError

if TYPE_CHECKING:
    import torch

ImageSource = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
IMAGE_SOURCE_TYPES = (
    "a path, a URL, the bytes of a file, a Pillow image or a uint8 array (height, width, 3)"
)


def iterate_batches(
    images: ImageSource | Iterable[ImageSource], size: int
) -> Iterator[list[ImageSource]]:
    """Split the input into lists of at most `size`; an iterable is read lazily.

    Raises RequestError for an input that is neither an image nor an iterable of images.
    """
    is_single = isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image))
    if isinstance(images, np.ndarray) and images.dtype != object:
        is_single = images.ndim < 4  # four dimensions: an array of images
        if images.dtype.kind == "U":
            is_single = images.ndim == 0
    if isinstance(images, (dict, set)) or hasattr(images, "columns") or hasattr(images, "schema"):
        raise RequestError(
            f"images: a {type(images).__name__} is not a list of images; pass the column of paths, "
            "such as frame['path']"
        )
    if is_single:
        yield [images]  # type: ignore[list-item]
        return
    try:
        rest: Iterator[Any] = iter(images)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(
            f"images: got a {type(images).__name__}; pass {IMAGE_SOURCE_TYPES}, or an iterable "
            "of these"
        ) from None
    while batch := list(islice(rest, size)):
        # the values of an Arrow column
        yield [each.as_py() if hasattr(each, "as_py") else each for each in batch]


def check_positive(**numbers: int) -> None:
    """Raise RequestError for an argument that is not an integer of at least 1."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise RequestError(f"{name}: {value!r} is not an integer of at least 1")


def check_pixels(batch: Pixels | torch.Tensor, side: int) -> None:
    """Raise RequestError for a batch that is not (N, 3, side, side) uint8."""
    shape, dtype = tuple(batch.shape), str(batch.dtype).removeprefix("torch.")
    if dtype != "uint8" or len(shape) != 4 or shape[1:] != (3, side, side):
        raise RequestError(
            f"batch: is {dtype} {shape}; pass uint8 (N, 3, {side}, {side}) with values from 0 to "
            "255, or images of any size to `predict`"
        )


def load_pixels(source: Any, preprocess: Preprocess) -> Pixels:
    """Load and preprocess one image: (3, crop, crop) uint8.

    Raises StorageError or ImageError if it cannot be read, RequestError for another type.
    """
    if isinstance(source, np.ndarray):
        source = _convert_array(source)
    if isinstance(source, Image.Image):
        return decode.preprocess_pil_image(source, preprocess)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode.decode_image(bytes(source), preprocess)[0]
    if isinstance(source, (str, os.PathLike)):
        return decode.decode_image(image_files.read_image(os.fspath(source)), preprocess)[0]
    raise RequestError(f"is a {type(source).__name__}; pass {IMAGE_SOURCE_TYPES}")


def load_preview(
    source: ImageSource, side: int, *, max_pixels: int = open_image.MAX_PIXELS
) -> tuple[Image.Image, tuple[int, int]]:
    """RGB thumbnail of an image, upright, at most `side` pixels wide and high.

    Also returns the (width, height) of the upright image. Raises as `load_pixels` does.
    """
    if isinstance(source, np.ndarray):
        source = _convert_array(source)
    if isinstance(source, Image.Image):
        source.load()  # first, since reading EXIF would swallow an error in the pixels
        upright = open_image.apply_orientation(
            convert_to_rgb(source), open_image.read_orientation(source)
        )
        small = upright.copy()
        small.thumbnail((side, side))
        return small, upright.size
    if isinstance(source, (str, os.PathLike)):
        source = image_files.read_image(os.fspath(source))
    found = open_image.decode_preview(bytes(source), side, max_pixels=max_pixels)
    return found.image, found.display_size


def describe_source(source: Any, position: int) -> str:
    """Name of an image in an error: its path, else its position in the input."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return f"image {position} ({type(source).__name__})"


def add_source_name(error: ImgclsError, source: ImageSource, position: int) -> ImgclsError:
    """The same error with the name of the image in its message."""
    name = describe_source(source, position)
    return type(error)(str(error) if name in str(error) else f"{name}: {error}")


def _convert_array(array: npt.NDArray[Any]) -> Image.Image:
    shape = array.shape
    if array.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))):
        raise RequestError(
            f"is an array {array.dtype} {shape}; pass uint8 (height, width), (height, width, 3) or "
            "(height, width, 4), with values from 0 to 255"
        )
    return Image.fromarray(array)
