"""Rows of two runs over the same images, paired in row order or joined by a column."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.errors import RequestError, TooManyErrors
from imgcls.evaluation.aggregate import read_piece
from imgcls.evaluation.config import parse_points
from imgcls.evaluation.label_join import normalize_join_keys
from imgcls.runs.committed import CommittedRun


def check_pairing(a: CommittedRun, b: CommittedRun, on: str | None) -> None:
    """Raise RequestError if rows of these runs cannot be paired."""
    # a compacted history has the rows of many manifests; its fingerprint is that of the newest run
    other_rows = a.merged_runs or b.merged_runs or a.manifest_fingerprint != b.manifest_fingerprint
    if on is None and other_rows:
        raise RequestError(
            f"{a.url} and {b.url} have different manifests; name the column that identifies the "
            f"image, e.g. --on {a.path_column}"
        )
    if on is not None:
        for run in (a, b):
            run.check_key(on)


def iter_row_pairs(
    a: CommittedRun, b: CommittedRun, columns_a: list[str], columns_b: list[str], on: str | None
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Tables of the same images in the same order, of both runs.

    columns_a, columns_b: to read
    on: column to join by; None for rows of one manifest
    Raises RequestError for a key that occurs twice, or no common key.
    """
    if on is None:
        return _align_rows(a, b, columns_a, columns_b)
    return _join_rows(a, b, columns_a, columns_b, on)


def check_not_worse(
    a: CommittedRun, b: CommittedRun, difference: float, fail_if_worse: str | None
) -> None:
    """Raise TooManyErrors if run b is worse than `fail_if_worse` allows.

    difference: of the metrics, B minus A
    """
    allowed = parse_points(fail_if_worse) if fail_if_worse is not None else None
    if allowed is not None and difference < -allowed - 1e-12:
        raise TooManyErrors(
            f"{b.url}: is {-100 * difference:.2f} points worse than {a.url}, "
            f"allowed {100 * allowed:g}; keep the current model, or raise --fail-if-worse"
        )


def _align_rows(
    a: CommittedRun, b: CommittedRun, columns: list[str], columns_b: list[str]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Pair the rows of one manifest in order; the runs may split them into different files."""
    rights = _iter_tables(b, columns_b)
    pending = next(rights, None)
    for left in _iter_tables(a, columns):
        while left.num_rows:
            if pending is None or pending.num_rows == 0:
                pending = next(rights, None)
                if pending is None:
                    return  # b has fewer rows
                continue
            rows = min(left.num_rows, pending.num_rows)
            yield left.slice(0, rows), pending.slice(0, rows)
            left, pending = left.slice(rows), pending.slice(rows)


def _join_rows(
    a: CommittedRun, b: CommittedRun, columns: list[str], columns_b: list[str], on: str
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Pair rows by a column with unique values; the columns of b are held in memory."""
    import pandas as pd

    read = list(dict.fromkeys([on, *columns_b]))
    tables = list(_iter_tables(b, read))
    if not tables:
        raise RequestError(f"{b.url}: has no rows to compare with those of {a.url}")
    table_b = pa.concat_tables(tables).unify_dictionaries()
    table_b = table_b.filter(pc.is_valid(table_b[on]))  # a row without a key has no counterpart
    are_paths = on == a.path_column == b.path_column
    index = pd.Index(normalize_join_keys(table_b[on], are_paths=are_paths).to_pandas())
    if index.has_duplicates:
        key = index[index.duplicated()][0]
        raise RequestError(f"{b.url}: {on} {key!r} occurs twice; join on another column")
    seen = 0
    used = np.zeros(len(index), bool)
    for left in _iter_tables(a, list(dict.fromkeys([*columns, on]))):
        match = index.get_indexer(normalize_join_keys(left[on], are_paths=are_paths).to_pandas())
        hit = np.flatnonzero(match >= 0)
        taken = match[hit]
        if used[taken].any() or len(np.unique(taken)) < len(taken):
            raise RequestError(f"{a.url}: {on} occurs in several rows; join on another column")
        used[taken] = True
        seen += len(hit)
        yield left.take(hit), table_b.take(taken)
    if seen == 0:
        raise RequestError(
            f"{a.url} and {b.url} share no {on} (such as {next(iter(index), None)!r}); check that "
            "both manifests use the same form"
        )
    if seen < max(a.rows, b.rows):
        log.emit("note", f"{seen:,} rows are in both, of {a.rows:,} and {b.rows:,}")


def _iter_tables(run: CommittedRun, names: list[str]) -> Iterator[pa.Table]:
    for piece in run.split_row_groups(10**9):
        yield from read_piece(run, piece, names)
