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

from imgcls.cluster.session import configure_ray_data
from imgcls.data import storage_settings
from imgcls.training.data.batches import (
    Batch,
    DecodeFailure,
    DecodeSettings,
    compute_block_rows,
    decode_block,
    prefetch,
    view_pixels,
)
from imgcls.training.sampler import Int64Array


@dataclass(frozen=True)
class StreamedImages:
    """Images that are decoded anew in every epoch.

    rows: reference to the table (row, url, label, held)
    cpus: decoding tasks at a time, over all workers
    """

    rows: Any
    views: DecodeSettings
    cpus: float

    def load_split(self, *, held: bool) -> StreamedDataset:
        """The rows of one split, for a worker."""
        context = ray.train.get_context()
        return StreamedDataset(self, held=held, cpus=self.cpus / context.get_world_size())


class StreamedDataset:
    """The rows of one split, decoded by Ray Data each time that they are asked for."""

    def __init__(self, source: StreamedImages, *, held: bool, cpus: float) -> None:
        table = ray.get(source.rows)
        (self._row_indices,) = np.nonzero(table.column("held").to_numpy() == held)
        self.labels: Int64Array = table.column("label").to_numpy()[self._row_indices]
        self._source, self._cpus = source, cpus
        self._preprocess = source.views.for_split(held=held)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_readers(self) -> int:
        """Processes that read images at a time, over all workers: each worker has at least one."""
        return math.ceil(self._source.cpus / self._cpus * max(1.0, self._cpus))

    def iter_batches(self, rows: Sequence[Int64Array]) -> Iterator[Batch]:
        if not rows:
            return iter(())
        return prefetch(self._slice_batches(rows))

    def _slice_batches(self, rows: Sequence[Int64Array]) -> Iterator[Batch]:
        """Blocks as they come, cut into the batches that were asked for."""
        tables = self._decode_in_order(np.concatenate(list(rows)))
        crop = self._preprocess.crop
        left: pa.Table | None = None
        for wanted in rows:
            if not len(wanted):
                yield Batch(np.zeros((0, 3, crop, crop), np.uint8), np.zeros(0, np.int64))
                continue
            while left is None or left.num_rows < len(wanted):
                arrived = next(tables)
                left = arrived if left is None else pa.concat_tables([left, arrived])
            yield self._build_batch(left.slice(0, len(wanted)))
            left = left.slice(len(wanted))

    def _decode_in_order(self, rows: Int64Array) -> Iterator[pa.Table]:
        """The given rows in order, decoded, as tables of some hundred rows."""
        size = compute_block_rows(self._preprocess)
        wanted = ray.put(self._row_indices[rows])
        decode = storage_settings.bind_settings_split(
            self.num_readers,
            _decode_indices,
            table=self._source.rows,
            wanted=wanted,
            views=self._source.views,
        )
        configure_ray_data()
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

    def _build_batch(self, table: pa.Table) -> Batch:
        good = table.column("error").is_null().to_numpy()
        labels = table.column("label").to_numpy()
        held = table.column("held")[0].as_py()
        parts = [view_pixels(batch, self._preprocess) for batch in table.to_batches()]
        told = tuple(
            DecodeFailure(row["url"], row["label"], held, row["error"])
            for row in table.select(["url", "label", "error"]).to_pylist()
            if row["error"] is not None
        )
        return Batch(np.concatenate(parts)[good], labels[good], told)


def _decode_indices(
    block: dict[str, npt.NDArray[np.int64]], *, table: Any, wanted: Any, views: DecodeSettings
) -> pa.Table:
    """Decode the rows that stand at some places of a list of rows to come."""
    rows: pa.Table = ray.get(table)
    return decode_block(rows.take(ray.get(wanted)[block["id"]]), views)
