"""Check that a table to write does not become a part of a manifest that is read."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence, Set

from imgcls.data.manifests.manifest import Manifest
from imgcls.data.storage import filesystem
from imgcls.errors import OutputError

_GLOB = re.compile(r"[*?\[]")


def check_not_read_again(outputs: Iterable[str], manifest: Manifest) -> None:
    """Raise OutputError where a manifest of several files has, or will have, a file among them.

    outputs: the files to write, as the user named them
    """
    source = manifest.source
    near = [output for output in outputs if _get_scheme(output) == _get_scheme(source)]
    if not near:
        return
    for output in filter(_build_check(manifest), near):
        if not manifest.files:
            raise OutputError(
                f"output {output}: is in the folder of images {source}, which would be read as a "
                "table from then on; pass an --output in another folder"
            )
        raise OutputError(
            f"output {output}: is among the files of the manifest {source}, which would "
            "have its rows twice; pass an --output in another folder"
        )


def _get_scheme(url: str) -> str:
    return "" if filesystem.is_local(url) else url.partition("://")[0]


def _build_check(manifest: Manifest) -> Callable[[str], bool]:
    """The function that finds whether a manifest has a file, named as the user did."""
    source = manifest.source
    files = [filesystem.resolve_links(file) for file in manifest.files]
    folders = {filesystem.parent(file) for file in files}
    if filesystem.is_folder(source):
        own = filesystem.resolve_links(source).rstrip("/")
        # of folders below, tables are read only where the folder itself has none
        is_partitioned = bool(files) and own not in folders
        return lambda output: (
            filesystem.parent(target := filesystem.resolve_links(output)) == own
            or (is_partitioned and target.startswith(f"{own}/"))
        )
    is_glob = bool(_GLOB.search(source)) and not filesystem.exists(source)
    return lambda output: (
        (len(files) > 1 and filesystem.resolve_links(output) in files)
        or (is_glob and _is_in_glob(output, source, folders))
    )


def _is_in_glob(output: str, source: str, folders: Set[str]) -> bool:
    """Whether a glob names a file; folders: those of the files that it names now."""
    folder, _, name = filesystem.resolve_links(output).rpartition("/")
    if fnmatch.fnmatchcase(name, source.rpartition("/")[2]) and folder in folders:
        return True
    pattern = filesystem.absolute(source).split("/")
    at = next(at for at, part in enumerate(pattern) if _GLOB.search(part))
    start = filesystem.resolve_links("/".join(pattern[:at]) or "/").rstrip("/")
    return _is_matched(
        [*folder.split("/"), name], [*start.split("/"), *pattern[at:]]
    ) or _is_matched(filesystem.absolute(output).split("/"), pattern)


def _is_matched(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the names of a path match a glob; `**` is any number of folders."""
    if not pattern or not parts:
        return not parts and all(each == "**" for each in pattern)
    if pattern[0] == "**":
        return _is_matched(parts, pattern[1:]) or _is_matched(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _is_matched(parts[1:], pattern[1:])
