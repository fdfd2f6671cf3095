"""Check that a table to write does not become a part of a manifest that is read."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence

from imgcls.data.manifests.manifest import Manifest
from imgcls.data.storage import filesystem
from imgcls.errors import OutputError

_GLOB = re.compile(r"[*?\[]")


def check_not_read_again(output: str, manifest: Manifest) -> None:
    """Raise OutputError where a manifest of several files has, or will have, a file among them.

    output: the file to write, as the user named it
    """
    if _is_among(filesystem.absolute(output), resolve_links(output), manifest):
        raise OutputError(
            f"output {output}: is among the files of the manifest {manifest.source}, which would "
            "have its rows twice; pass an --output in another folder"
        )


def resolve_links(url: str) -> str:
    """An absolute path without symbolic links; a URL is returned unchanged."""
    absolute = filesystem.absolute(url)
    return os.path.realpath(absolute) if filesystem.is_local(url) else absolute


def _is_among(output: str, target: str, manifest: Manifest) -> bool:
    """Whether a manifest has a file; target: the output without symbolic links."""
    source = manifest.source
    files = [resolve_links(file) for file in manifest.files]
    folder, _, name = target.rpartition("/")
    if filesystem.is_folder(source):
        own = resolve_links(source).rstrip("/")
        # of folders below, tables are read only where the folder itself has none
        is_partitioned = bool(files) and own not in {filesystem.parent(file) for file in files}
        return folder == own or (is_partitioned and target.startswith(f"{own}/"))
    if len(files) > 1 and target in files:
        return True
    if filesystem.exists(source) or not _GLOB.search(source):
        return False
    is_named = fnmatch.fnmatchcase(name, source.rpartition("/")[2])
    if is_named and folder in {file.rpartition("/")[0] for file in files}:
        return True
    pattern = filesystem.absolute(source).split("/")
    at = next(at for at, part in enumerate(pattern) if _GLOB.search(part))
    start = resolve_links("/".join(pattern[:at]) or "/").rstrip("/")
    return _is_matched(target.split("/"), [*start.split("/"), *pattern[at:]]) or _is_matched(
        output.split("/"), pattern
    )


def _is_matched(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the names of a path match a glob; `**` is any number of folders."""
    if not pattern or not parts:
        return not parts and all(each == "**" for each in pattern)
    if pattern[0] == "**":
        return _is_matched(parts, pattern[1:]) or _is_matched(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _is_matched(parts[1:], pattern[1:])
