"""Which file names are taken for images; kept apart so that listing needs no torch."""

from __future__ import annotations

import os

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))


def is_image_name(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS
