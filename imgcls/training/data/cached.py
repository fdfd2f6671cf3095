"""Images decoded once, by Ray Data, into Ray's object store, where all workers read them in place.

Promises that the order of the rows does not depend on which task was done first.
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

from imgcls.cluster.session import configure_ray_data
from imgcls.data import storage_settings
from imgcls.data.decode import Pixels
from imgcls.data.preprocess import Preprocess
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

BLOCKS_PER_CPU = 4
"""Small sets are cut finer, so that every CPU has its part of the decoding."""


@dataclass(frozen=True)
class CachedImages:
    """Decoded images in the object store, for as long as this is kept.

    blocks:   references to Arrow tables as `decode_chunk` makes them, in no particular order
    failures: the images that could not be decoded, in row order
    """

    blocks: tuple[Any, ...]
    failures: tuple[DecodeFailure, ...]
    views: DecodeSettings

    def load_split(self, *, held: bool) -> CachedDataset:
        """The rows of one split, for a worker."""
        return CachedDataset(ray.get(list(self.blocks)), self.views.for_split(held=held), held=held)


def decode_images(rows: pa.Table, views: DecodeSettings, *, cpus: float) -> CachedImages:
    """Fetch and decode rows (row, url, label, held), one task per CPU at a time."""
    cut = -(-rows.num_rows // int(BLOCKS_PER_CPU * max(1, cpus)))
    chunks = []
    for held in (False, True):
        split = rows.filter(pc.equal(rows.column("held"), held))
        size = max(1, min(compute_block_rows(views.for_split(held=held)), cut))
        chunks += [split.slice(start, size) for start in range(0, split.num_rows, size)]
    configure_ray_data()
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        decoded = (
            ray.data.from_blocks(chunks)
            .map_batches(
                storage_settings.bind_settings_split(math.ceil(cpus), decode_block, views=views),
                batch_format="pyarrow",
            )
            .materialize()
        )
        told = decoded.select_columns(["row", "url", "label", "held", "error"])
        bad = told.filter(expr=col("error").is_not_null()).take_all()
    failures = [
        DecodeFailure(row["url"], row["label"], row["held"], row["error"])
        for row in sorted(bad, key=lambda row: (row["held"], row["row"]))
    ]
    return CachedImages(tuple(decoded.to_arrow_refs()), tuple(failures), views)


def find_store_bytes() -> int:
    """Capacity of the smallest object store among the machines that do work."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return min(int(r.get("object_store_memory", 0)) for r in resources if r.get("CPU"))


class CachedDataset:
    """The decoded rows of one split, in manifest order, read in place from the object store."""

    def __init__(self, blocks: Sequence[pa.Table], preprocess: Preprocess, *, held: bool) -> None:
        self._blocks: list[Pixels] = []
        found: list[
            tuple[Int64Array, Int64Array, Int64Array, Int64Array]
        ] = []  # row, label, view, place within it
        for batch in (batch for block in blocks for batch in block.to_batches()):
            if not batch.num_rows or batch.column("held")[0].as_py() != held:
                continue
            (place,) = np.nonzero(batch.column("error").is_null().to_numpy(zero_copy_only=False))
            view = np.full(len(place), len(self._blocks))
            rows, labels = (batch.column(name).to_numpy()[place] for name in ("row", "label"))
            found.append((rows, labels, view, place))
            self._blocks.append(view_pixels(batch, preprocess))
        rows, labels, view, place = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(rows, kind="stable")
        self.labels: Int64Array = labels[order]
        self._block_index, self._row_index = view[order], place[order]
        self._shape = (3, preprocess.crop, preprocess.crop)

    def __len__(self) -> int:
        return len(self.labels)

    def gather_pixels(self, rows: Int64Array) -> Pixels:
        """(N, 3, crop, crop) uint8, a copy of the given rows."""
        out = np.empty((len(rows), *self._shape), np.uint8)
        for at, row in enumerate(rows):
            out[at] = self._blocks[self._block_index[row]][self._row_index[row]]
        return out

    def iter_batches(self, rows: Sequence[Int64Array]) -> Iterator[Batch]:
        return prefetch(Batch(self.gather_pixels(each), self.labels[each]) for each in rows)
