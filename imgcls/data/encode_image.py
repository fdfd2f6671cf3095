"""Encode images: JPEG bytes, and data URIs for HTML pages."""

from __future__ import annotations

import base64
import io

from PIL import Image


def encode_jpeg(image: Image.Image, quality: int = 80) -> bytes:
    """An RGB or gray image as the bytes of a JPEG file."""
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def encode_data_uri(image: Image.Image, quality: int = 80) -> str:
    """An RGB or gray image as the data URI of a JPEG."""
    return build_data_uri(encode_jpeg(image, quality), "image/jpeg")


def build_data_uri(data: bytes, media_type: str) -> str:
    """The bytes of a file as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
