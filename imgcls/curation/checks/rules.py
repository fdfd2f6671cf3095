"""Images that look bad by themselves, or beside the others: unreadable, tiny, dark, blurred, odd.

The limits were set on photographs (docs/data.md has the figures); each is a key.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from imgcls.config import Section, UnitFloat
from imgcls.curation.checks.findings import Finding, Issue
from imgcls.curation.checks.image_table import BoolArray, FloatArray, ImageTable
from imgcls.data.formats import FORMAT_BY_PILLOW_NAME

DescribeImage = Callable[[int], str]
"""What to say of the image at a place; asked of those that are found alone."""


class RulesConfig(Section):
    """From where on an image counts as bad."""

    min_side: PositiveInt = 16
    """Tiny: the shorter side has fewer pixels. No issue in a set of which most images have."""
    max_aspect: PositiveFloat = 4.0
    """Extreme aspect: the longer side is more than so many times the shorter."""
    max_size_ratio: PositiveFloat = 10.0
    """Odd size: so many times more pixels than half of the images have, or fewer."""
    black_level: UnitFloat = 0.1
    """Near-black: 95 % of the picture is darker than this (0 black, 1 white)."""
    white_level: UnitFloat = 0.95
    """Near-white: 95 % of the picture is brighter than this."""
    min_entropy: NonNegativeFloat = 2.0
    """Low information: the brightness has fewer bits of entropy (0 to 8)."""
    min_sharpness: NonNegativeFloat = 0.12
    """Blurry: edges are weaker than this, beside the contrast."""
    min_color: UnitFloat = 0.03
    """Greyscale: the channels differ by less."""
    max_gray_share: UnitFloat = 0.2
    """Above this share of greyscale images, they belong to the set and are no issue."""


def apply_rules(images: ImageTable, rules: RulesConfig) -> Iterator[Finding]:
    """What the rules find."""
    ok = images.is_ok
    yield _find_unreadable(images)
    yield _find_wrong_extension(images)
    width, height = images.get_numbers("width"), images.get_numbers("height")
    short, long = np.fmin(width, height), np.fmax(width, height)

    def sizes(place: int) -> str:
        return f"{width[place]:.0f}x{height[place]:.0f} pixels"

    # icons or scanned digits are small as a set: what differs from the others is the issue
    small_set = bool(ok.any()) and float(np.median(short[ok])) < rules.min_side
    yield _flag_below("tiny", short, rules.min_side, ok & (not small_set), sizes)
    aspect = long / short
    yield _flag_above("extreme-aspect", aspect, rules.max_aspect, ok, sizes)
    yield _find_odd_sizes(ok, width * height, rules, sizes)
    bright, dark = images.get_numbers("bright"), images.get_numbers("dark")
    black, white = bright < rules.black_level, dark > rules.white_level
    yield _flag(
        "near-black", black & ok, 1 - bright, _format_value("95 % is darker than {:.2f}", bright)
    )
    yield _flag("near-white", white & ok, dark, _format_value("95 % is brighter than {:.2f}", dark))
    plain = black | white
    entropy = images.get_numbers("entropy")
    yield _flag_below(
        "low-information",
        entropy,
        rules.min_entropy,
        ok & ~plain,
        _format_value("entropy {:.2f} bits", entropy),
    )
    sharpness = images.get_numbers("sharpness")
    flat = plain | (entropy < rules.min_entropy)
    yield _flag_below(
        "blurry",
        sharpness,
        rules.min_sharpness,
        ok & ~flat,
        _format_value("sharpness {:.3f}", sharpness),
    )
    yield _find_grayscale(images, rules, ok & ~flat)
    turned = images.get_numbers("orientation")
    yield _flag(
        "rotated",
        ok & (turned > 1),
        np.full(len(images), 0.5, np.float32),
        _format_value("EXIF orientation {:.0f}: readers that pass it over see it turned", turned),
    )


def _find_unreadable(images: ImageTable) -> Finding:
    status = images.features.column("status").to_pylist()
    error = images.features.column("error").to_pylist()
    at = np.flatnonzero(~images.is_ok)
    return Finding(
        "unreadable",
        at,
        np.ones(len(at), np.float32),
        [f"{status[i]}: {error[i]}" for i in at],
    )


def _find_wrong_extension(images: ImageTable) -> Finding:
    at, detail = [], []
    formats = images.features.column("format").to_pylist()
    for place, (path, format) in enumerate(zip(images.path.to_pylist(), formats, strict=True)):
        if path is None or format not in FORMAT_BY_PILLOW_NAME:
            continue
        name = urlsplit(path).path if path.startswith(("http://", "https://")) else path
        extension = posixpath.splitext(name)[1].lower()
        if extension not in ("", ".", *FORMAT_BY_PILLOW_NAME[format].suffixes):
            at.append(place)
            detail.append(f"named {extension}, and is {format}")
    return Finding("wrong-extension", np.array(at, np.int64), np.ones(len(at), np.float32), detail)


def _find_odd_sizes(
    ok: BoolArray, area: FloatArray, rules: RulesConfig, sizes: DescribeImage
) -> Finding:
    if not ok.any():
        return _flag("odd-size", ok, area, sizes)
    median = float(np.median(area[ok]))
    factor = np.maximum(area / median, median / area)
    return _flag_above(
        "odd-size",
        factor,
        rules.max_size_ratio,
        ok,
        lambda place: f"{sizes(place)}; half of the images have up to {median:,.0f}",
    )


def _find_grayscale(images: ImageTable, rules: RulesConfig, among: BoolArray) -> Finding:
    grey = among & (images.get_numbers("colour") < rules.min_color)
    share = grey.sum() / among.sum() if among.any() else 0.0
    if share > rules.max_gray_share:
        grey = np.zeros_like(grey)
    told = f"without colour, as {share:.1%} of the images"
    return _flag("greyscale", grey, np.full(len(images), 0.5, np.float32), lambda place: told)


def _flag(issue: Issue, flags: BoolArray, score: FloatArray, detail: DescribeImage) -> Finding:
    at = np.flatnonzero(flags)
    return Finding(issue, at, score[at].astype(np.float32), [detail(i) for i in at.tolist()])


def _flag_below(
    issue: Issue, value: FloatArray, limit: float, among: BoolArray, detail: DescribeImage
) -> Finding:
    score = 1 - np.nan_to_num(value) / limit if limit else np.zeros_like(value)
    return _flag(issue, among & (value < limit), score, detail)


def _flag_above(
    issue: Issue, value: FloatArray, limit: float, among: BoolArray, detail: DescribeImage
) -> Finding:
    with np.errstate(invalid="ignore"):
        return _flag(issue, among & (value > limit), 1 - limit / value, detail)


def _format_value(text: str, values: FloatArray) -> DescribeImage:
    return lambda place: text.format(values[place])
