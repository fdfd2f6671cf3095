"""Record of a listing: the folder of which a manifest lists all images, and when it was listed."""

from __future__ import annotations

import json
from typing import Any

from imgcls.data.formats import LISTING_DONE_FILE, LISTING_FILE
from imgcls.data.manifests.manifest import Manifest
from imgcls.data.storage import filesystem


def find_listed_folder(manifest: Manifest) -> str | None:
    """The folder of which a manifest lists all images; None if it may list only some."""
    if not manifest.files:  # a folder of images, or a pattern
        folder = filesystem.absolute(manifest.source).rstrip("/")
        return folder if manifest.root.rstrip("/") == folder else None
    record = _read_record(manifest)
    return str(record["source"]) if "source" in record else None


def read_listing_time(manifest: Manifest) -> str | None:
    """When `manifest build` ended (ISO 8601); None for a table from elsewhere.

    Two listings with the same rows differ in it.
    """
    return _read_record(manifest).get("listed") if manifest.files else None


def _read_record(manifest: Manifest) -> dict[str, Any]:
    folder = filesystem.parent(manifest.files[0])
    if filesystem.absolute(manifest.source) != folder:
        return {}
    if not {LISTING_FILE, LISTING_DONE_FILE} <= set(filesystem.list_names(folder)):
        return {}
    try:
        body = json.loads(filesystem.read(filesystem.join(folder, LISTING_DONE_FILE)))
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
