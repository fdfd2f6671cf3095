"""Embeddings of a committed run: all of them, or those of images at given paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls.data.manifests.image_urls import normalize_urls, resolve_urls
from imgcls.data.storage import filesystem
from imgcls.errors import OK
from imgcls.models.embeddings import normalize_embeddings
from imgcls.runs.committed import CommittedRun, iter_tables

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
_BATCH_ROWS = 16_384
_MIN_LENGTH = 1e-12
_MIN_SAMPLED_GROUPS, _ROWS_PER_SAMPLED_GROUP = 8, 128
"""A sample of a large run reads a row group for this number of rows, and at least some groups."""
_PATH_ROWS = 1_000_000
"""Rows of the run whose paths are found at a time: each time all paths are hashed."""


def gather_embeddings(
    run: CommittedRun, urls: pa.ChunkedArray
) -> tuple[Floats, Indices, dict[int, str]]:
    """The embeddings of the images at N URLs, which may be null or repeated.

    Returns (U, E) float32, one per different URL; (N,) int64, the index in it of each of the N,
    negative for one without an embedding; and by the position of these, in order, the reason.
    """
    encoded = normalize_urls(urls).combine_chunks().dictionary_encode()
    names = encoded.dictionary
    places, statuses = _find_paths(run, names)
    vectors = np.zeros((len(names), run.schema.field("embedding").type.list_size), np.float32)
    has_vector = np.zeros(len(names), bool)
    first = 0
    for table in iter_tables(run, ["embedding"], _BATCH_ROWS):
        place = places[first : first + table.num_rows]
        column = table["embedding"].combine_chunks()
        has_value = column.is_valid().to_numpy(zero_copy_only=False)
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, vectors.shape[1])
        wanted = place[has_value] >= 0
        # a path in several rows is one image, which has one embedding
        target = place[has_value][wanted]
        vectors[target] = values[wanted]
        has_vector[target] = True
        first += table.num_rows
    index = encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False).copy()
    is_found = index >= 0
    is_found[is_found] = has_vector[index[is_found]]
    lacking = np.flatnonzero(~is_found)
    reasons = {int(row): _explain(statuses, int(index[row])) for row in lacking}
    index[lacking] = -1
    return vectors, index, reasons


def _find_paths(run: CommittedRun, urls: pa.Array) -> tuple[Indices, list[str | None]]:
    """Where the rows of a run are among `urls`, and the status of each of these.

    Returns (rows of the run,) int64, negative for other paths; and a status by index in `urls`,
    None for those that are not in the run.
    """
    places = [np.empty(0, np.int64)]
    statuses = np.full(len(urls), None, object)
    for table in iter_tables(run, [run.path_column, "status"], _PATH_ROWS):
        paths = resolve_urls(table[run.path_column], run.root)
        found = pc.index_in(paths, value_set=urls).combine_chunks().cast(pa.int64()).fill_null(-1)
        place = found.to_numpy(zero_copy_only=False)
        status = table["status"].cast(pa.string()).to_numpy(zero_copy_only=False)
        statuses[place[place >= 0]] = status[place >= 0]
        places.append(place)
    return np.concatenate(places), statuses.tolist()


def _explain(statuses: list[str | None], place: int) -> str:
    """Why an image has no embedding."""
    if place < 0:
        return "has no path"
    status = statuses[place]
    if status is None:
        return "is not in the run"
    return "has no embedding, beyond the range of float16" if status == OK else status


def iter_unit_embeddings(
    run: CommittedRun,
) -> Iterator[tuple[int, int, Indices, Floats]]:
    """Batches of embeddings: index of the file, first position in it, offsets, (N, E) vectors.

    The vectors have length 1; rows without an embedding, or with one of length 0, are left out.
    """
    for number, url in enumerate(run.files):
        start = 0
        with filesystem.open_read(url) as stream:
            file = pq.ParquetFile(stream)
            for batch in file.iter_batches(_BATCH_ROWS, columns=["embedding"]):
                column = batch.column("embedding")
                rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
                flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
                vectors = flat.reshape(len(rows), -1) if len(rows) else flat.reshape(0, 1)
                is_kept = np.linalg.norm(vectors, axis=1) > _MIN_LENGTH
                if is_kept.any():
                    yield number, start, rows[is_kept], normalize_embeddings(vectors[is_kept])
                start += batch.num_rows


def sample_embeddings(files: Sequence[str], max_rows: int) -> Floats:
    """(N, E) float32 embeddings of evenly spaced rows that have one, N at most `max_rows`.

    files: parts of a run with embeddings
    Of a large run, a part of the row groups is read.
    """
    groups = []
    for url in files:
        with filesystem.open_read(url) as stream:
            metadata = pq.read_metadata(stream)
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        groups += [(url, number, rows) for number, rows in enumerate(counts) if rows]
    if sum(rows for *_, rows in groups) > max_rows:
        most = max(_MIN_SAMPLED_GROUPS, max_rows // _ROWS_PER_SAMPLED_GROUP)
        groups = groups[:: -(-len(groups) // most)]
    total = sum(rows for *_, rows in groups)
    every = max(1, -(-total // max_rows))
    parts, seen = [], 0
    for url, number, _ in groups:
        with filesystem.open_read(url) as stream:
            column = pq.ParquetFile(stream).read_row_group(number, ["embedding"])["embedding"]
        kept = column.combine_chunks()
        vectors = kept.flatten().to_numpy(zero_copy_only=False).reshape(-1, kept.type.list_size)
        parts.append(vectors[-seen % every :: every].astype(np.float32))
        seen += len(vectors)
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
