"""Search of a folder for outputs of imgcls, several levels deep; no file is read.

Each folder is listed by itself, several at a time, so that the tables and images of an output are
never listed. Hidden folders, and those inside of an output, are skipped.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field

from imgcls.data.formats import LISTING_FILE
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import RequestError, StorageError, StorageMissing
from imgcls.formatting import format_count
from imgcls.models.bundle import BUNDLE_FILE
from imgcls.runs import layout
from imgcls.training.search_space import SEARCH_FILE, TRIALS_FOLDER

READ_THREADS = 16
MARKERS = (
    layout.RUN_FILE,
    layout.SUCCESS_FILE,
    BUNDLE_FILE,
    SEARCH_FILE,
    layout.SELECTION_FILE,
    layout.SUMMARY_FILE,
)
"""Files by which an output is recognized."""
_FETCH_FOLDER = "_fetch"
_MAX_PAGES = 20
"""Pages of 1,000 names that are listed of one folder."""
_MAX_FOLDERS = 50_000
_INNER_FOLDERS = (layout.PREDICTIONS_FOLDER, layout.METRICS_FOLDER, "plots", TRIALS_FOLDER)
"""Folders of an output that hold no other output."""


@dataclass(frozen=True)
class FoundFolder:
    """A folder with its direct content.

    path:    relative to the folder that was searched; "." for itself
    files:   names of its files, with the time of their last change where the store has one
    folders: names of its folders
    sizes:   bytes of its files, where the store has them
    """

    url: str
    path: str
    files: dict[str, datetime.datetime | None]
    folders: frozenset[str]
    sizes: dict[str, int | None] = field(default_factory=dict)

    @property
    def is_output(self) -> bool:
        """Whether a file of an output lies in it, or an unfinished training."""
        if layout.CHECKPOINT_FOLDER in self.folders:
            return True
        found = set(MARKERS) & self.files.keys()
        if found == {layout.SUCCESS_FILE}:  # of a listing or of fetched images
            return LISTING_FILE not in self.files and _FETCH_FOLDER not in self.folders
        return bool(found)


@dataclass
class FoundOutputs:
    """The result of a search.

    outputs: folders of outputs, in order of their paths
    links:   local links to a folder below the one that was searched: path of each, and its target
    notes:   what was not searched
    """

    outputs: list[FoundFolder] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_outputs(url: str, depth: int) -> FoundOutputs:
    """Find the outputs in a folder and at most `depth` levels below it.

    Raises RequestError when there is no such folder, StorageError when it cannot be listed.
    """
    if filesystem.is_local(url) and os.path.isfile(filesystem.local_path(url)):
        raise RequestError(f"folder {url}: is a file; pass a folder of outputs of imgcls")
    found = FoundOutputs()
    root, listed = url, 0
    with create_thread_pool(READ_THREADS, "list") as pool:
        level = [(url, ".")]
        for left in range(depth, -1, -1):
            answers = list(pool.map(_list_folder, *zip(*level, strict=True)))
            if not listed:
                _check_exists(answers[0][0])
            listed += len(answers)
            below: list[tuple[str, str]] = []
            for answer, note in answers:
                if note is not None:
                    found.notes.append(note)
                if answer.is_output:
                    found.outputs.append(answer)
                below += _list_inner(root, answer, found)
            if below and (not left or listed + len(below) > _MAX_FOLDERS):
                limit = "--depth" if not left else f"the limit of {_MAX_FOLDERS:,}"
                found.notes.append(
                    f"{format_count(len(below), 'folder')} below {limit} not searched, such as "
                    f"{below[0][1]}"
                )
                break
            if not below:
                break
            level = below
    found.outputs.sort(key=lambda each: each.path)
    return found


def _check_exists(folder: FoundFolder) -> None:
    """Raise RequestError for an empty folder of a store, which has no folders of its own."""
    if not filesystem.is_local(folder.url) and not folder.files and not folder.folders:
        raise RequestError(
            f"folder {folder.url}: does not exist; pass a folder of outputs of imgcls"
        )


def _list_inner(root: str, folder: FoundFolder, found: FoundOutputs) -> list[tuple[str, str]]:
    """The folders to search below a folder; links into the searched folder are noted instead."""
    inner = []
    for name in sorted(folder.folders):
        is_inner = folder.is_output and name in _INNER_FOLDERS
        if name.startswith("_") or is_inner:
            continue
        url = filesystem.join(folder.url, name)
        path = name if folder.path == "." else f"{folder.path}/{name}"
        if filesystem.is_local(url) and os.path.islink(url):
            target = os.path.realpath(url)
            if target == os.path.realpath(root) or target.startswith(os.path.realpath(root) + "/"):
                found.links[path] = target
                continue
        inner.append((url, path))
    return inner


def _list_folder(url: str, path: str) -> tuple[FoundFolder, str | None]:
    """A folder, and a note when not all of it was listed."""
    files: dict[str, datetime.datetime | None] = {}
    sizes: dict[str, int | None] = {}
    folders: set[str] = set()
    note = None
    try:
        for number, page in enumerate(filesystem.iter_pages(url, deep=False)):
            if number == _MAX_PAGES:
                note = f"{path}: has more than {len(files) + len(folders):,} names; not all listed"
                break
            folders.update(each.rstrip("/").rpartition("/")[2] for each in page.folders)
            files.update((each.path.rpartition("/")[2], each.mtime) for each in page.files)
            sizes.update((each.path.rpartition("/")[2], each.size) for each in page.files)
    except StorageError as error:
        if path == ".":
            if isinstance(error, StorageMissing):
                raise RequestError(
                    f"folder {url}: does not exist; pass a folder of outputs of imgcls"
                ) from error
            raise
        note = f"{path}: cannot be listed ({error})"
    return FoundFolder(url, path, files, frozenset(folders), sizes), note
