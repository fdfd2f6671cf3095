"""Predictions of the validation images, which a bundle keeps for its report.

Each worker records those of its rows while it validates, from the logits that the metrics of the
epoch are computed from, so that both agree. Those of all workers are gathered for the best epoch.
The table in the bundle has a row per row of `validation.parquet` and the columns of the predictions
of `imgcls predict`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from imgcls import log
from imgcls.models.bundle import TaskName
from imgcls.models.task import ScoreScaling
from imgcls.models.tasks import TASKS
from imgcls.runs.layout import (
    PREDICTIONS_METADATA,
    VALIDATION_PREDICTIONS_FILE,
    VALIDATION_TOP_K,
)
from imgcls.runs.schema import build_prediction_schema
from imgcls.training.data.batches import DecodeFailure
from imgcls.training.data.examples import Examples
from imgcls.training.sampler import Int64Array
from imgcls.training.validation import ReduceFn, all_reduce

MAX_STORED_SCORES = 32_000_000
"""Maximum number of scores of a multilabel table, 64 MB in float16; a larger one has none."""
_MAX_PENDING_SCORES = 4_000_000
"""Number of scores that are left on the device until they are turned into columns at once."""


class PredictionRecorder:
    """Predictions of one worker's validation rows, and then of those of all workers."""

    def __init__(self, task: TaskName, classes: Sequence[str], num_rows: int) -> None:
        """num_rows: number of validation rows of all workers"""
        self._task, self._classes = TASKS[task], classes
        self._has_scores = self._task.needs_scores and num_rows * len(classes) <= MAX_STORED_SCORES
        self._rows = [np.zeros(0, np.int64)]
        self._failures: list[DecodeFailure] = []
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_pending = 0
        self._tables: list[pa.Table] = []

    def add_rows(self, rows: Int64Array, failures: Iterable[DecodeFailure] = ()) -> None:
        """Add rows in the order in which `update` gets their logits, and rows that failed."""
        self._rows.append(rows)
        self._failures.extend(failures)

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch, as `EvalAccumulator.update` takes it."""
        self._pending.append((logits, targets))
        self._num_pending += logits.numel()
        if self._num_pending >= _MAX_PENDING_SCORES:
            self._build_columns()

    def build_table(self) -> pa.Table:
        """The recorded rows: row (in the manifest), prediction columns, status and error."""
        self._build_columns()
        rows = pa.array(np.concatenate(self._rows))
        found = pa.concat_tables(self._tables) if self._tables else pa.table({})
        for name, column in (
            ("row", rows),
            ("status", pa.array(["ok"] * len(rows), pa.string())),
            ("error", pa.nulls(len(rows), pa.string())),
        ):
            found = found.append_column(name, column)
        return pa.concat_tables(
            [found, tabulate_failures(self._failures)], promote_options="default"
        )

    def gather(
        self, rank: int, workers: int, device: torch.device, reduce: ReduceFn = all_reduce
    ) -> bytes | None:
        """The rows of all workers as Parquet, on worker 0; every worker must call it.

        reduce: sums a tensor over all workers, in place
        """
        own = np.frombuffer(render_parquet(self.build_table()), np.uint8)
        sizes = torch.zeros(workers, dtype=torch.int64, device=device)
        sizes[rank] = len(own)
        ends = np.cumsum(reduce(sizes).tolist())
        # each worker's file in its own place: the sum is all files, one after the other
        files = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=device)
        files[int(ends[rank]) - len(own) : int(ends[rank])] = torch.tensor(own, device=device)
        reduce(files)
        if rank:
            return None
        parts = np.split(files.cpu().numpy(), ends[:-1])
        tables = [pq.read_table(pa.BufferReader(part.tobytes())) for part in parts]
        return render_parquet(pa.concat_tables(tables, promote_options="default").sort_by("row"))

    def _build_columns(self) -> None:
        """Turn the pending logits into columns."""
        if not self._pending:
            return
        logits, targets = (torch.cat(each) for each in zip(*self._pending, strict=True))
        self._pending, self._num_pending = [], 0
        task, classes = self._task, self._classes
        # the arg max is first, as in the metrics: topk returns equal logits in any order
        best = logits.argmax(1, keepdim=True)
        order = logits.scatter(1, best, torch.inf).topk(min(VALIDATION_TOP_K, len(classes))).indices
        columns = task.build_columns(
            task.activate(logits, ScoreScaling()).float().cpu().numpy(),
            classes,
            [task.default_threshold] * len(classes),
            top_k=VALIDATION_TOP_K,
            order=order.cpu().numpy(),
            codes=targets.cpu().numpy() if targets.dim() == 1 else None,
            scores_type="float16" if self._has_scores else None,
        )
        if not self._has_scores:
            columns.pop("scores", None)
        self._tables.append(pa.table(columns))


def tabulate_failures(failures: Iterable[DecodeFailure]) -> pa.Table:
    """Row, status and error of the images that have no prediction."""
    listed = list(failures)
    return pa.table(
        {
            "row": pa.array([each.row for each in listed], pa.int64()),
            "status": pa.array([each.status for each in listed], pa.string()),
            "error": pa.array([each.error for each in listed], pa.string()),
        }
    )


def build_validation_predictions(
    examples: Examples, data: bytes, failures: Iterable[DecodeFailure]
) -> pa.Table | None:
    """The table of a bundle: the manifest of the validation images with their predictions.

    data:     as `PredictionRecorder.gather` returns it
    failures: the images that it does not have
    Returns None, with a note, if a column of a class has the name of a column of predictions.
    """
    manifest = examples.build_manifest(held=True)
    recorded = pa.concat_tables(
        [pq.read_table(pa.BufferReader(data)), tabulate_failures(failures)],
        promote_options="default",
    )
    rows = examples.rows.filter(examples.rows.column("held")).column("row")
    place = pc.index_in(rows, value_set=recorded["row"].combine_chunks())
    found = recorded.take(place.combine_chunks())
    count, task = manifest.num_rows, TASKS[examples.targets.task]
    schema = build_prediction_schema(
        labeled=task.name == "single_label",
        scores=len(examples.classes) if task.needs_scores else None,
        scores_type="float16",
        task=task,
    )
    columns = {name: found[name] for name in found.column_names}
    columns |= {
        "row": pa.array(np.arange(count)),
        "accepted": pc.fill_null(found["accepted"], False),
        "width": pa.nulls(count, pa.int32()),
        "height": pa.nulls(count, pa.int32()),
        "status": pc.fill_null(found["status"], "unreadable").dictionary_encode(),
    }
    names = [name for name in schema.names if name in columns]
    if collision := sorted(set(names) & set(manifest.column_names)):
        log.emit(
            "note",
            f"{VALIDATION_PREDICTIONS_FILE} is not written: the class {collision[0]!r} has the "
            "name of a column of predictions",
        )
        return None
    for name in names:
        manifest = manifest.append_column(name, columns[name])
    return manifest


def render_parquet(table: pa.Table, created: str | None = None) -> bytes:
    """A table as a Parquet file.

    created: when the bundle was made that the table belongs to, see `PREDICTIONS_METADATA`
    """
    if created is not None:
        record = {PREDICTIONS_METADATA: json.dumps({"created": created})}
        table = table.replace_schema_metadata(record)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
