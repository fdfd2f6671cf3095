"""Image files to decoded pixels in Ray's object store: once, for all epochs and all workers.

Owns the Ray Data pipeline that fetches and decodes, and the view of its blocks from which a worker
takes rows. Promises that a bad image is left out and told, never replaced, and that the order of
the rows does not depend on which task was done first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data.expressions import col

from imgcls.data import images, storage
from imgcls.data.images import Pixels
from imgcls.data.preprocess import Preprocess
from imgcls.errors import ImageError, StorageError
from imgcls.training.deal import Rows

BLOCK_BYTES = 32 << 20
"""Largest decoded block; far below Ray Data's 128 MiB, above which it would split it."""
BLOCK_ROWS = 256
BLOCKS_PER_CPU = 4
"""Small sets are cut finer, so that every CPU has its part of the decoding."""


@dataclass(frozen=True)
class Failure:
    """An image that could not be decoded."""

    url: str | None
    label: int
    held: bool
    error: str


@dataclass(frozen=True)
class Decoded:
    """Decoded images in the object store, for as long as this is kept.

    blocks:   references to Arrow tables as `decode_chunk` makes them, in no particular order
    failures: the images that could not be decoded, in row order
    """

    blocks: tuple[Any, ...]
    failures: tuple[Failure, ...]


def decode_images(rows: pa.Table, preprocess: Preprocess, *, cpus: float) -> Decoded:
    """Fetch and decode rows (row, url, label, held), one task per CPU at a time."""
    cut = -(-rows.num_rows // int(BLOCKS_PER_CPU * max(1, cpus)))
    size = max(1, min(BLOCK_ROWS, BLOCK_BYTES // image_bytes(preprocess), cut))
    chunks = [rows.slice(start, size) for start in range(0, rows.num_rows, size)]
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        decoded = (
            ray.data.from_arrow(chunks)
            .map_batches(
                functools.partial(decode_chunk, preprocess=preprocess), batch_format="pyarrow"
            )
            .materialize()
        )
        told = decoded.select_columns(["row", "url", "label", "held", "error"])
        bad = told.filter(expr=col("error").is_not_null()).take_all()
    failures = [
        Failure(row["url"], row["label"], row["held"], row["error"])
        for row in sorted(bad, key=lambda row: (row["held"], row["row"]))
    ]
    return Decoded(tuple(decoded.to_arrow_refs()), tuple(failures))


def image_bytes(preprocess: Preprocess) -> int:
    """Bytes of one decoded image."""
    return 3 * preprocess.crop**2


def store_bytes() -> int:
    """Capacity of the smallest object store among the machines that do work."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return min(int(r.get("object_store_memory", 0)) for r in resources if r.get("CPU"))


def decode_chunk(rows: pa.Table, preprocess: Preprocess) -> pa.Table:
    """Fetch and decode a chunk: the same rows with error (string) and pixels (fixed-size binary).

    A row with an error has pixels that mean nothing.
    """
    pixels: list[Pixels] = []
    errors: list[str | None] = []
    blank = np.zeros((3, preprocess.crop, preprocess.crop), np.uint8)
    for data in storage.read_ahead(rows.column("url").to_pylist()):
        try:
            if isinstance(data, StorageError):
                raise data
            pixels.append(images.decode(data, preprocess)[0])
            errors.append(None)
        except (ImageError, StorageError) as error:
            pixels.append(blank)
            errors.append(str(error))
    stacked = pa.py_buffer(np.stack(pixels))
    width = pa.binary(image_bytes(preprocess))
    return rows.append_column("error", pa.array(errors, pa.string())).append_column(
        "pixels", pa.Array.from_buffers(width, len(pixels), [None, stacked])
    )


class ImageSet:
    """The decoded rows of one split, in manifest order, read in place from the object store.

    labels: (N,) int64 class indices
    """

    def __init__(self, blocks: Sequence[pa.Table], preprocess: Preprocess, *, held: bool) -> None:
        shape = (-1, 3, preprocess.crop, preprocess.crop)
        self._views: list[Pixels] = []
        found: list[tuple[Rows, Rows, Rows, Rows]] = []  # row, label, view, place within it
        for batch in (batch for block in blocks for batch in block.to_batches()):
            good = batch.column("error").is_null().to_numpy(zero_copy_only=False)
            good &= batch.column("held").to_numpy(zero_copy_only=False) == held
            (place,) = np.nonzero(good)
            view = np.full(len(place), len(self._views))
            rows, labels = (batch.column(name).to_numpy()[place] for name in ("row", "label"))
            found.append((rows, labels, view, place))
            stored = batch.column("pixels")
            buffer = np.frombuffer(stored.buffers()[1], np.uint8)
            start = stored.offset * image_bytes(preprocess)
            stop = start + len(stored) * image_bytes(preprocess)
            self._views.append(buffer[start:stop].reshape(shape))
        rows, labels, view, place = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(rows, kind="stable")
        self.labels: Rows = labels[order]
        self._view, self._place = view[order], place[order]
        self._shape = shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, rows: Rows) -> Pixels:
        """(N, 3, crop, crop) uint8, a copy of the given rows."""
        out = np.empty((len(rows), *self._shape), np.uint8)
        for at, row in enumerate(rows):
            out[at] = self._views[self._view[row]][self._place[row]]
        return out
