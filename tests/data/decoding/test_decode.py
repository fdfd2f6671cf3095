"""Bytes to pixels: every file is either the right picture or a typed error, on every route."""

from __future__ import annotations

import csv
import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Resize

from imgcls.data.decoding import decode
from imgcls.data.decoding.open_image import decode_preview
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import ImageError
from tests.data.pictures import (
    COLOR,
    FILES,
    LOSSLESS,
    SMALL,
    SPEC,
    STATUSES,
    decode_by_device,
    decodes_or_is_refused,
    difference,
    drawn,
    encoded,
    fast,
    png_of_size,
    reference,
    stored,
)

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as decode.py does outside pytest


# Mean absolute difference from the Pillow reference, of 255: (average of pictures, worst picture).
# Measured on 334 ImageNet photographs: torchvision 0.003 and 0.08, pillow 0.02 and 0.28,
# dct (24 of them enlarged to 2.3 times the needed size) 0.2 and 0.35.
AGREEMENT = {"torchvision": (0.02, 0.3), "pillow": (0.05, 0.4), "dct": (0.3, 0.6)}

SIZE = (48, 40)


def over_white(color: tuple[int, int, int], alpha: int) -> tuple[int, ...]:
    return tuple(round((value * alpha + 255 * (255 - alpha)) / 255) for value in color)


def plain(mode: str) -> Image.Image:
    """An image of one color in any mode."""
    rgb = Image.new("RGB", SIZE, COLOR)
    if mode == "1":
        return Image.new("1", SIZE, 1)
    if mode in ("I;16", "I"):
        return Image.fromarray(np.full(SIZE[::-1], 99 * 257, np.uint16)).convert(mode)
    if mode == "F":
        return Image.new("F", SIZE, 99.0)
    if mode == "LAB":
        return Image.new("LAB", SIZE, (120, 140, 110))
    if mode == "L":
        return Image.new("L", SIZE, 99)
    if mode == "LA":
        return Image.new("LA", SIZE, (99, 128))
    if mode == "RGBA":
        return Image.new("RGBA", SIZE, (*COLOR, 128))
    if mode == "P":
        return rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    return rgb.convert(mode)


GREY = (99, 99, 99)
MODES = {
    "1": (255, 255, 255), "L": GREY, "LA": over_white(GREY, 128), "P": COLOR, "RGB": COLOR,
    "RGBA": over_white(COLOR, 128), "CMYK": COLOR, "YCbCr": COLOR, "I;16": GREY,
}  # fmt: skip
HELD = {
    "JPEG": "1 L RGB CMYK YCbCr", "PNG": "1 L LA P RGB RGBA I;16", "WEBP": "L RGB RGBA",
    "GIF": "1 L P RGB", "BMP": "1 L P RGB", "TIFF": "1 L LA P RGB RGBA CMYK YCbCr I;16",
}  # fmt: skip
LOSSY = {"JPEG", "WEBP"}


# ------------------------------------------------------------------ modes and formats


@pytest.mark.parametrize(
    ("format", "mode"), [(f, mode) for f, modes in HELD.items() for mode in modes.split()]
)
def test_every_mode_of_every_format_becomes_rgb_of_the_models_size(format: str, mode: str) -> None:
    pixels, shown = decode.decode_image(encoded(plain(mode), format), SPEC)
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == np.uint8
    assert pixels.transpose(1, 2, 0).flags.c_contiguous
    assert shown == SIZE
    expected = np.array(MODES[mode]).reshape(3, 1, 1)
    assert np.abs(pixels.astype(int) - expected).max() <= (4 if format in LOSSY else 2)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", "group4", "jpeg"])
def test_compressed_tiffs_are_read(compression: str) -> None:
    mode = "1" if compression == "group4" else "RGB"
    pixels, _ = decode.decode_image(encoded(plain(mode), "TIFF", compression=compression), SPEC)
    assert np.abs(pixels.mean((1, 2)) - MODES[mode]).max() < 3


def test_lab_is_shown_or_refused_as_pillow_can() -> None:
    decodes_or_is_refused(encoded(plain("LAB"), "TIFF"))


@pytest.mark.parametrize(("format", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_sixteen_bits_are_scaled_and_not_clipped(format: str, mode: str) -> None:
    ramp = np.linspace(0, 65535, 224).astype(np.uint16)
    values = np.tile(ramp, (224, 1))
    kind = {"I;16": "<u2", "I;16B": ">u2"}[mode]
    data = encoded(Image.fromarray(values.astype(kind)), format)
    pixels, _ = decode.decode_image(data, fast(resize=224, crop=224))
    assert (pixels == np.round(values / 257).astype(np.uint8)).all()


def test_sixteen_bits_per_color_are_scaled_too() -> None:
    row = b"\0" + struct.pack(">HHH", *(value * 257 for value in COLOR)) * 8
    pixels, _ = decode.decode_image(png_of_size(8, 8, bits=16, rows=row * 8), SMALL)
    assert np.abs(pixels.astype(int) - np.array(COLOR).reshape(3, 1, 1)).max() <= 1


def checkered(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """Left half transparent, right half opaque; with the options of `save` for it."""
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
        image.paste((*COLOR, 255), (SIZE[0] // 2, 0, *SIZE))
        return (image if mode == "RGBA" else image.convert("LA")), {}
    image = Image.new("RGB", SIZE, (1, 2, 3))
    image.paste(COLOR, (SIZE[0] // 2, 0, *SIZE))
    if mode == "RGB":
        return image, {"transparency": (1, 2, 3)}
    if mode == "L":
        return image.convert("L"), {"transparency": 2}
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    return palette, {"transparency": palette.getpixel((0, 0))}


@pytest.mark.parametrize(
    ("format", "mode"),
    [("PNG", m) for m in ("RGBA", "LA", "P", "RGB", "L")]
    + [("GIF", "P"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("TIFF", "LA")],
)
def test_what_is_transparent_is_white(format: str, mode: str) -> None:
    image, options = checkered(mode)
    if format == "WEBP":
        options["lossless"] = True
    pixels, _ = decode.decode_image(encoded(image, format, **options), fast(resize=64, crop=64))
    assert (pixels[:, :, :20] == 255).all()
    right = COLOR if mode not in ("L", "LA") else (99, 99, 99)
    assert np.abs(pixels[:, :, -20:].mean((1, 2)) - right).max() < 2


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_many_frames_or_pages_the_first_is_taken(format: str) -> None:
    first, *others = (Image.new("RGB", SIZE, color) for color in (COLOR, "blue", "green"))
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(first, format, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    pixels, shown = decode.decode_image(data, SMALL)
    assert shown == SIZE
    assert np.abs(pixels.mean((1, 2)) - COLOR).max() < 3


def test_a_phones_jpeg_with_a_second_picture_behind_it_is_the_first_one() -> None:
    upright = drawn(1560, 1041)
    data = stored(upright, "MPO", 6, save_all=True, append_images=[Image.new("RGB", (50, 50))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    for spec in (SPEC, fast(resize=900, crop=900)):
        pixels, shown = decode.decode_image(data, spec)
        assert shown == upright.size
        assert difference(pixels, reference(upright, spec)) < 2


# ------------------------------------------------------------------ agreement with the reference


def through(route: str, image: Image.Image, spec: Preprocess) -> tuple[bytes, Image.Image]:
    """A file that takes the route, and the picture that Pillow sees in it."""
    if route == "dct":
        scale = 2.3 * decode.DCT_MARGIN * spec.resize / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
    else:
        image.thumbnail((1001, 700))  # larger JPEGs take the dct route
    data = encoded(image, "BMP") if route == "pillow" else encoded(image, "JPEG", quality=92)
    return data, Image.open(io.BytesIO(data))


@pytest.mark.shared
@pytest.mark.parametrize("route", AGREEMENT)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_route_agrees_with_pillow_on_photographs(
    shared: Path, route: str, interpolation: Any
) -> None:
    spec = fast(interpolation=interpolation)
    folder = shared / "data" / "imagenet-sample"
    with (folder / "manifest.csv").open(encoding="utf-8") as stream:
        paths = [row["path"] for row in csv.DictReader(stream)]
    apart = []
    for path in paths[:: len(paths) // 12]:
        data, seen = through(route, Image.open(folder / path).convert("RGB"), spec)
        apart.append(difference(decode.decode_image(data, spec)[0], reference(seen, spec)))
    mean, worst = AGREEMENT[route]
    assert np.mean(apart) < mean
    assert max(apart) < worst


@pytest.mark.parametrize("route", AGREEMENT)
@pytest.mark.parametrize("mode", ["crop", "squash"])
@pytest.mark.parametrize("size", [(500, 375), (333, 517), (257, 256), (1001, 640)])
def test_every_route_agrees_with_pillow_on_drawings(
    route: str, mode: Any, size: tuple[int, int]
) -> None:
    for interpolation in ("bilinear", "bicubic"):
        spec = fast(mode=mode, interpolation=interpolation)
        data, seen = through(route, drawn(*size), spec)
        assert (
            difference(decode.decode_image(data, spec)[0], reference(seen, spec))
            < AGREEMENT[route][1]
        )


@pytest.mark.parametrize("extra", range(8))
def test_sizes_that_eighths_do_not_divide_are_not_shifted(extra: int) -> None:
    upright = drawn(720 + extra, 727 - extra)
    for orientation in range(1, 9):
        data = stored(upright, "JPEG", orientation, quality=95, subsampling=0)
        pixels, _ = decode.decode_image(data, fast(resize=64, crop=64))
        assert difference(pixels, reference(upright, fast(resize=64, crop=64))) < 1


@pytest.mark.parametrize("route", ["torchvision", "pillow"])
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (1, 1), (3, 200), (224, 224), (256, 256)])
def test_small_pictures_are_enlarged_as_the_reference_does(
    route: str, size: tuple[int, int]
) -> None:
    data, seen = through(route, drawn(*size), SPEC)
    assert (
        difference(decode.decode_image(data, SPEC)[0], reference(seen, SPEC)) < AGREEMENT[route][1]
    )


@pytest.mark.parametrize("route", AGREEMENT)
def test_a_gray_jpeg_is_gray_on_every_route(route: str) -> None:
    data, seen = through(route, drawn(640, 480).convert("L"), SPEC)
    pixels, _ = decode.decode_image(data, SPEC)
    assert (pixels[0] == pixels[1]).all()
    assert (pixels[0] == pixels[2]).all()
    assert difference(pixels, reference(seen, SPEC)) < AGREEMENT[route][1]


# ------------------------------------------------------------------ EXIF orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(300, 401), (1111, 1039)], ids=["torchvision", "dct"])
@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
def test_a_turned_jpeg_is_shown_upright(orientation: int, size: tuple[int, int], mode: Any) -> None:
    upright, spec = drawn(*size), fast(mode=mode)
    pixels, shown = decode.decode_image(
        stored(upright, "JPEG", orientation, quality=95, subsampling=0), spec
    )
    same, _ = decode.decode_image(encoded(upright, "BMP"), spec)
    assert shown == upright.size
    assert difference(pixels, same) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_a_turned_file_of_another_format_is_shown_upright(orientation: int, format: str) -> None:
    upright = drawn(120, 200)
    data = stored(upright, format, orientation, **LOSSLESS[format])
    pixels, shown = decode.decode_image(data, SPEC)
    assert shown == (120, 200)
    assert difference(pixels, decode.decode_image(encoded(upright, "BMP"), SPEC)[0]) < 1


def test_chunks_of_a_png_behind_its_pixels_are_used() -> None:
    upright = drawn(120, 200)
    turned = stored(upright, "PNG", 6)
    place = turned.index(b"eXIf") - 4
    (length,) = struct.unpack_from(">I", turned, place)
    exif = turned[place : place + 12 + length]
    rest = turned[:place] + turned[place + 12 + length :]
    end = rest.index(b"IEND") - 4
    pixels, shown = decode.decode_image(rest[:end] + exif + rest[end:], SPEC)
    assert shown == (120, 200)
    assert difference(pixels, decode.decode_image(encoded(upright, "BMP"), SPEC)[0]) < 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_png_is_what_torchvision_makes_of_its_pixels(mode: str) -> None:
    image = drawn(400, 300).convert(mode)
    pixels, _ = decode.decode_image(encoded(image, "PNG"), SPEC)
    tensor = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    resized = Resize(SPEC.resize, antialias=True)(tensor)
    away = np.abs(pixels.astype(int) - CenterCrop(SPEC.crop)(resized).numpy())
    assert (away.max() <= 1, away.mean() < 0.1) == (True, True)


@pytest.mark.parametrize("orientation", [0, 9, 99, 300])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    image = drawn(60, 40)
    for format in ("PNG", "JPEG", "TIFF"):
        pixels, shown = decode.decode_image(encoded(image, format, orientation), SMALL)
        assert decode_preview(encoded(image, format, orientation), 20).orientation == 1
        assert shown == (60, 40)
        assert difference(pixels, decode.decode_image(encoded(image, format), SMALL)[0]) < 1


def test_broken_exif_does_not_affect_the_pixels() -> None:
    data = encoded(drawn(60, 40), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert decode.decode_image(data, SMALL)[1] == (60, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_a_picture_is_upright_and_no_larger_than_asked(orientation: int, format: str) -> None:
    small = decode_preview(stored(drawn(900, 600), format, orientation), 96).image
    assert small.mode == "RGB"
    assert small.size == (96, 64)
    assert difference(np.asarray(small), np.asarray(drawn(900, 600).resize((96, 64)))) < 3


# ------------------------------------------------------------------ batches and threads


def test_a_batch_is_decoded_as_its_images_one_by_one() -> None:
    whole = [*FILES.values(), stored(drawn(300, 200), "JPEG", 8)]
    broken = [png_of_size(13_000, 13_000), b"junk", b"", FILES["png"][:200], FILES["jpeg"][:900]]
    for files in (whole, [*whole, *broken], broken, []):
        found = decode_by_device(files, SPEC)
        assert len(found) == len(files)
        for data, result in zip(files, found, strict=True):
            if isinstance(result, ImageError):
                with pytest.raises(type(result)):
                    decode.decode_image(data, SPEC)
                continue
            pixels, shown = result
            alone, size = decode.decode_image(data, SPEC)
            assert (pixels.shape, shown) == (alone.shape, size)
            assert np.asarray(pixels).dtype == np.uint8
            assert difference(np.asarray(pixels), alone) < AGREEMENT["dct"][1]


def test_threads_decode_as_one_after_the_other() -> None:
    files = [*FILES.values(), png_of_size(13_000, 13_000), b"junk", b"", FILES["png"][:200]] * 6
    filters = list(warnings.filters)

    def outcome(data: bytes) -> object:
        try:
            return decode.decode_image(data, SPEC)[0].tobytes()
        except ImageError as error:
            return error.status, str(error)

    serial = [outcome(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, files)) == serial
    assert warnings.filters == filters


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damage_within_the_pixels_ends_in_an_error_and_never_in_a_dead_process(kind: str) -> None:
    """torchvision's PNG decoder did the latter: a decoder must survive any bytes."""
    whole = encoded(drawn(150, 110), kind)
    rng = np.random.default_rng(0)
    ends = set()
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(40, len(whole), 4):
            damaged[place] = rng.integers(256)
        try:
            decode.decode_image(bytes(damaged), SPEC)
            ends.add("decoded")
        except ImageError as error:
            ends.add(error.status)
    assert ends <= {"decoded", *STATUSES}
