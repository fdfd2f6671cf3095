"""The table of formats: each file is recognized by its bytes and by its name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from imgcls.data import formats
from imgcls.data.formats import has_image_suffix, identify_format, identify_unsupported_format


@pytest.mark.parametrize(
    "name",
    [
        *("a.jpg", "a.JPEG", "a.jpe", "a.jfif", "a.mpo", "a.png", "a.apng", "a.webp", "a.gif"),
        *("a.bmp", "a.dib", "a.tif", "a.tiff", "a.avif", "a.heic", "a.heif", "a.jp2", "a.j2k"),
        *("a.ppm", "a.pgm", "a.pbm", "a.ico", "a.tga", "a.jxl", "s3://bucket/x/b.jfif"),
    ],
)
def test_the_suffixes_of_all_formats_are_images(name: str) -> None:
    assert has_image_suffix(name)


@pytest.mark.parametrize("name", ["a.csv", "a", "jpg", "a.txt", "a.json", "a.parquet", "a.mp4"])
def test_other_suffixes_are_not_images(name: str) -> None:
    assert not has_image_suffix(name)


def test_no_suffix_and_no_pillow_name_belongs_to_two_formats() -> None:
    suffixes = [suffix for entry in formats.IMAGE_FORMATS for suffix in entry.suffixes]
    names = [name for entry in formats.IMAGE_FORMATS for name in entry.pillow_names]
    assert len(set(suffixes)) == len(suffixes)
    assert len(set(names)) == len(names)
    assert set(suffixes) == formats.IMAGE_SUFFIXES


def _box(brand: bytes, *compatible: bytes) -> bytes:
    body = b"ftyp" + brand + bytes(4) + b"".join(compatible)
    return (len(body) + 4).to_bytes(4, "big") + body


def _tga(kind: int, depth: int, *, mapped: int = 0) -> bytes:
    head = bytearray(18)
    head[1:3] = mapped, kind
    if mapped:
        head[5:8] = 0, 1, 24
    head[12:18] = 4, 0, 4, 0, depth, 0x20
    return bytes(head)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\xff\xd8\xff\xe0", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF89a", "GIF"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "WebP"), (b"BM" + bytes(16), "BMP"),
        (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"),
        (_box(b"avif"), "AVIF"), (_box(b"mif1", b"mif1", b"avif"), "AVIF"),
        (_box(b"heic"), "HEIC"), (_box(b"mif1", b"mif1", b"heic"), "HEIC"), (_box(b"hevc"), "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"P6\n1 1\n255\n", "PPM"), (b"P1 1 1 0", "PPM"), (b"\0\0\1\0\1\0\x10\x10\0\0", "ICO"),
        (_tga(2, 24), "TGA"), (_tga(10, 32), "TGA"), (_tga(3, 8), "TGA"),
        (_tga(1, 8, mapped=1), "TGA"), (b"\xff\x0a\0\0", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    ],
)  # fmt: skip
def test_a_format_is_recognized_by_its_first_bytes(data: bytes, name: str) -> None:
    found = identify_format(data)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "data",
    [
        b"", b"P8\n", b"<html>", b"{}", bytes(64), b"\xff\xd8", _box(b"mp42"), _box(b"qt  "),
        _tga(2, 8), _tga(7, 24), _tga(1, 8), b"text, and more text, of no format at all",
    ],
)  # fmt: skip
def test_other_bytes_are_no_format(data: bytes) -> None:
    assert identify_format(data) is None
    assert identify_unsupported_format(data) is None


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"8BPS\0\1", "Photoshop"), (b"\x76\x2f\x31\x01", "OpenEXR"), (b"%PDF-1.7\n", "PDF"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg width="1">', "SVG"),
        (b"DDS |", "DDS"), (b"icns\0\0", "ICNS"), (b"SIMPLE  =    T", "FITS"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "CR3"),
        (b"FUJIFILMCCD-RAW ", "RAF"), (b"IIRO\x08\0", "ORF"), (b"IIU\0\x18\0", "RW2"),
        (b"II\xbc\1", "JPEG XR"), (b"PF\n1 1\n-1.0\n", "PFM"), (b"P7\nWIDTH 1", "PAM"),
        (b"qoif\0\0", "QOI"), (b"gimp xcf v011", "XCF"), (b"#?RADIANCE\n", "Radiance"),
        (b"%!PS-Adobe-3.0 EPSF", "PostScript"), (b"\0\0\2\0\1\0\x10\x10\0\0", "CUR"),
    ],
)  # fmt: skip
def test_other_image_formats_are_named(data: bytes, name: str) -> None:
    assert identify_format(data) is None
    assert name in (identify_unsupported_format(data) or "")


def test_a_web_page_with_a_drawing_in_it_is_no_drawing() -> None:
    assert (
        identify_unsupported_format(
            b"<!DOCTYPE html><html><body><svg width='1'></svg></body></html>"
        )
        is None
    )


def test_the_table_needs_neither_torch_nor_pillow() -> None:
    code = "import sys, imgcls.data.formats; print({'torch', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
