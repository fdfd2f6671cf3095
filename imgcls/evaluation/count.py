"""Going over a run once: in this process where it is small, else by Ray Data in pieces.

Reads only the columns that are counted. What comes back does not depend on how the work was cut.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.cluster import session
from imgcls.data import filesystem, object_store
from imgcls.evaluation.aggregate import Tally, Wanted
from imgcls.evaluation.label_join import LateLabels, own_columns
from imgcls.runs.committed import Piece, Run, without_views

PIECE_ROWS = 1_000_000
BATCH_ROWS = 262_144
_BATCH_BYTES = 128_000_000
HERE_ROWS = 2_000_000
"""Up to so many rows are counted before Ray would have started."""


def count(run: Run, wanted: Wanted, late: LateLabels | None = None) -> Tally:
    """The tally of all rows of a run.

    late: labels to judge by instead of the run's own; counted in this process, which holds them
    Raises RequestError when the predictions are not what a labelling run of these classes writes.
    """
    pieces = run.pieces(PIECE_ROWS)
    total = Tally(wanted)
    scores = run.rows * len(run.classes) * 2 if wanted.scores else 0
    if late is not None or run.rows + scores // 256 <= HERE_ROWS:
        for piece in pieces:
            _count_into(total, run, piece, late)
        if late is not None:
            late.finish()
        return total
    for tally in _on_the_cluster(run, wanted, pieces):
        total.merge(tally)
    return total


def _on_the_cluster(run: Run, wanted: Wanted, pieces: list[Piece]) -> Iterator[Tally]:
    import ray.data

    session.connect()
    session.hush_data()
    started = time.monotonic()
    work = object_store.carried(_counted, run, wanted)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.from_items(
        [{"piece": pickle.dumps(piece)} for piece in pieces], override_num_blocks=len(pieces)
    ).map(work)
    done = 0
    for row in dataset.iter_rows():
        tally: Tally = pickle.loads(row["tally"])
        done += tally.counts.rows
        seconds = time.monotonic() - started
        print(f"counted {done:,} of {run.rows:,} rows ({done / seconds:,.0f}/s)", flush=True)
        yield tally


def _counted(run: Run, wanted: Wanted, row: dict[str, Any]) -> dict[str, Any]:
    tally = Tally(wanted)
    _count_into(tally, run, pickle.loads(row["piece"]), None)
    return {"tally": pickle.dumps(tally, protocol=pickle.HIGHEST_PROTOCOL)}


def _count_into(tally: Tally, run: Run, piece: Piece, late: LateLabels | None) -> None:
    wanted = tally.wanted
    start = piece.start
    for table in tables(run, piece, columns(wanted, late)):
        if late is not None:
            table = late.judge(table)
        tally.add(table, piece.file, start)
        start += table.num_rows


def columns(wanted: Wanted, late: LateLabels | None = None) -> list[str]:
    """The columns that a tally needs, of a run whose labels may come from elsewhere."""
    names = ["predicted_label", "confidence", "accepted", "status", *wanted.slice_by]
    if late is not None:
        names = own_columns(names, joined=True) + late.needed
    elif wanted.label_column is not None:
        names += [wanted.label_column, "label_score", "label_rank"]
    if wanted.scores:
        names.append("scores")
    return list(dict.fromkeys(names))


def tables(run: Run, piece: Piece, names: list[str]) -> Iterator[pa.Table]:
    """Columns of a piece, batch by batch, text as dictionaries."""
    text = [
        name
        for name in names
        if pa.types.is_string(run.schema.field(name).type) and name != run.path_column
    ]
    rows = BATCH_ROWS
    if "scores" in names:
        rows = max(1_024, min(rows, _BATCH_BYTES // (2 * len(run.classes))))
    with filesystem.open_read(run.files[piece.file]) as stream:
        file = pq.ParquetFile(stream, read_dictionary=text)
        for batch in file.iter_batches(rows, row_groups=list(piece.groups), columns=names):
            yield without_views(pa.Table.from_batches([batch]))
