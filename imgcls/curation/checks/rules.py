"""Rules for single images: unreadable, tiny, dark, blurry, of an unusual size and so on.

The default thresholds were chosen on photographs (docs/data.md has the figures); each is a key.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import numpy as np

from imgcls.curation.checks.findings import Finding
from imgcls.curation.checks.image_table import BoolArray, FloatArray, ImageTable
from imgcls.curation.config import Issue, RulesConfig
from imgcls.data.formats import FORMAT_BY_PILLOW_NAME

DescribeImage = Callable[[int], str]
"""The detail text of the image at an index; called only for flagged images."""


def apply_rules(images: ImageTable, rules: RulesConfig) -> Iterator[Finding]:
    """Apply all rules; yields one finding per issue, which may be empty."""
    ok = images.is_ok
    yield _find_unreadable(images)
    yield _find_wrong_extension(images)
    width, height = images.get_numbers("width"), images.get_numbers("height")
    short, long = np.fmin(width, height), np.fmax(width, height)

    def describe_size(index: int) -> str:
        return f"{width[index]:.0f}x{height[index]:.0f} pixels"

    # icons or scanned digits are all small, which is not an issue
    all_small = bool(ok.any()) and float(np.median(short[ok])) < rules.min_side
    yield _flag_below("tiny", short, rules.min_side, ok & (not all_small), describe_size)
    yield _flag_above("extreme-aspect", long / short, rules.max_aspect, ok, describe_size)
    yield _find_odd_sizes(ok, width * height, rules, describe_size)
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
    orientation = images.get_numbers("orientation")
    yield _flag(
        "rotated",
        ok & (orientation > 1),
        np.full(len(images), 0.5, np.float32),
        _format_value(
            "EXIF orientation {:.0f}: readers that ignore it see it rotated", orientation
        ),
    )


def _find_unreadable(images: ImageTable) -> Finding:
    status = images.features.column("status").to_pylist()
    error = images.features.column("error").to_pylist()
    indices = np.flatnonzero(~images.is_ok)
    return Finding(
        "unreadable",
        indices,
        np.ones(len(indices), np.float32),
        [f"{status[i]}: {error[i]}" for i in indices],
    )


def _find_wrong_extension(images: ImageTable) -> Finding:
    indices, details = [], []
    formats = images.features.column("format").to_pylist()
    for index, (path, format) in enumerate(zip(images.path.to_pylist(), formats, strict=True)):
        if path is None or format not in FORMAT_BY_PILLOW_NAME:
            continue
        name = urlsplit(path).path if path.startswith(("http://", "https://")) else path
        extension = posixpath.splitext(name)[1].lower()
        if extension not in ("", ".", *FORMAT_BY_PILLOW_NAME[format].suffixes):
            indices.append(index)
            details.append(f"the name ends in {extension}, but the format is {format}")
    score = np.ones(len(indices), np.float32)
    return Finding("wrong-extension", np.array(indices, np.int64), score, details)


def _find_odd_sizes(
    ok: BoolArray, area: FloatArray, rules: RulesConfig, describe_size: DescribeImage
) -> Finding:
    if not ok.any():
        return _flag("odd-size", ok, area, describe_size)
    median = float(np.median(area[ok]))
    ratio = np.maximum(area / median, median / area)
    return _flag_above(
        "odd-size",
        ratio,
        rules.max_size_ratio,
        ok,
        lambda index: f"{describe_size(index)}; the median is {median:,.0f}",
    )


def _find_grayscale(images: ImageTable, rules: RulesConfig, candidates: BoolArray) -> Finding:
    gray = candidates & (images.get_numbers("colour") < rules.min_color)
    share = gray.sum() / candidates.sum() if candidates.any() else 0.0
    if share > rules.max_gray_share:
        gray = np.zeros_like(gray)
    detail = f"without color, like {share:.1%} of the images"
    return _flag("greyscale", gray, np.full(len(images), 0.5, np.float32), lambda index: detail)


def _flag(issue: Issue, flags: BoolArray, score: FloatArray, describe: DescribeImage) -> Finding:
    indices = np.flatnonzero(flags)
    details = [describe(index) for index in indices.tolist()]
    return Finding(issue, indices, score[indices].astype(np.float32), details)


def _flag_below(
    issue: Issue, value: FloatArray, limit: float, candidates: BoolArray, describe: DescribeImage
) -> Finding:
    score = 1 - np.nan_to_num(value) / limit if limit else np.zeros_like(value)
    return _flag(issue, candidates & (value < limit), score, describe)


def _flag_above(
    issue: Issue, value: FloatArray, limit: float, candidates: BoolArray, describe: DescribeImage
) -> Finding:
    with np.errstate(invalid="ignore"):
        return _flag(issue, candidates & (value > limit), 1 - limit / value, describe)


def _format_value(text: str, values: FloatArray) -> DescribeImage:
    return lambda index: text.format(values[index])
