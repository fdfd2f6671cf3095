"""One rule for damaged JPEGs: the same status on every decode route, the same pixels when sound."""

from __future__ import annotations

import csv
import io
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls.data.decoding import decode, device_decode, jpeg, open_image
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import ImageError, ImageTooLarge, TruncatedImage
from tests.data.pictures import decode_by_device, difference, drawn, encoded, reference

SPEC = Preprocess(resize=64, crop=56, decode="fast")
EXACT = Preprocess(resize=64, crop=56, decode="exact")
SIZES = {"torchvision": (150, 110), "dct": (507, 381)}
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "progressive": {"progressive": True},
    "restart": {"restart_marker_blocks": 4},
    "progressive restart": {"progressive": True, "restart_marker_rows": 1},
}
EOI = b"\xff\xd9"


def noisy(width: int, height: int, grain: float = 12) -> Image.Image:
    """A drawing whose compressed data have no runs of 0x00 or 0xFF at their end."""
    pixels = np.asarray(drawn(width, height))
    noise = np.random.default_rng(0).normal(size=pixels.shape) * grain
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def files() -> dict[str, bytes]:
    found = {
        f"{route} {kind}": encoded(noisy(*size), "JPEG", quality=85, **options)
        for route, size in SIZES.items()
        for kind, options in KINDS.items()
    }
    for route, size in SIZES.items():
        found[f"{route} gray"] = encoded(noisy(*size).convert("L"), "JPEG")
    found["pillow CMYK"] = encoded(noisy(150, 110).convert("CMYK"), "JPEG")
    return found


FILES = files()


def by_prepared(data: bytes) -> Any:
    return decode.preprocess_pil_image(Image.open(io.BytesIO(data)), SPEC)


def by_checked(data: bytes) -> Any:
    """What a GPU gets, and what Pillow decodes of it."""
    return np.asarray(Image.open(io.BytesIO(jpeg.verify_jpeg(data))).convert("RGB"))


def by_batch(data: bytes) -> Any:
    (found,) = decode_by_device([data], SPEC)
    if isinstance(found, ImageError):
        raise found
    return np.asarray(found[0])


ROUTES: dict[str, Callable[[bytes], Any]] = {
    "decode": lambda data: decode.decode_image(data, SPEC)[0],
    "decode exact": lambda data: decode.decode_image(data, EXACT)[0],
    "decode_batch": by_batch,
    "checked_jpegs": by_checked,
    "picture": lambda data: np.asarray(open_image.decode_preview(data, 96).image),
    "prepared": by_prepared,
}


def scan_start(data: bytes) -> int:
    """Where the first entropy-coded byte is."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def statuses(data: bytes) -> dict[str, str]:
    found = {}
    for name, route in ROUTES.items():
        try:
            route(data)
            found[name] = "ok"
        except ImageError as error:
            found[name] = error.status
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_lost_end_marker_and_padding_change_no_pixel_on_any_route(name: str) -> None:
    whole = FILES[name]
    assert whole.endswith(EOI)
    data = whole[:-2]
    ends = {
        "no marker": data,
        "half a marker": data + b"\xff",
        "zeros": data + bytes(64),
        "erased flash": data + b"\xff" * 64,
        "both": data + bytes(9) + b"\xff" * 9 + bytes(512),
        "padding before the marker": data + bytes(512) + EOI,
        "fill bytes before the marker": data + b"\xff" * 9 + EOI,
        "zeros after the marker": whole + bytes(512),
        "text after the marker": whole + b"appended",
    }
    expected = {route: decoder(whole) for route, decoder in ROUTES.items()}
    for end, damaged in ends.items():
        for route, decoder in ROUTES.items():
            assert (decoder(damaged) == expected[route]).all(), (end, route)


@pytest.mark.parametrize("name", FILES)
def test_missing_image_data_are_truncated_on_every_route(name: str) -> None:
    whole = FILES[name]
    first, last = scan_start(whole), len(whole) - 2
    cuts = {last - few for few in (1, 2, 5, 20)} | {
        first + round(share * (last - first)) for share in (0.02, 0.3, 0.5, 0.9)
    }
    for cut in cuts:
        data = whole[:cut]
        ends = {
            "nothing": b"",
            "marker": EOI,
            "zeros": bytes(64),
            "zeros to the full length": bytes(len(whole) - cut),
            "zeros and marker": bytes(4096) + EOI,
            "erased flash": b"\xff" * 64,
        }
        for end, padding in ends.items():
            found = statuses(data + padding)
            assert found == dict.fromkeys(ROUTES, "truncated"), (cut, end)


@pytest.mark.parametrize("route", SIZES)
def test_a_progressive_file_without_its_later_scans_is_truncated(route: str) -> None:
    whole = FILES[f"{route} progressive"]
    scans = [match.start() for match in re.finditer(rb"\xff\xda", whole)]
    assert len(scans) == 10
    for scan in scans[1:]:
        # each scan follows its Huffman table
        table = whole.rindex(b"\xff\xc4", 0, scan)
        for end in (EOI, b"", bytes(64)):
            assert statuses(whole[:table] + end) == dict.fromkeys(ROUTES, "truncated")
    with pytest.raises(TruncatedImage, match=r"truncated: scans are missing \([\d,]+ bytes\)"):
        jpeg.decode_jpeg(whole[: whole.rindex(b"\xff\xc4", 0, scans[4])] + EOI)


def in_three_scans() -> tuple[list[bytes], Image.Image]:
    """A sequential JPEG with a scan per component, in pieces: headers, and each scan."""
    bands = [encoded(band, "JPEG", quality=90) for band in noisy(150, 110).convert("YCbCr").split()]
    tables = bands[0][: bands[0].index(b"\xff\xc0")]
    huffman = bands[0][bands[0].index(b"\xff\xc4") : bands[0].index(b"\xff\xda")]
    components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 110, 150, 3) + components
    scans = [
        b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, number, 0, 0, 63, 0)
        + band[scan_start(band) : -2]
        for number, band in zip((1, 2, 3), bands, strict=True)
    ]  # fmt: skip
    planes = [Image.open(io.BytesIO(band)) for band in bands]
    return [tables + frame + huffman, *scans], Image.merge("YCbCr", planes).convert("RGB")


def test_a_sequential_file_without_one_of_its_scans_is_truncated() -> None:
    pieces, image = in_three_scans()
    whole = b"".join([*pieces, EOI])
    assert np.abs(jpeg.decode_jpeg(whole).astype(int) - np.asarray(image)).max() <= 1
    assert statuses(whole) == dict.fromkeys(ROUTES, "ok")
    for count in (2, 3):
        for end in (EOI, b""):
            cut = b"".join([*pieces[:count], end])
            assert statuses(cut) == dict.fromkeys(ROUTES, "truncated")


@pytest.mark.parametrize("name", ["torchvision baseline", "dct baseline", "dct progressive"])
def test_corrupt_image_data_are_unreadable_on_every_route(name: str) -> None:
    whole = FILES[name]
    middle = (scan_start(whole) + len(whole)) // 2
    inserted = np.random.default_rng(0).integers(0, 255, 400, np.uint8).tobytes()
    data = whole[:middle] + inserted + whole[middle:]
    assert statuses(data) == dict.fromkeys(ROUTES, "unreadable")
    with pytest.raises(ImageError, match="the JPEG image data are corrupt: "):
        decode.decode_image(data, SPEC)


def unknown_jfif(data: bytes) -> bytes:
    at = data.index(b"JFIF") + 5
    return data[:at] + b"\x03" + data[at + 1 :]


def wrong_selection(data: bytes) -> bytes:
    at = scan_start(data) - 2
    return data[:at] + b"\x00" + data[at + 1 :]


def broken_profile(data: bytes) -> bytes:
    body = b"ICC_PROFILE\0\x09\x01" + bytes(20)
    return data[:2] + b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body + data[2:]


@pytest.mark.parametrize("change", [unknown_jfif, wrong_selection, broken_profile])
def test_what_libjpeg_warns_of_outside_the_image_data_hides_and_causes_no_error(
    change: Callable[[bytes], bytes],
) -> None:
    whole = FILES["torchvision baseline"]
    assert (jpeg.decode_jpeg(change(whole)) == jpeg.decode_jpeg(whole)).all()
    assert statuses(change(whole)) == dict.fromkeys(ROUTES, "ok")
    for cut in (whole[: len(whole) // 2] + EOI, whole[: len(whole) // 2]):
        assert statuses(change(cut)) == dict.fromkeys(ROUTES, "truncated")


def test_a_few_bytes_before_the_end_marker_are_no_damage() -> None:
    whole = FILES["torchvision restart"]  # after a restart libjpeg counts them exactly
    few, many = whole[:-2] + b"ab" + EOI, whole[:-2] + b"abcdefgh" * 4 + EOI
    assert (jpeg.decode_jpeg(few) == jpeg.decode_jpeg(whole)).all()
    assert statuses(few) == dict.fromkeys(ROUTES, "ok")
    assert statuses(many) == dict.fromkeys(ROUTES, "unreadable")


@pytest.mark.parametrize("kind", ["restart", "gray restart"])
def test_bytes_before_restart_markers_are_no_damage_and_hide_none(kind: str) -> None:
    image = noisy(150, 110).convert("L" if kind.startswith("gray") else "RGB")
    whole = encoded(image, "JPEG", quality=85, restart_marker_blocks=4)
    start = scan_start(whole)
    padded = whole[:start] + re.sub(rb"(?=\xff[\xd0-\xd7])", b"\x55", whole[start:])
    assert len(padded) > len(whole) + 10
    assert (jpeg.decode_jpeg(padded) == jpeg.decode_jpeg(whole)).all()
    assert statuses(padded) == dict.fromkeys(ROUTES, "ok")
    assert statuses(padded[:-2] + bytes(64)) == dict.fromkeys(ROUTES, "ok")
    last = max(match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", padded))
    for cut in (len(padded) - 3, last + 8, last, len(padded) // 2):
        for end in (EOI, b"", bytes(64)):
            assert statuses(padded[:cut] + end) == dict.fromkeys(ROUTES, "truncated"), (cut, end)
    middle = len(padded) // 2
    other = np.random.default_rng(0).integers(0, 255, 200, np.uint8).tobytes()
    assert set(statuses(padded[:middle] + other + padded[middle:]).values()) <= {
        "unreadable", "truncated",
    }  # fmt: skip


def of_sampling(factors: tuple[int, ...], width: int, height: int) -> bytes:
    """A baseline JPEG of flat blocks of noise, of three components with any sampling factors."""
    pairs = list(zip(factors[0::2], factors[1::2], strict=True))
    across, down = (8 * max(side) for side in zip(*pairs, strict=True))
    units = -(-width // across) * -(-height // down)
    values = np.random.default_rng(0)
    bits, last = "", [0, 0, 0]
    for _ in range(units):
        for component, (horizontal, vertical) in enumerate(pairs):
            for value in values.integers(-60, 60, horizontal * vertical):
                change = int(value) - last[component]
                size = abs(change).bit_length()
                code = change if change >= 0 else change + 2**size - 1
                # all codes of sizes have 4 bits, the end of a block has one
                bits += f"{size:04b}" + (f"{code:0{size}b}" if size else "") + "0"
                last[component] = int(value)
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"".join(
        bytes((component, horizontal << 4 | vertical, 0))
        for component, (horizontal, vertical) in enumerate(pairs, 1)
    )
    segments = {
        b"\xdb": b"\0" + bytes([8] * 64),
        b"\xc0": frame,
        b"\xc4": b"\0\0\0\0\x0c" + bytes(12) + bytes(range(12)) + b"\x10\1" + bytes(15) + b"\0",
        b"\xda": b"\3\1\0\2\0\3\0\0\x3f\0",
    }
    head = b"".join(
        b"\xff" + marker + struct.pack(">H", len(body) + 2) + body
        for marker, body in segments.items()
    )
    return b"\xff\xd8" + head + coded + b"\xff\xd9"


@pytest.mark.parametrize("odd", [(2, 2, 2, 1, 1, 1), (4, 2, 1, 1, 1, 1), (1, 1, 2, 1, 1, 1)])
def test_sampling_factors_that_simplejpeg_refuses_are_decoded_by_pillow(
    odd: tuple[int, ...],
) -> None:
    data = of_sampling(odd, 150, 110)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (jpeg.decode_jpeg(data) == expected).all()
    assert set(statuses(data).values()) == {"ok"}
    assert set(statuses(data[:-2]).values()) == {"ok"}
    for share in (0.4, 0.7, 0.95):
        for end in (b"", b"\xff\xd9"):
            cut = data[: int(len(data) * share)] + end
            assert set(statuses(cut).values()) == {"truncated"}, (share, end)


@pytest.mark.parametrize("name", ["dct gray", "dct 4:4:4"])
def test_sampling_factors_of_zero_are_an_error_on_every_route(name: str) -> None:
    data = bytearray(FILES[name])
    frame = data.index(b"\xff\xc0")
    for component in range(data[frame + 9]):
        data[frame + 11 + 3 * component] = 0
    assert set(statuses(bytes(data)).values()) == {"unreadable"}


def test_a_factor_gives_the_means_of_squares() -> None:
    whole = encoded(noisy(203, 157).convert("L"), "JPEG", quality=95)
    pixels = np.asarray(Image.open(io.BytesIO(whole))).astype(float)
    for factor in (2, 4, 8):
        found = jpeg.decode_jpeg(whole, factor)
        assert found.shape == (-(-157 // factor), -(-203 // factor), 3)
        rows, columns = 157 // factor, 203 // factor
        squares = pixels[: rows * factor, : columns * factor]
        means = squares.reshape(rows, factor, columns, factor).mean((1, 3))
        assert np.abs(found[:rows, :columns, 0] - means).max() < 1.5


@pytest.mark.parametrize("name", FILES)
def test_a_jpeg_without_exif_has_the_pixels_of_the_same_file_with_exif(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FILES[name]
    exif = Image.Exif()
    exif[0x0112] = 1
    body = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    with_exif = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    expected, size = decode.decode_image(with_exif, SPEC)
    with pytest.raises(ImageTooLarge, match=f"{size[0]}x{size[1]} is"):
        decode.decode_image(plain, SPEC, max_pixels=size[0] * size[1] - 1)
    frames = jpeg.read_frame_header(plain), jpeg.read_frame_header(with_exif)
    assert all(frames)
    assert [frame.is_plain for frame in frames if frame] == ["CMYK" not in name, False]
    if "CMYK" not in name:
        monkeypatch.delattr(decode.Image, "open")  # Pillow does not read its header
    pixels, shown = decode.decode_image(plain, SPEC)
    assert shown == size
    np.testing.assert_array_equal(pixels, expected)


def test_the_frame_header_is_read() -> None:
    frame = jpeg.read_frame_header(FILES["torchvision progressive"])
    assert frame == jpeg.FrameHeader(0xC2, 8, (150, 110), {1: (2, 2), 2: (1, 1), 3: (1, 1)}, 3)
    assert frame.has_multiple_scans
    gray = jpeg.read_frame_header(FILES["dct gray"])
    assert gray == jpeg.FrameHeader(0xC0, 8, (507, 381), {1: (1, 1)}, 1)
    assert not gray.has_multiple_scans
    for junk in (b"", b"\xff\xd8", b"\xff\xd8\xff", FILES["dct gray"][:180], bytes(1000)):
        assert jpeg.read_frame_header(junk) is None


@pytest.mark.parametrize(
    ("sampling", "coarser"),
    [
        ({1: (1, 1)}, (1, 1)),
        ({1: (1, 1), 2: (1, 1), 3: (1, 1)}, (1, 1)),
        ({1: (2, 2), 2: (1, 1), 3: (1, 1)}, (1, 1)),
        ({1: (2, 1), 2: (1, 1), 3: (1, 1)}, (2, 1)),
        ({1: (1, 2), 2: (1, 1), 3: (1, 1)}, (1, 2)),
        ({1: (4, 1), 2: (1, 1), 3: (1, 1)}, (4, 1)),
        ({1: (4, 2), 2: (1, 1), 3: (1, 1)}, (2, 1)),
    ],
)
def test_the_color_of_a_reduced_image_is_as_coarse_as_libjpeg_leaves_it(
    sampling: dict[int, tuple[int, int]], coarser: tuple[int, int]
) -> None:
    assert jpeg.FrameHeader(0xC0, 8, (1, 1), sampling, 3).chroma_spans == coarser


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "baseline"])
def test_exact_is_pillows_decode_and_fast_is_near_it(kind: str, interpolation: Any) -> None:
    data = encoded(noisy(*SIZES["dct"], grain=4), "JPEG", quality=90, **KINDS[kind])
    spec = SPEC.model_copy(update={"interpolation": interpolation})
    expected = reference(Image.open(io.BytesIO(data)), spec)
    exact = decode.decode_image(data, spec.model_copy(update={"decode": "exact"}))[0]
    fast = decode.decode_image(data, spec)[0]
    assert difference(exact, expected) < 0.02
    exactly = spec.model_copy(update={"decode": "exact"})
    pixels, _ = device_decode.prepare_file(data, exactly)  # nvJPEG would decode to others
    assert (pixels == exact).all()
    assert 0.02 < difference(fast, expected) < 0.4


@pytest.mark.shared
def test_photographs_keep_their_status_and_pixels_when_the_end_marker_is_lost(shared: Path) -> None:
    folder = shared / "data" / "imagenet-sample"
    with (folder / "manifest.csv").open(encoding="utf-8") as stream:
        paths = [folder / row["path"] for row in csv.DictReader(stream)]
    paths += sorted((shared / "data" / "cats-dogs" / "test").glob("*/*.jpg"))[::10]
    for path in paths[::8]:
        data = path.read_bytes()
        pixels = np.asarray(Image.open(path).convert("RGB"))
        end = data.rindex(EOI)
        for sound in (data, data[:end], data[:end] + bytes(64), data[:end] + bytes(99) + EOI):
            assert (jpeg.decode_jpeg(sound) == pixels).all(), path
        for few in (1, 8, 500):
            for padding in (b"", EOI, bytes(64), bytes(4096) + EOI):
                with pytest.raises(TruncatedImage):
                    jpeg.verify_jpeg(data[: end - few] + padding)
