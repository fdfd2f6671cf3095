"""Images of a run that are similar to given ones, by the embeddings that the run has kept.

Without an index the search is exact: every embedding of the run is compared, by cosine similarity.
One pass reads the embeddings, a second one the other columns of the rows that were found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcls import log
from imgcls.config import requested
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.evaluation.config import SimilarConfig
from imgcls.evaluation.embedding_index import open_index, search_index
from imgcls.evaluation.row_lookup import read_part_rows
from imgcls.models.classifier import Classifier
from imgcls.models.embeddings import normalize_embeddings
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, load_source_bundle, open_run
from imgcls.runs.embeddings import iter_unit_embeddings

Floats = npt.NDArray[np.float32]
_PREDICTED = ("predicted_label", "predicted_labels", "confidence")
"""Columns of the result that a run has by its task; a run of `imgcls embed` has none."""


def find_similar(config: SimilarConfig | None = None, /, **settings: object) -> pa.Table:
    """Find the images of a run that are similar to given ones.

    Parameters
    ----------
    config : SimilarConfig, optional
        The whole request, instead of `settings`.
    **settings
        The keys of `imgcls similar`. `run` and `to` are required.

    Returns
    -------
    pyarrow.Table
        For each image of `to`, its `k` most similar images, best first: `query`, `rank` (from 1),
        `similarity` (cosine of the embeddings, -1 to 1), and the run's `row`, path,
        `predicted_label` and `confidence` (unless it has embeddings alone), or `predicted_labels`
        of a multilabel run. Equal similarities are in row order.

    Raises
    ------
    RequestError
        The run has no embeddings, its bundle is not found, or the index is of another run.
    StorageError, ImageError
        An image of `to` cannot be read or decoded.

    Examples
    --------
    >>> import imgcls
    >>> imgcls.find_similar(run="out", to="cat.jpg", k=3).to_pandas()  # doctest: +SKIP
    """
    example = 'find_similar(run="out", to="cat.jpg")'
    return _find(requested(SimilarConfig, config, settings, example))


@with_config_storage
def _find(config: SimilarConfig) -> pa.Table:
    run = open_run(config.run)
    run.check_embeddings()
    index = None if config.index is None else open_index(config.index, run)
    classifier = Classifier(load_source_bundle(run, config.model, "model"))
    queries = normalize_embeddings(classifier.embed(config.to))
    similarity, file, position = (
        find_nearest(run, queries, config.k)
        if index is None
        else find_indexed(run, index, queries, config.k)
    )
    table = _build_table(config.to, run, similarity, file, position)
    if config.output is not None:
        layout.write_table(filesystem.absolute(config.output), table)
    log.show(_format_table(table, run.path_column))
    return table


def find_nearest(
    run: CommittedRun, queries: Floats, k: int
) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The k rows of a run with the highest cosine similarity to each query, best first.

    queries: (Q, E) float32, of length 1
    Returns the similarity, the index of the file in `run.files`, and the position in it, each
    (Q, n) with n at most k. Rows without an embedding, or with one of length 0, are left out.
    """
    count = len(queries)
    best = np.empty((count, 0), np.float32)
    file, position = (np.empty((count, 0), np.int64) for _ in range(2))
    for number, start, rows, vectors in iter_unit_embeddings(run):
        found = queries @ vectors.T
        joined = np.concatenate([best, found], axis=1)
        # stable: of equal similarities, the earlier row first
        order = np.argsort(-joined, axis=1, kind="stable")[:, :k]
        shape = found.shape
        files = np.concatenate([file, np.full(shape, number)], axis=1)
        positions = np.concatenate([position, np.broadcast_to(start + rows, shape)], axis=1)
        best, file, position = (
            np.take_along_axis(each, order, axis=1) for each in (joined, files, positions)
        )
    return best, file, position


def find_indexed(
    run: CommittedRun, index: Any, queries: Floats, k: int
) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """As `find_nearest`, from the run's index; all rows are compared if it finds too few."""
    found = search_index(index, queries, k)
    if found is not None:
        return found
    log.emit("note", "the index finds too few rows, as with equal images; all are compared")
    return find_nearest(run, queries, k)


def _build_table(
    names: list[str],
    run: CommittedRun,
    similarity: Floats,
    file: npt.NDArray[np.int64],
    position: npt.NDArray[np.int64],
) -> pa.Table:
    count, found = similarity.shape
    optional = [name for name in _PREDICTED if name in run.schema.names]
    columns = ["row", run.path_column, *optional]
    flat_file, flat_position = file.ravel(), position.ravel()
    order = np.argsort(flat_file, kind="stable")
    tables = [
        read_part_rows(run.files[number], columns, flat_position[flat_file == number])
        for number in np.unique(flat_file)
    ] or [pa.schema([run.schema.field(name) for name in columns]).empty_table()]
    rows = pa.concat_tables(tables).unify_dictionaries().take(np.argsort(order, kind="stable"))
    return pa.table(
        {
            "query": pa.array(np.repeat(np.array(names, dtype=object), found), pa.string()),
            "rank": pa.array(np.tile(np.arange(1, found + 1), count), pa.int32()),
            "similarity": pa.array(similarity.ravel(), pa.float32()),
            **{name: rows[name] for name in columns},
        }
    )


def _format_table(table: pa.Table, path_column: str) -> str:
    lines, query = [], None
    for row in table.to_pylist():
        if row["query"] != query:
            query = row["query"]
            lines.append(f"similar to {query}")
        labels = row.get("predicted_labels") or [row.get("predicted_label")]
        label = ", ".join(name for name in labels if name is not None)
        line = f"{row['rank']:5d}  {row['similarity']:.4f}  {row[path_column]}  {label}"
        lines.append(line.rstrip())
    return "\n".join(lines or ["no image of the run has an embedding"])
