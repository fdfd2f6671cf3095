"""Files that are not images, too large, truncated or damaged raise a typed error."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgcls.data.decoding import decode
from imgcls.data.decoding.open_image import decode_preview
from imgcls.errors import EmptyImage, ImageError, ImageTooLarge, NotAnImage, TruncatedImage
from tests.data.pictures import (
    FILES,
    SMALL,
    SPEC,
    decodes_or_is_refused,
    drawn,
    encoded,
    enlarged,
)

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as decode.py does outside pytest


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(13_000, 13_000), (65_000, 65_000), (65_000, 2_000)])
def test_too_many_pixels_are_refused_from_the_header(format: str, size: tuple[int, int]) -> None:
    with pytest.raises(ImageTooLarge) as caught:
        decode.decode_image(enlarged(format, *size), SPEC)
    assert caught.value.status == "too_large"
    assert f"{size[0] * size[1]:,}" in str(caught.value) or str(size[0] * size[1]) in str(
        caught.value
    )


def test_the_limit_is_what_was_asked_for_and_includes_itself() -> None:
    data = encoded(drawn(50, 40), "PNG")
    assert decode.decode_image(data, SMALL, max_pixels=2000)[1] == (50, 40)
    with pytest.raises(ImageTooLarge, match=r"50x40 is 2,000 pixels, more than max_pixels 1,999"):
        decode.decode_image(data, SMALL, max_pixels=1999)


_BOMB = """
import resource, sys
from imgcls.data.decoding.decode import decode_image
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import ImageTooLarge
from tests.data.pictures import drawn, encoded, png_of_size
decode_image(encoded(drawn(600, 400), "PNG"), Preprocess())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in ((50_000, 50_000), (13_000, 13_000)):
    try:
        decode_image(png_of_size(*size), Preprocess())
    except ImageTooLarge:
        print("refused")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_decompression_bomb_costs_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", _BOMB], capture_output=True, text=True, check=True)
    *refused, grown_kib = done.stdout.split()
    assert refused == ["refused", "refused"]
    assert int(grown_kib) < 20 * 1024


def test_a_file_without_bytes_is_empty() -> None:
    for call in (lambda: decode.decode_image(b"", SPEC), lambda: decode_preview(b"", 64)):
        with pytest.raises(EmptyImage, match="no bytes") as caught:
            call()
        assert caught.value.status == "empty"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "a web page or XML"),
        (b"\n  <html>", "a web page or XML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page or XML"),
        (b'{"error": "rate limited"}', "JSON"),
        (b"[1, 2]", "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "begin with b'version '"),
        (b"\x00\x00\x00\x1cftypmp42\x00\x00\x00\x00", "begin with"),
        (b"P8\n1 1\n255\n\x00\x00\x00", "begin with"),
        (b"\x00", "begin with"),
        (b"\xff\xd8", "begin with"),
        (bytes(5000), "begin with"),
        (np.random.default_rng(0).bytes(20_000), "begin with"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_image_is_named_for_what_it_is(data: bytes, message: str) -> None:
    for call in (lambda: decode.decode_image(data, SPEC), lambda: decode_preview(data, 64)):
        with pytest.raises(NotAnImage, match=r"JPEG, PNG, WebP, .* are decoded") as caught:
            call()
        assert caught.value.status == "not_an_image"
        assert message in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_anywhere_is_an_image_error(name: str) -> None:
    whole = FILES[name]
    statuses = {}
    cuts = sorted({*range(1, 40), *range(40, len(whole), max(1, len(whole) // 60)), len(whole) - 1})
    for cut in cuts:
        try:
            decode.decode_image(whole[:cut], SPEC)
            statuses[cut] = "ok"
        except ImageError as error:
            statuses[cut] = error.status
    # a file that lacks nothing but its end mark may pass
    assert {status for cut, status in statuses.items() if cut < 0.97 * len(whole)} <= {
        "truncated", "unreadable", "not_an_image",
    }  # fmt: skip
    if not name.startswith("tiff"):  # which may keep its header at the end
        late = {status for cut, status in statuses.items() if 0.6 < cut / len(whole) < 0.97}
        assert late == {"truncated"}


def test_a_cut_off_file_is_reported_with_its_size() -> None:
    data = FILES["jpeg"][:2000]
    with pytest.raises(TruncatedImage, match=r"truncated.*\(2,000 bytes\)") as caught:
        decode.decode_image(data, SPEC)
    assert ".cpp" not in str(caught.value)
    with pytest.raises(ImageError, match="begins as a PNG does, but its header"):
        decode.decode_image(FILES["png"][:10], SPEC)
    with pytest.raises(ImageError):
        decode_preview(data, 64)


@st.composite
def _mutated(draw: Any) -> bytes:
    """A file with a few bytes changed, a stretch taken out, put in or repeated."""
    data = bytearray(FILES[draw(st.sampled_from(list(FILES)))])
    for _ in range(draw(st.integers(1, 4))):
        # half of the changes go where the headers are
        end = draw(st.sampled_from([min(700, len(data)), len(data)]))
        at = draw(st.integers(0, max(0, end - 1)))
        kind = draw(st.sampled_from(["change", "change", "insert", "cut", "repeat", "zero"]))
        length = draw(st.integers(1, 40))
        if kind == "change":
            data[at : at + 2] = draw(st.binary(min_size=1, max_size=2))
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = bytes(length)
    return bytes(data)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(data=_mutated())
def test_damaged_files_are_pixels_or_an_image_error(data: bytes) -> None:
    decodes_or_is_refused(data)


@settings(max_examples=200)
@given(data=st.binary(max_size=300), name=st.sampled_from(["", *FILES]), kept=st.integers(0, 64))
def test_random_bytes_are_an_image_error(data: bytes, name: str, kept: int) -> None:
    start = FILES[name][:kept] if name else b""
    decodes_or_is_refused(start + data)


@pytest.mark.chaos
@settings(max_examples=20_000, suppress_health_check=list(HealthCheck))
@given(data=_mutated())
def test_twenty_thousand_damaged_files_are_pixels_or_an_image_error(data: bytes) -> None:
    decodes_or_is_refused(data)
