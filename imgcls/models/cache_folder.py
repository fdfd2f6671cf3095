"""Folder of what is kept on this machine from one command to the next, as downloaded models."""

from __future__ import annotations

import os

from imgcls.errors import RequestError


def find_cache_folder(kind: str) -> str:
    """A subfolder of IMGCLS_CACHE, by default of ~/.cache/imgcls; it may not exist yet.

    kind: name of the subfolder
    Raises RequestError for a user without a home folder, as in some containers.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.environ.get("IMGCLS_CACHE") and home.startswith("~"):
        raise RequestError("cache: this user has no home folder; set IMGCLS_CACHE to a folder")
    return os.path.join(os.environ.get("IMGCLS_CACHE") or os.path.join(home, "imgcls"), kind)
