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


def search_index(
    folder: str, run: CommittedRun, queries: Floats, k: int
) -> tuple[Floats, Indices, Indices]:
    """As `similar.find_nearest`, from the index in `folder`, which is built there if it is missing.

    Raises RequestError if usearch is not installed, the folder is on a store or the index is of
    another run, and OutputError if the folder cannot be used.
    """
    if "://" in folder:
        raise RequestError(f"index {folder}: must be a folder of a file system, not of a store")
    path = Path(folder)
    usearch = import_package("usearch.index", "Index", "index", "index")
    try:
        if not (path / _RUN_FILE).exists():
            _build(path, run, usearch)
        _check_run(path, run)
        index = usearch.Index.restore(str(path / _INDEX_FILE), view=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(
            f"index {folder}: cannot be used ({one_line(error)}); pass a folder that can be "
            "written, or delete it, so that the index is built again"
        ) from error
    found = min(k, len(index))
    if not found:
        return np.empty((len(queries), 0), np.float32), *np.empty((2, len(queries), 0), np.int64)
    index.expansion_search = max(_MIN_SEARCHED, _MORE * found)
    matches = index.search(queries, found)
    keys, distances = (np.reshape(each, (-1, found)) for each in (matches.keys, matches.distances))
    # equal similarities in row order
    order = np.lexsort((keys, distances), axis=1)
    keys, distances = (np.take_along_axis(each, order, axis=1) for each in (keys, distances))
    keys = keys.astype(np.int64)
    return 1 - distances, keys >> _POSITION_BITS, keys & ((1 << _POSITION_BITS) - 1)


def _describe(run: CommittedRun) -> dict[str, Any]:
    return {name: run.success_record[name] for name in ("run_id", "committed", "files")}


def _check_run(path: Path, run: CommittedRun) -> None:
    found = json.loads((path / _RUN_FILE).read_text())
    if found != _describe(run):
        raise RequestError(
            f"index {path}: is of another run than {run.url}; pass another folder, or delete it, "
            "so that the index is built again"
        )


def _build(path: Path, run: CommittedRun, usearch: Any) -> None:
    """Write the index under another name, and rename it; of two at once, one is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width = run.schema.field("embedding").type.list_size
    index = usearch.Index(ndim=width, metric="cos", dtype="f16")
    log.emit("index", f"building the index {path}: {format_count(run.rows, 'row')}", rows=run.rows)
    for number, start, rows, vectors in iter_unit_embeddings(run):
        index.add((number << _POSITION_BITS) + start + rows, vectors)
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
