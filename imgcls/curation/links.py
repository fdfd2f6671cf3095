"""Files of a folder on a local disk that are linked into several class folders.

Symbolic and hard links to one file are found by its device and inode number.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from imgcls.data.formats import is_hidden_name
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import create_thread_pool

_CHUNK = 10_000


@dataclass(frozen=True)
class _File:
    """What a path leads to.

    key:        device and inode number of the file
    is_symlink: whether the path is a symbolic link
    has_others: whether the file may have other paths
    """

    key: tuple[int, int]
    is_symlink: bool
    has_others: bool


def _identify(path: str) -> _File | None:
    """None for a file that is gone, and for a link without a target."""
    local = filesystem.local_path(path)
    try:
        found = os.lstat(local)
        is_symlink = stat.S_ISLNK(found.st_mode)
        if is_symlink:
            found = os.stat(local)
    except OSError:
        return None
    return _File((found.st_dev, found.st_ino), is_symlink, is_symlink or found.st_nlink > 1)


def _identify_all(paths: Sequence[str], concurrency: int) -> Iterator[_File | None]:
    with create_thread_pool(concurrency, "links") as pool:
        for start in range(0, len(paths), _CHUNK):
            yield from pool.map(_identify, paths[start : start + _CHUNK])


def count_linked_files(batches: Iterable[pa.RecordBatch], source: str, concurrency: int) -> int:
    """Files that are linked into more than one class folder.

    batches: rows of a listing with the columns path and label
    source:  the folder of the class folders
    """
    root = os.path.realpath(filesystem.local_path(source))
    labels: dict[tuple[int, int], set[str]] = {}
    for batch in batches:
        paths = batch.column("path").to_pylist()
        found = _identify_all(paths, concurrency)
        for path, label, file in zip(paths, batch.column("label").to_pylist(), found, strict=True):
            if file is None or not file.has_others:
                continue
            own = labels.setdefault(file.key, set())
            own.add(label)
            if file.is_symlink and (folder := _find_class_folder(path, root)) is not None:
                own.add(folder)
    return sum(len(own) > 1 for own in labels.values())


def _find_class_folder(path: str, root: str) -> str | None:
    """The class folder of the target of a symbolic link; None if it is not in one."""
    target = os.path.relpath(os.path.realpath(filesystem.local_path(path)), root)
    names = target.split(os.sep)
    if len(names) < 2 or any(is_hidden_name(name) for name in names):
        return None
    return names[0]


def merge_linked_rows(rows: pa.Table, concurrency: int) -> pa.Table:
    """One row per file, in the order of the paths, with a list of labels.

    rows: of a listing, with the columns path and label
    The path is that of the file itself, if it is listed, else the first one in the order of the
    paths; the same for hard links. Labels are in alphabetical order.
    """
    rows = rows.sort_by("path")
    found = list(_identify_all(rows.column("path").to_pylist(), concurrency))
    # a file that is gone has no key of its own: it stays a row
    keys = [(-1, row) if file is None else file.key for row, file in enumerate(found)]
    numbers: dict[tuple[int, int], int] = {}
    group = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    is_symlink = np.array([file is not None and file.is_symlink for file in found], bool)
    order = np.lexsort((np.arange(len(group)), is_symlink, group))
    chosen = order[np.searchsorted(group[order], np.arange(len(numbers)))]
    labels: list[set[str]] = [set() for _ in numbers]
    for number, label in zip(group.tolist(), rows.column("label").to_pylist(), strict=True):
        labels[number].add(label)
    in_order = np.argsort(chosen)
    lists = pa.array([sorted(labels[number]) for number in in_order], pa.list_(pa.string()))
    merged = rows.take(pa.array(chosen[in_order]))
    return merged.set_column(merged.schema.get_field_index("label"), "label", lists)
