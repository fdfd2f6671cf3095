"""Explanation of one image: its class activation map, and pictures of it for people."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from imgcls.data import image_files
from imgcls.data.decoding.decode import Pixels, decode_image
from imgcls.data.decoding.open_image import MAX_PIXELS
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.decoding.resize import compute_crop_window, compute_resized_size
from imgcls.data.encode_image import encode_data_uri, encode_jpeg
from imgcls.errors import ImgclsError, RequestError
from imgcls.formatting import suggest_names
from imgcls.models import sources
from imgcls.models.explain import ClassMaps, Explainer
from imgcls.models.notebook_repr import render_frame
from imgcls.models.sources import ImageSource

MAX_SIDE = 512
"""Maximum width and height of an overlay, in pixels."""
MIN_SIDE = 224
"""Images below half of this size are enlarged."""
_QUALITY = 82
_OPACITY = 0.65
_STOPS = (0.0, 0.35, 0.65, 1.0)
_COLORS = ((40, 60, 200), (0, 190, 190), (250, 220, 40), (220, 20, 20))
"""Blue, cyan, yellow, red for values from 0 to 1, as most tools show these maps."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Class activation map of an image: the regions that contribute to the score of a class.

    Parameters
    ----------
    label
        The explained class.
    class_map
        (height, width) float32 from 0 to 1, over the whole image; 0 outside of the part that the
        network saw, and everywhere if no region increases the score of the class.
    image
        The image, RGB and upright, in the size of the map.
    source
        The image as it was passed.
    """

    label: str
    class_map: npt.NDArray[np.float32]
    image: Image.Image = field(repr=False)
    source: ImageSource | None = field(default=None, repr=False)

    @property
    def is_empty(self) -> bool:
        """Whether no region of the image increases the score of the class."""
        return not self.class_map.any()

    def overlay(self) -> Image.Image:
        """The image with the map over it: red and opaque where it is 1, transparent where it is 0.

        Returns
        -------
        PIL.Image.Image
            RGB, in the size of the map.
        """
        values = self.class_map
        colors = np.stack(
            [
                np.interp(values, _STOPS, [color[channel] for color in _COLORS])
                for channel in range(3)
            ],
            axis=-1,
        )
        # most opaque from 0.6 on, so that the object can be seen and the rest stays as it is
        opacity = _OPACITY * np.clip(values / 0.6, 0, 1)[..., None]
        blended = np.asarray(self.image) * (1 - opacity) + colors * opacity
        return Image.fromarray(blended.round().astype(np.uint8))

    def encode_jpeg(self) -> bytes:
        """The overlay as the bytes of a JPEG."""
        return encode_jpeg(self.overlay(), _QUALITY)

    def _repr_png_(self) -> bytes:
        sink = io.BytesIO()
        self.overlay().save(sink, "PNG")
        return sink.getvalue()

    def _repr_html_(self) -> str:
        label = html.escape(self.label)
        what = f"image regions that contribute to the score of {label}"
        note = "<div>no region increases its score</div>" if self.is_empty else ""
        picture = encode_data_uri(self.overlay(), _QUALITY)
        image = f'<img src="{picture}" alt="{what}" style="max-width:100%">'
        return render_frame(f"{image}<div><b>{label}</b></div>{note}", self.source)


class Explanations(list[Explanation]):
    """List of explanations in the order of their images, with an HTML view for notebooks."""

    def _repr_html_(self) -> str:
        shown = "".join(each._repr_html_() for each in self[:_MAX_SHOWN])
        more = len(self) - _MAX_SHOWN
        return shown + (f"<p>and {more:,} more</p>" if more > 0 else "")


_MAX_SHOWN = 24


def explain_images(
    explainer: Explainer,
    images: ImageSource | Iterable[ImageSource],
    class_index: int | None,
    find_best_class: Callable[[Pixels], int],
) -> Explanations:
    """Explain images one by one; see `Classifier.explain`.

    class_index:     the class of all images; None for the one that `find_best_class` returns
    find_best_class: takes (3, crop, crop) uint8
    """
    found = Explanations()
    for batch in sources.iterate_batches(images, 1):
        source = batch[0]
        try:
            content = source
            if isinstance(source, (str, os.PathLike)):  # read once
                content = image_files.read_image(os.fspath(source))
            pixels = sources.load_pixels(content, explainer.preprocess)
            chosen = find_best_class(pixels) if class_index is None else class_index
            preview = sources.load_preview(content, MAX_SIDE)
            found += _explain_pixels(explainer, pixels, [chosen], preview, source)
        except ImgclsError as error:
            raise sources.add_source_name(error, source, len(found)) from error
    return found


def explain_file(
    explainer: Explainer,
    data: bytes,
    classes: Sequence[int],
    *,
    side: int = MAX_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> list[Explanation]:
    """Explain the bytes of an image file for some classes; raises as `decode_image` does."""
    pixels, _ = decode_image(data, explainer.preprocess, max_pixels=max_pixels)
    preview = sources.load_preview(data, side, max_pixels=max_pixels)
    return _explain_pixels(explainer, pixels, classes, preview, side=side)


def _explain_pixels(
    explainer: Explainer,
    pixels: Pixels,
    classes: Sequence[int],
    preview: tuple[Image.Image, tuple[int, int]],
    source: ImageSource | None = None,
    *,
    side: int = MAX_SIDE,
) -> list[Explanation]:
    """Explain one image for some classes.

    pixels:  (3, crop, crop) uint8, as the network sees the image
    preview: as `load_preview` returns it
    side:    maximum width and height of the explanations
    """
    small, display_size = preview
    image = _enlarge(small, min(side, MIN_SIDE))
    maps = explainer.compute_class_maps(np.repeat(pixels[None], len(classes), axis=0), classes)
    return [
        Explanation(
            explainer.classes[index],
            place_on_image(found, display_size, image.size, explainer.preprocess),
            image,
            source,
        )
        for index, found in zip(classes, maps, strict=True)
    ]


def place_on_image(
    class_map: ClassMaps,
    display_size: tuple[int, int],
    size: tuple[int, int],
    preprocess: Preprocess,
) -> ClassMaps:
    """A map of the network's input as a map of the whole image, 0 outside of the input.

    class_map:    (crop, crop)
    display_size: (width, height) of the image
    size:         (width, height) of the result
    Returns (height, width) float32.
    """
    resized = compute_resized_size(display_size, preprocess)
    box, (x, y) = compute_crop_window(resized, preprocess)
    left, right = _scale_span(box[0], box[2], resized[0], size[0])
    top, bottom = _scale_span(box[1], box[3], resized[1], size[1])
    seen = class_map[y : y + box[3] - box[1], x : x + box[2] - box[0]]
    placed = np.zeros((size[1], size[0]), np.float32)
    scaled = Image.fromarray(seen).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    placed[top:bottom, left:right] = np.clip(np.asarray(scaled), 0, 1)
    return placed


def find_class(classes: Sequence[str], name: str) -> int:
    """Index of a class; raises RequestError with the nearest names if it is unknown."""
    if name in classes:
        return classes.index(name)
    hint = suggest_names(str(name), classes, "see `Classifier.classes`", form="{!r}")
    raise RequestError(f"class_name: {name!r} is not one of the {len(classes):,} classes; {hint}")


def _scale_span(start: int, stop: int, whole: int, size: int) -> tuple[int, int]:
    """The pixels [start, stop) of `whole` in an image of `size` pixels, at least one."""
    first = min(round(start * size / whole), size - 1)
    return first, max(first + 1, round(stop * size / whole))


def _enlarge(image: Image.Image, side: int) -> Image.Image:
    """A small image with each pixel repeated, at most `side` pixels wide and high."""
    factor = side // max(image.size)
    if factor < 2:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
