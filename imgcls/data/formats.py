"""What file names mean; kept apart so that listing needs no torch."""

from __future__ import annotations

import os

LISTING, LISTED = "_listing.json", "_SUCCESS"
"""Files beside a manifest that `imgcls manifest build` writes: what it lists, and that it ended."""

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))


def is_image_name(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


SYSTEM_FOLDERS = frozenset((
    "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "lost+found", "__macosx",
    "$recycle.bin", "system volume information",
))  # fmt: skip
"""Folders that file systems, NAS devices and archives make themselves, in lower case."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder name is hidden, or one that no user made."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS
