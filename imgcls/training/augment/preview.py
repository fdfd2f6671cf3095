"""A picture of what augmentation does: training images in rows, what the network sees in columns.

Written when a training starts, so that a mirrored digit or a crop without its object is seen by a
person before it costs an epoch. Owns the layout; the images come from the very `Augment` that the
workers use.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from imgcls.data.decode import Pixels
from imgcls.training.augment.augment import Augment
from imgcls.training.augment.ops.crop import center_crop
from imgcls.training.sampler import Int64Array

TILE_SIZE = 144
"""About the side of a tile: small images are enlarged by a whole number, large ones shrunk."""
GAP, EDGE = 6, 12
CAPTION_WIDTH = 150
"""Room for the names of classes, if they need it."""
LINE_HEIGHT = 15
TEXT_COLOR, MUTED_COLOR = (32, 32, 32), (112, 112, 112)


def choose_sample_rows(labels: Int64Array, count: int = 8) -> Int64Array:
    """Rows for a grid, of as many different classes as possible.

    labels: (N,) int64
    Returns at most `count` rows in ascending order of their classes: the first of each class, the
    classes spread over all that there are; then the second of each, until there are enough.
    """
    classes, inverse = np.unique(labels, return_inverse=True)
    if len(classes) > count:
        spread = np.linspace(0, len(classes) - 1, count).round().astype(np.int64)
        return np.array([np.argmax(inverse == at) for at in spread])
    order = np.argsort(inverse, kind="stable")
    first = np.searchsorted(inverse[order], inverse[order])
    rank = np.arange(len(order)) - first  # how many of the same class come before
    rows = order[np.argsort(rank, kind="stable")][:count]
    return rows[np.argsort(labels[rows], kind="stable")]


def draw_preview(
    pixels: Pixels,
    labels: Int64Array,
    classes: Sequence[str],
    augment: Augment,
    *,
    columns: int = 7,
    seed: int = 0,
) -> bytes:
    """A contact sheet as PNG: a row per image, first as evaluation sees it, then augmented.

    pixels: (N, 3, S, S) uint8, N of 1 to about 8
    labels: (N,) int64 places in `classes`
    Where images are mixed, each is captioned with its targets. The caller's random state is left
    as it was.
    """
    batch, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shown = [(center_crop(batch, augment.size), targets)]
        shown += [augment(batch, targets) for _ in range(columns)]

    tile = _compute_tile_size(augment.size)
    below = 2 * LINE_HEIGHT if augment.recipe.mixes_targets else 0
    large, small = ImageFont.load_default(13), ImageFont.load_default(11)
    names = [_shorten(classes[label], large, CAPTION_WIDTH) for label in labels.tolist()]
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


def _compute_tile_size(size: int) -> int:
    return size * round(TILE_SIZE / size) if size <= TILE_SIZE else TILE_SIZE


def _resize_tile(image: torch.Tensor, tile: int) -> Image.Image:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    # whole pixels stay whole, so that what the network sees can be counted
    smooth = Image.Resampling.LANCZOS if picture.width > tile else Image.Resampling.NEAREST
    return picture.resize((tile, tile), smooth)


def _format_targets(target: torch.Tensor, classes: Sequence[str]) -> list[str]:
    """The classes in a mixed target, largest first: `62 % cat`, `38 % dog`."""
    values, places = target.topk(min(2, len(classes)))
    found = zip(values.tolist(), places.tolist(), strict=True)
    return [f"{100 * value:.0f} % {classes[place]}" for value, place in found if value >= 0.005]


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text, shortened until it is no wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
