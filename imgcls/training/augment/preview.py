"""Preview of the augmentation: a contact sheet with one training image per row, augmented.

Written when a training starts, so that mirrored digits or crops without the object can be noticed
before the first epoch. The images come from the same `Augment` as in the workers.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from imgcls.data.decoding.decode import Pixels
from imgcls.training.augment.augment import Augment
from imgcls.training.augment.crop import center_crop
from imgcls.training.sampler import Int64Array

TILE_SIZE = 144
"""Approximate side of a tile, in pixels; small images are enlarged by an integer factor."""
GAP, EDGE = 6, 12
CAPTION_WIDTH = 150
"""Maximum width of the class names, in pixels."""
LINE_HEIGHT = 15
TEXT_COLOR, MUTED_COLOR = (32, 32, 32), (112, 112, 112)


def choose_sample_rows(labels: Int64Array, count: int = 8) -> Int64Array:
    """Row indices for a preview, from as many classes as possible.

    labels: (N,) int64
    Returns at most `count` indices, sorted by class: with more than `count` classes, the first row
    of evenly spaced classes; else the first row of each class, then the second, and so on.
    """
    classes, inverse = np.unique(labels, return_inverse=True)
    if len(classes) > count:
        spread = np.linspace(0, len(classes) - 1, count).round().astype(np.int64)
        return np.array([np.argmax(inverse == at) for at in spread])
    order = np.argsort(inverse, kind="stable")
    first = np.searchsorted(inverse[order], inverse[order])
    rank = np.arange(len(order)) - first  # number of earlier rows of the same class
    rows = order[np.argsort(rank, kind="stable")][:count]
    return rows[np.argsort(labels[rows], kind="stable")]


def draw_preview(
    pixels: Pixels,
    targets: torch.Tensor,
    classes: Sequence[str],
    augment: Augment,
    *,
    columns: int = 7,
    seed: int = 0,
) -> bytes:
    """A contact sheet as PNG: a row per image, first as evaluation sees it, then augmented.

    pixels: (N, 3, S, S) uint8, N of 1 to about 8
    targets: (N,) int64 indices into `classes`, or (N, C) float32 of 1, 0 and NaN for multilabel
    If images are mixed, each has its targets as a caption. Does not change the random state of the
    caller.
    """
    batch = torch.from_numpy(pixels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shown = [(center_crop(batch, augment.size), targets)]
        shown += [augment(batch, targets) for _ in range(columns)]

    tile = _compute_tile_size(augment.size)
    below = 2 * LINE_HEIGHT if augment.recipe.mixes_targets else 0
    large, small = ImageFont.load_default(13), ImageFont.load_default(11)
    names = [_shorten(_name_target(each, classes), large, CAPTION_WIDTH) for each in targets]
    left = EDGE + round(max(large.getlength(name) for name in names)) + 2 * GAP
    width = left + (columns + 1) * (tile + GAP) + EDGE
    title = textwrap.wrap(f"Augmentation: {augment.recipe}", width // 7)
    top = EDGE + (len(title) + 1) * (LINE_HEIGHT + 3) + GAP
    height = top + len(batch) * (tile + below + GAP) + EDGE
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    draw.multiline_text((EDGE, EDGE), "\n".join(title), TEXT_COLOR, large, spacing=5)
    for column, (images, found) in enumerate(shown):
        x = left + column * (tile + GAP) + (GAP if column else 0)
        heading = "as evaluated" if column == 0 else f"draw {column}"
        draw.text((x, top - LINE_HEIGHT - GAP), heading, MUTED_COLOR, small)
        for row in range(len(batch)):
            y = top + row * (tile + below + GAP)
            sheet.paste(_resize_tile(images[row], tile), (x, y))
            if column == 0:
                draw.text((EDGE, y + (tile - LINE_HEIGHT) // 2), names[row], TEXT_COLOR, large)
            elif below:
                lines = [
                    _shorten(line, small, tile) for line in _format_targets(found[row], classes)
                ]
                draw.multiline_text(
                    (x, y + tile + 1), "\n".join(lines), MUTED_COLOR, small, spacing=3
                )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _name_target(target: torch.Tensor, classes: Sequence[str]) -> str:
    """The class of an image, or all of them."""
    if target.dim() == 0:
        return classes[int(target)]
    return ", ".join(classes[int(code)] for code in (target == 1).nonzero()) or "(none)"


def _compute_tile_size(size: int) -> int:
    return size * round(TILE_SIZE / size) if size <= TILE_SIZE else TILE_SIZE


def _resize_tile(image: torch.Tensor, tile: int) -> Image.Image:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    # enlarged pixels keep sharp edges, so that the pixels of the network's input can be counted
    smooth = Image.Resampling.LANCZOS if picture.width > tile else Image.Resampling.NEAREST
    return picture.resize((tile, tile), smooth)


def _format_targets(target: torch.Tensor, classes: Sequence[str]) -> list[str]:
    """The classes in a mixed target, largest first: `62 % cat`, `38 % dog`."""
    values, places = target.nan_to_num(0.0).topk(min(2, len(classes)))
    found = zip(values.tolist(), places.tolist(), strict=True)
    return [f"{100 * value:.0f} % {classes[place]}" for value, place in found if value >= 0.005]


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text, shortened until it is no wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
