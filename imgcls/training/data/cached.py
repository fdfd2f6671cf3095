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

from imgcls.cluster.session import hush_data
from imgcls.data import object_store
from imgcls.data.decode import Pixels
from imgcls.data.preprocess import Preprocess
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

BLOCKS_PER_CPU = 4
"""Small sets are cut finer, so that every CPU has its part of the decoding."""


@dataclass(frozen=True)
class Decoded:
    """Decoded images in the object store, for as long as this is kept.

    blocks:   references to Arrow tables as `decode_chunk` makes them, in no particular order
    failures: the images that could not be decoded, in row order
    """

    blocks: tuple[Any, ...]
    failures: tuple[Failure, ...]
    views: Views

    def split(self, *, held: bool) -> ImageSet:
        """The rows of one split, for a worker."""
        return ImageSet(ray.get(list(self.blocks)), self.views.of_split(held=held), held=held)


def decode_images(rows: pa.Table, views: Views, *, cpus: float) -> Decoded:
    """Fetch and decode rows (row, url, label, held), one task per CPU at a time."""
    cut = -(-rows.num_rows // int(BLOCKS_PER_CPU * max(1, cpus)))
    chunks = []
    for held in (False, True):
        split = rows.filter(pc.equal(rows.column("held"), held))
        size = max(1, min(block_rows(views.of_split(held=held)), cut))
        chunks += [split.slice(start, size) for start in range(0, split.num_rows, size)]
    hush_data()
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        decoded = (
            ray.data.from_blocks(chunks)
            .map_batches(
                object_store.carried_to(math.ceil(cpus), decode_chunk, views=views),
                batch_format="pyarrow",
            )
            .materialize()
        )
        told = decoded.select_columns(["row", "url", "label", "held", "error"])
        bad = told.filter(expr=col("error").is_not_null()).take_all()
    failures = [
        Failure(row["url"], row["label"], row["held"], row["error"])
        for row in sorted(bad, key=lambda row: (row["held"], row["row"]))
    ]
    return Decoded(tuple(decoded.to_arrow_refs()), tuple(failures), views)


def store_bytes() -> int:
    """Capacity of the smallest object store among the machines that do work."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return min(int(r.get("object_store_memory", 0)) for r in resources if r.get("CPU"))


class ImageSet:
    """The decoded rows of one split, in manifest order, read in place from the object store."""

    def __init__(self, blocks: Sequence[pa.Table], preprocess: Preprocess, *, held: bool) -> None:
        self._views: list[Pixels] = []
        found: list[tuple[Rows, Rows, Rows, Rows]] = []  # row, label, view, place within it
        for batch in (batch for block in blocks for batch in block.to_batches()):
            if not batch.num_rows or batch.column("held")[0].as_py() != held:
                continue
            (place,) = np.nonzero(batch.column("error").is_null().to_numpy(zero_copy_only=False))
            view = np.full(len(place), len(self._views))
            rows, labels = (batch.column(name).to_numpy()[place] for name in ("row", "label"))
            found.append((rows, labels, view, place))
            self._views.append(pixels_of(batch, preprocess))
        rows, labels, view, place = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(rows, kind="stable")
        self.labels: Rows = labels[order]
        self._view, self._place = view[order], place[order]
        self._shape = (3, preprocess.crop, preprocess.crop)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, rows: Rows) -> Pixels:
        """(N, 3, crop, crop) uint8, a copy of the given rows."""
        out = np.empty((len(rows), *self._shape), np.uint8)
        for at, row in enumerate(rows):
            out[at] = self._views[self._view[row]][self._place[row]]
        return out

    def batches(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        return ahead(Batch(self.pixels(each), self.labels[each]) for each in rows)
