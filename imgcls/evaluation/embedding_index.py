"""Approximate index of a run's embeddings, by usearch, if it is installed.

A folder holds the index (a graph of nearest neighbors, HNSW; Malkov and Yashunin 2018) and the run
that it was built of. A search reads a small part of it, and may miss a row that the exact search
finds. Embeddings are kept in float16, so that similarities differ by about 0.001.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imgcls import log
from imgcls.data.optional_packages import import_package
from imgcls.errors import OutputError, RequestError, one_line
from imgcls.formatting import format_count
from imgcls.runs.committed import CommittedRun
from imgcls.runs.embeddings import iter_unit_embeddings

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
_INDEX_FILE, _RUN_FILE = "embeddings.usearch", "run.json"
_POSITION_BITS = 40
"""Of a key of the index, for the position in a file; those above it are for the file."""
_MIN_SEARCHED = 256
_MORE = 4
"""Rows that a search keeps while it walks the graph (usearch's `expansion_search`): at least
_MIN_SEARCHED, and _MORE for each that is returned."""


def open_index(folder: str, run: CommittedRun) -> Any:
    """The index of a run in `folder`, which is built there if it is missing.

    Raises RequestError if usearch is not installed, the folder is on a store or the index is of
    another run, and OutputError if the folder cannot be used.
    """
    if "://" in folder:
        raise RequestError(f"index {folder}: must be a folder of a file system, not of a store")
    path = Path(folder)
    usearch = import_package("usearch.index", "Index", "index", "index")
    place = f"index {folder}"
    if not (path / _RUN_FILE).exists():
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise _explain_damage(place, "has other files, and no index")
        built = _build(place, run, usearch)
        try:
            _write(path, built, run)
        except OSError as error:
            raise OutputError(f"{place}: cannot be written ({one_line(error)})") from error
    try:
        found = json.loads((path / _RUN_FILE).read_text())
        index = usearch.Index.restore(str(path / _INDEX_FILE), view=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise _explain_damage(place, error) from error
    if index is None:
        raise _explain_damage(place, "no index file")
    if found != _describe(run):
        raise RequestError(
            f"{place}: is of another run than {run.url}; pass another folder, or delete it, so "
            "that the index is built again"
        )
    return index


def search_index(index: Any, queries: Floats, k: int) -> tuple[Floats, Indices, Indices] | None:
    """As `similar.find_nearest`, from an index; None if it finds fewer rows than it has.

    That happens with many equal embeddings, which are each other's neighbors in the graph, or with
    a `k` near the number of rows. It can differ from build to build: several threads build.
    """
    found = min(k, len(index))
    if not found:
        return np.empty((len(queries), 0), np.float32), *np.empty((2, len(queries), 0), np.int64)
    index.expansion_search = max(_MIN_SEARCHED, _MORE * found)
    matches = [index.search(query, found) for query in queries]
    if any(len(each.keys) < found for each in matches):
        return None
    keys = np.stack([each.keys for each in matches]).astype(np.int64)
    distances = np.stack([each.distances for each in matches])
    # equal similarities in row order
    order = np.lexsort((keys, distances), axis=1)
    keys, distances = (np.take_along_axis(each, order, axis=1) for each in (keys, distances))
    return 1 - distances, keys >> _POSITION_BITS, keys & ((1 << _POSITION_BITS) - 1)


def _explain_damage(place: str, error: str | Exception) -> OutputError:
    return OutputError(
        f"{place}: cannot be used ({one_line(error)}); pass another folder, or delete it, so that "
        "the index is built again"
    )


def _describe(run: CommittedRun) -> dict[str, Any]:
    return {name: run.success_record[name] for name in ("run_id", "committed", "files")}


def _build(place: str, run: CommittedRun, usearch: Any) -> Any:
    width = run.schema.field("embedding").type.list_size
    index = usearch.Index(ndim=width, metric="cos", dtype="f16")
    log.emit("index", f"building the {place}: {format_count(run.rows, 'row')}", rows=run.rows)
    for number, start, rows, vectors in iter_unit_embeddings(run):
        index.add((number << _POSITION_BITS) + start + rows, vectors)
    return index


def _write(path: Path, index: Any, run: CommittedRun) -> None:
    """Write under another name, and rename it; of two at once, one is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        index.save(str(draft / _INDEX_FILE))
        (draft / _RUN_FILE).write_text(json.dumps(_describe(run)))
        draft.chmod(0o755)
        try:
            os.rename(draft, path)
        except OSError:
            if not (path / _RUN_FILE).exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
