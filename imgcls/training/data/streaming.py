"""Training images decoded in every epoch, by Ray Data, for data sets larger than memory.

Each worker runs a pipeline over its own rows, in the order in which it needs them, so that an epoch
has every row exactly once with any number of workers, and can be resumed at any step.
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

from imgcls.cluster.imports import skip_collection_at_exit
from imgcls.cluster.ray_data import own_data_settings
from imgcls.data.storage import storage_settings
from imgcls.training.data.batches import (
    Batch,
    DecodeSettings,
    compute_block_rows,
    decode_block,
    list_failures,
    prefetch,
    view_pixels,
)
from imgcls.training.sampler import Int64Array


@dataclass(frozen=True)
class StreamedImages:
    """Images that are decoded in every epoch.

    rows: reference to the table (row, url, label, held)
    cpus: number of concurrent decoding tasks, over all workers
    """

    rows: Any
    settings: DecodeSettings
    cpus: float

    def load_split(self, *, held: bool) -> StreamedDataset:
        """The rows of one split, for a worker."""
        context = ray.train.get_context()
        return StreamedDataset(self, held=held, cpus=self.cpus / context.get_world_size())


class StreamedDataset:
    """The rows of one split, decoded by Ray Data each time they are read."""

    def __init__(self, source: StreamedImages, *, held: bool, cpus: float) -> None:
        table = ray.get(source.rows)
        (self._row_indices,) = np.nonzero(table.column("held").to_numpy() == held)
        self.labels: Int64Array = table.column("label").to_numpy()[self._row_indices]
        self._source, self._cpus = source, cpus
        self._preprocess = source.settings.for_split(held=held)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_readers(self) -> int:
        """Number of processes that read images, over all workers: at least one per worker."""
        return math.ceil(self._source.cpus / self._cpus * max(1.0, self._cpus))

    def iter_batches(self, rows: Sequence[Int64Array]) -> Iterator[Batch]:
        if not rows:
            return iter(())
        return prefetch(self._slice_batches(rows))

    def _slice_batches(self, rows: Sequence[Int64Array]) -> Iterator[Batch]:
        """Decoded blocks, cut into the requested batches."""
        tables = self._decode_in_order(np.concatenate(list(rows)))
        crop = self._preprocess.crop
        rest: pa.Table | None = None
        for wanted in rows:
            if not len(wanted):
                yield Batch(np.zeros((0, 3, crop, crop), np.uint8), np.zeros(0, np.int64))
                continue
            while rest is None or rest.num_rows < len(wanted):
                arrived = next(tables)
                rest = arrived if rest is None else pa.concat_tables([rest, arrived])
            yield self._build_batch(rest.slice(0, len(wanted)))
            rest = rest.slice(len(wanted))

    def _decode_in_order(self, rows: Int64Array) -> Iterator[pa.Table]:
        """The given rows, decoded and in order, as tables of up to `MAX_BLOCK_ROWS` rows."""
        size = compute_block_rows(self._preprocess)
        wanted = ray.put(self._row_indices[rows])
        decode = storage_settings.bind_settings_split(
            self.num_readers,
            _decode_indices,
            table=self._source.rows,
            wanted=wanted,
            settings=self._source.settings,
        )
        with own_data_settings() as context:
            options = context.execution_options
            options.preserve_order = True
            options.resource_limits = options.resource_limits.copy(cpu=max(1.0, self._cpus))
            decoded = ray.data.range(
                len(rows), override_num_blocks=-(-len(rows) // size)
            ).map_batches(decode, batch_size=None)
        yield from decoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)

    def _build_batch(self, table: pa.Table) -> Batch:
        good = table.column("error").is_null().to_numpy()
        labels = table.column("label").to_numpy()
        rows = table.column("row").to_numpy()
        parts = [view_pixels(batch, self._preprocess) for batch in table.to_batches()]
        failed = table.drop_columns(["pixels"]).filter(pa.array(~good))
        failures = list_failures(failed.to_pylist())
        return Batch(np.concatenate(parts)[good], labels[good], failures, rows[good])


def _decode_indices(
    block: dict[str, npt.NDArray[np.int64]], *, table: Any, wanted: Any, settings: DecodeSettings
) -> pa.Table:
    """Decode a part of the requested rows.

    block:  positions in `wanted`, in the column id
    wanted: reference to (N,) int64 row indices of `table`
    """
    rows: pa.Table = ray.get(table)
    skip_collection_at_exit()
    return decode_block(rows.take(ray.get(wanted)[block["id"]]), settings)
