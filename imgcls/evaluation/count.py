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
from imgcls.data import filesystem, storage_settings
from imgcls.evaluation.aggregate import AggregateSpec, RunAggregate
from imgcls.evaluation.label_join import JoinedLabels, select_run_columns
from imgcls.runs.committed import CommittedRun, RowGroupRange, cast_string_views

PIECE_ROWS = 1_000_000
BATCH_ROWS = 262_144
_BATCH_BYTES = 128_000_000
MAX_LOCAL_ROWS = 2_000_000
"""Up to so many rows are counted before Ray would have started."""


def aggregate_run(
    run: CommittedRun, wanted: AggregateSpec, late: JoinedLabels | None = None
) -> RunAggregate:
    """The tally of all rows of a run.

    late: labels to judge by instead of the run's own; counted in this process, which holds them
    Raises RequestError when the predictions are not what a labelling run of these classes writes.
    """
    pieces = run.split_row_groups(PIECE_ROWS)
    total = RunAggregate(wanted)
    scores = run.rows * len(run.classes) * 2 if wanted.scores else 0
    if late is not None or run.rows + scores // 256 <= MAX_LOCAL_ROWS:
        for piece in pieces:
            _add_piece(total, run, piece, late)
        if late is not None:
            late.finish()
        return total
    for tally in _aggregate_on_cluster(run, wanted, pieces):
        total.merge(tally)
    return total


def _aggregate_on_cluster(
    run: CommittedRun, wanted: AggregateSpec, pieces: list[RowGroupRange]
) -> Iterator[RunAggregate]:
    import ray.data

    session.connect()
    session.configure_ray_data()
    started = time.monotonic()
    work = storage_settings.bind_settings(_aggregate_piece, run, wanted)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.from_items(
        [{"piece": pickle.dumps(piece)} for piece in pieces], override_num_blocks=len(pieces)
    ).map(work)
    done = 0
    for row in dataset.iter_rows():
        tally: RunAggregate = pickle.loads(row["tally"])
        done += tally.counts.rows
        seconds = time.monotonic() - started
        print(f"counted {done:,} of {run.rows:,} rows ({done / seconds:,.0f}/s)", flush=True)
        yield tally


def _aggregate_piece(
    run: CommittedRun, wanted: AggregateSpec, row: dict[str, Any]
) -> dict[str, Any]:
    tally = RunAggregate(wanted)
    _add_piece(tally, run, pickle.loads(row["piece"]), None)
    return {"tally": pickle.dumps(tally, protocol=pickle.HIGHEST_PROTOCOL)}


def _add_piece(
    tally: RunAggregate, run: CommittedRun, piece: RowGroupRange, late: JoinedLabels | None
) -> None:
    wanted = tally.spec
    start = piece.first_row
    for table in read_piece(run, piece, list_columns(wanted, late)):
        if late is not None:
            table = late.join(table)
        tally.add(table, piece.file, start)
        start += table.num_rows


def list_columns(wanted: AggregateSpec, late: JoinedLabels | None = None) -> list[str]:
    """The columns that a tally needs, of a run whose labels may come from elsewhere."""
    names = ["predicted_label", "confidence", "accepted", "status", *wanted.slice_by]
    if late is not None:
        names = select_run_columns(names, joined=True) + late.required_columns
    elif wanted.label_column is not None:
        names += [wanted.label_column, "label_score", "label_rank"]
    if wanted.scores:
        names.append("scores")
    return list(dict.fromkeys(names))


def read_piece(run: CommittedRun, piece: RowGroupRange, names: list[str]) -> Iterator[pa.Table]:
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
        for batch in file.iter_batches(rows, row_groups=list(piece.row_groups), columns=names):
            yield cast_string_views(pa.Table.from_batches([batch]))
