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
from imgcls.curation.checks.image_table import Flags, Floats, Images
from imgcls.data.formats import FORMAT_OF

Tell = Callable[[int], str]
"""What to say of the image at a place; asked of those that are found alone."""


class RulesConfig(Section):
    """From where on an image counts as bad."""

    tiny_pixels: PositiveInt = 16
    """Tiny: the shorter side has fewer pixels. No issue in a set of which most images have."""
    max_aspect: PositiveFloat = 4.0
    """Extreme aspect: the longer side is more than so many times the shorter."""
    odd_size: PositiveFloat = 10.0
    """Odd size: so many times more pixels than half of the images have, or fewer."""
    black: UnitFloat = 0.1
    """Near-black: 95 % of the picture is darker than this (0 black, 1 white)."""
    white: UnitFloat = 0.95
    """Near-white: 95 % of the picture is brighter than this."""
    min_entropy: NonNegativeFloat = 2.0
    """Low information: the brightness has fewer bits of entropy (0 to 8)."""
    min_sharpness: NonNegativeFloat = 0.12
    """Blurry: edges are weaker than this, beside the contrast."""
    grey_colour: UnitFloat = 0.03
    """Greyscale: the channels differ by less."""
    max_grey_share: UnitFloat = 0.2
    """Above this share of greyscale images, they belong to the set and are no issue."""


def judged(images: Images, rules: RulesConfig) -> Iterator[Finding]:
    """What the rules find."""
    ok = images.ok
    yield _unreadable(images)
    yield _wrong_extension(images)
    width, height = images.number("width"), images.number("height")
    short, long = np.fmin(width, height), np.fmax(width, height)

    def sizes(place: int) -> str:
        return f"{width[place]:.0f}x{height[place]:.0f} pixels"

    # icons or scanned digits are small as a set: what differs from the others is the issue
    small_set = bool(ok.any()) and float(np.median(short[ok])) < rules.tiny_pixels
    yield _below("tiny", short, rules.tiny_pixels, ok & (not small_set), sizes)
    aspect = long / short
    yield _above("extreme-aspect", aspect, rules.max_aspect, ok, sizes)
    yield _odd_size(ok, width * height, rules, sizes)
    bright, dark = images.number("bright"), images.number("dark")
    black, white = bright < rules.black, dark > rules.white
    yield _where("near-black", black & ok, 1 - bright, _told("95 % is darker than {:.2f}", bright))
    yield _where("near-white", white & ok, dark, _told("95 % is brighter than {:.2f}", dark))
    plain = black | white
    entropy = images.number("entropy")
    yield _below(
        "low-information",
        entropy,
        rules.min_entropy,
        ok & ~plain,
        _told("entropy {:.2f} bits", entropy),
    )
    sharpness = images.number("sharpness")
    flat = plain | (entropy < rules.min_entropy)
    yield _below(
        "blurry",
        sharpness,
        rules.min_sharpness,
        ok & ~flat,
        _told("sharpness {:.3f}", sharpness),
    )
    yield _greyscale(images, rules, ok & ~flat)
    turned = images.number("orientation")
    yield _where(
        "rotated",
        ok & (turned > 1),
        np.full(len(images), 0.5, np.float32),
        _told("EXIF orientation {:.0f}: readers that pass it over see it turned", turned),
    )


def _unreadable(images: Images) -> Finding:
    status = images.facts.column("status").to_pylist()
    error = images.facts.column("error").to_pylist()
    at = np.flatnonzero(~images.ok)
    return Finding(
        "unreadable",
        at,
        np.ones(len(at), np.float32),
        [f"{status[i]}: {error[i]}" for i in at],
    )


def _wrong_extension(images: Images) -> Finding:
    at, detail = [], []
    formats = images.facts.column("format").to_pylist()
    for place, (path, format) in enumerate(zip(images.path.to_pylist(), formats, strict=True)):
        if path is None or format not in FORMAT_OF:
            continue
        name = urlsplit(path).path if path.startswith(("http://", "https://")) else path
        extension = posixpath.splitext(name)[1].lower()
        if extension not in ("", ".", *FORMAT_OF[format].suffixes):
            at.append(place)
            detail.append(f"named {extension}, and is {format}")
    return Finding("wrong-extension", np.array(at, np.int64), np.ones(len(at), np.float32), detail)


def _odd_size(ok: Flags, area: Floats, rules: RulesConfig, sizes: Tell) -> Finding:
    if not ok.any():
        return _where("odd-size", ok, area, sizes)
    median = float(np.median(area[ok]))
    factor = np.maximum(area / median, median / area)
    return _above(
        "odd-size",
        factor,
        rules.odd_size,
        ok,
        lambda place: f"{sizes(place)}; half of the images have up to {median:,.0f}",
    )


def _greyscale(images: Images, rules: RulesConfig, among: Flags) -> Finding:
    grey = among & (images.number("colour") < rules.grey_colour)
    share = grey.sum() / among.sum() if among.any() else 0.0
    if share > rules.max_grey_share:
        grey = np.zeros_like(grey)
    told = f"without colour, as {share:.1%} of the images"
    return _where("greyscale", grey, np.full(len(images), 0.5, np.float32), lambda place: told)


def _where(issue: Issue, flags: Flags, score: Floats, detail: Tell) -> Finding:
    at = np.flatnonzero(flags)
    return Finding(issue, at, score[at].astype(np.float32), [detail(i) for i in at.tolist()])


def _below(issue: Issue, value: Floats, limit: float, among: Flags, detail: Tell) -> Finding:
    score = 1 - np.nan_to_num(value) / limit if limit else np.zeros_like(value)
    return _where(issue, among & (value < limit), score, detail)


def _above(issue: Issue, value: Floats, limit: float, among: Flags, detail: Tell) -> Finding:
    with np.errstate(invalid="ignore"):
        return _where(issue, among & (value > limit), 1 - limit / value, detail)


def _told(text: str, values: Floats) -> Tell:
    return lambda place: text.format(values[place])
