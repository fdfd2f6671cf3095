"""Images decoded anew in every epoch, by Ray Data, for sets that do not fit in memory.

Every worker runs a pipeline over its own rows in the order in which it wants them, so that an epoch
holds every row once, whatever the number of workers, and can go on from any step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.train

from imgcls.cluster.session import hush_data
from imgcls.data import object_store
from imgcls.training.data.batches import (
    Batch,
    Failure,
    Views,
    ahead,
    block_rows,
    decode_chunk,
    pixels_of,
)
from imgcls.training.sampler import Rows


@dataclass(frozen=True)
class Streamed:
    """Images that are decoded anew in every epoch.

    rows: reference to the table (row, url, label, held)
    cpus: decoding tasks at a time, over all workers
    """

    rows: Any
    views: Views
    cpus: float

    def split(self, *, held: bool) -> StreamedSet:
        """The rows of one split, for a worker."""
        context = ray.train.get_context()
        return StreamedSet(self, held=held, cpus=self.cpus / context.get_world_size())


class StreamedSet:
    """The rows of one split, decoded by Ray Data each time that they are asked for."""

    def __init__(self, source: Streamed, *, held: bool, cpus: float) -> None:
        table = ray.get(source.rows)
        (self._places,) = np.nonzero(table.column("held").to_numpy() == held)
        self.labels: Rows = table.column("label").to_numpy()[self._places]
        self._source, self._cpus = source, cpus
        self._preprocess = source.views.of_split(held=held)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def readers(self) -> int:
        """Processes that read images at a time, over all workers: each worker has at least one."""
        return math.ceil(self._source.cpus / self._cpus * max(1.0, self._cpus))

    def batches(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        if not rows:
            return iter(())
        return ahead(self._cut(rows))

    def _cut(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        """Blocks as they come, cut into the batches that were asked for."""
        tables = self._decoded(np.concatenate(list(rows)))
        crop = self._preprocess.crop
        left: pa.Table | None = None
        for wanted in rows:
            if not len(wanted):
                yield Batch(np.zeros((0, 3, crop, crop), np.uint8), np.zeros(0, np.int64))
                continue
            while left is None or left.num_rows < len(wanted):
                arrived = next(tables)
                left = arrived if left is None else pa.concat_tables([left, arrived])
            yield self._batch(left.slice(0, len(wanted)))
            left = left.slice(len(wanted))

    def _decoded(self, rows: Rows) -> Iterator[pa.Table]:
        """The given rows in order, decoded, as tables of some hundred rows."""
        size = block_rows(self._preprocess)
        wanted = ray.put(self._places[rows])
        decode = object_store.carried_to(
            self.readers,
            _decode_places,
            table=self._source.rows,
            wanted=wanted,
            views=self._source.views,
        )
        hush_data()
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
            cpu=max(1.0, self._cpus)
        )
        with ray.data.DataContext.current(context):
            decoded = ray.data.range(
                len(rows), override_num_blocks=-(-len(rows) // size)
            ).map_batches(decode, batch_size=None)
            yield from decoded.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=2
            )

    def _batch(self, table: pa.Table) -> Batch:
        good = table.column("error").is_null().to_numpy()
        labels = table.column("label").to_numpy()
        held = table.column("held")[0].as_py()
        parts = [pixels_of(batch, self._preprocess) for batch in table.to_batches()]
        told = tuple(
            Failure(row["url"], row["label"], held, row["error"])
            for row in table.select(["url", "label", "error"]).to_pylist()
            if row["error"] is not None
        )
        return Batch(np.concatenate(parts)[good], labels[good], told)


def _decode_places(
    block: dict[str, npt.NDArray[np.int64]], *, table: Any, wanted: Any, views: Views
) -> pa.Table:
    """Decode the rows that stand at some places of a list of rows to come."""
    rows: pa.Table = ray.get(table)
    return decode_chunk(rows.take(ray.get(wanted)[block["id"]]), views)
