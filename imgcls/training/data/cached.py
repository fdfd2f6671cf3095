"""Training images decoded once, by Ray Data, into Ray's object store.

All workers of a node read them in place. The order of the rows does not depend on the order in
which the decoding tasks finish.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data.expressions import col

from imgcls.cluster.imports import skip_collection_at_exit
from imgcls.cluster.ray_data import DataExecution
from imgcls.data.decoding.decode import Pixels
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.storage import storage_settings
from imgcls.training.data.batches import (
    Batch,
    DecodeFailure,
    DecodeSettings,
    compute_block_rows,
    decode_block,
    list_failures,
    prefetch,
    view_pixels,
)
from imgcls.training.sampler import Int64Array

BLOCKS_PER_CPU = 4
"""Minimum number of blocks of a small data set, per CPU, so that every CPU decodes some."""


@dataclass(frozen=True)
class CachedImages:
    """Decoded images in the object store, which live as long as this object.

    blocks:   references to Arrow tables as `decode_block` returns them, in any order
    failures: the images that could not be decoded, in row order
    examples: fingerprint of the examples that these images belong to, for the trials of a search
    """

    blocks: tuple[Any, ...]
    failures: tuple[DecodeFailure, ...]
    settings: DecodeSettings
    examples: str = ""

    def load_split(self, *, held: bool) -> CachedDataset:
        """The rows of one split, for a worker."""
        return CachedDataset(
            ray.get(list(self.blocks)), self.settings.for_split(held=held), held=held
        )


def decode_images(
    rows: pa.Table, settings: DecodeSettings, *, cpus: float, execution: DataExecution
) -> CachedImages:
    """Fetch and decode rows (row, url, label, held), one task per CPU at a time.

    execution: another thread may stop it
    """
    cut = -(-rows.num_rows // int(BLOCKS_PER_CPU * max(1, cpus)))
    chunks = []
    for held in (False, True):
        split = rows.filter(pc.equal(rows.column("held"), held))
        size = max(1, min(compute_block_rows(settings.for_split(held=held)), cut))
        chunks += [split.slice(start, size) for start in range(0, split.num_rows, size)]
    decode = storage_settings.bind_settings_split(math.ceil(cpus), _decode, settings=settings)
    with execution.own_settings():
        dataset = ray.data.from_blocks(chunks).map_batches(decode, batch_format="pyarrow")
    try:
        decoded = dataset.materialize()
        status = decoded.select_columns(["row", "url", "label", "held", "status", "error"])
        bad = status.filter(expr=col("error").is_not_null()).take_all()
    finally:
        execution.close()
    failures = list_failures(sorted(bad, key=lambda row: (row["held"], row["row"])))
    return CachedImages(tuple(decoded.to_arrow_refs()), failures, settings)


def _decode(rows: pa.Table, settings: DecodeSettings) -> pa.Table:
    """`decode_block` in a process of Ray Data."""
    skip_collection_at_exit()
    return decode_block(rows, settings)


def find_store_bytes() -> int:
    """Capacity of the smallest object store among the nodes with CPUs, in bytes."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return min(int(r.get("object_store_memory", 0)) for r in resources if r.get("CPU"))


class CachedDataset:
    """The decoded rows of one split, in manifest order, read in place from the object store."""

    def __init__(self, blocks: Sequence[pa.Table], preprocess: Preprocess, *, held: bool) -> None:
        self._blocks: list[Pixels] = []
        columns: list[tuple[Int64Array, ...]] = []  # row, label, block, index in the block
        for batch in (batch for table in blocks for batch in table.to_batches()):
            if not batch.num_rows or batch.column("held")[0].as_py() != held:
                continue
            (index,) = np.nonzero(batch.column("error").is_null().to_numpy(zero_copy_only=False))
            block = np.full(len(index), len(self._blocks))
            rows, labels = (batch.column(name).to_numpy()[index] for name in ("row", "label"))
            columns.append((rows, labels, block, index))
            self._blocks.append(view_pixels(batch, preprocess))
        rows, labels, block, index = (np.concatenate(each) for each in zip(*columns, strict=True))
        order = np.argsort(rows, kind="stable")
        self.labels: Int64Array = labels[order]
        self.rows: Int64Array = rows[order]
        self._block_index, self._row_index = block[order], index[order]
        self._shape = (3, preprocess.crop, preprocess.crop)

    def __len__(self) -> int:
        return len(self.labels)

    def gather_pixels(self, rows: Int64Array) -> Pixels:
        """(N, 3, crop, crop) uint8: a copy of the given rows."""
        out = np.empty((len(rows), *self._shape), np.uint8)
        for position, row in enumerate(rows):
            out[position] = self._blocks[self._block_index[row]][self._row_index[row]]
        return out

    def iter_batches(self, rows: Sequence[Int64Array]) -> Iterator[Batch]:
        return prefetch(
            Batch(self.gather_pixels(each), self.labels[each], rows=self.rows[each])
            for each in rows
        )
