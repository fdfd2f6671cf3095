"""Image files to decoded uint8 pixels, and the batches that a worker makes of them.

Owns what both ways to a worker share: `cache` decodes once for all epochs, `stream` anew in every
epoch. Promises that a bad image is left out and told, never replaced.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from imgcls.data import decode, filesystem
from imgcls.data.decode import Pixels
from imgcls.data.preprocess import Preprocess
from imgcls.data.storage_settings import bind_settings
from imgcls.errors import ImageError, StorageError
from imgcls.training.sampler import Int64Array

MAX_BLOCK_BYTES = 32 << 20
"""Largest decoded block; far below Ray Data's 128 MiB, above which it would split it."""
MAX_BLOCK_ROWS = 256
PREFETCH_BATCHES = 2
"""Batches gathered while the network is at work."""


@dataclass(frozen=True)
class DecodeSettings:
    """How each split is decoded.

    train:     larger than what the network sees where random crops are to be taken from it
    val:       just as labelling will decode
    max_bytes: of an image file; a larger one is left out as one that cannot be decoded
    """

    train: Preprocess
    val: Preprocess
    max_bytes: int = filesystem.MAX_IMAGE_BYTES

    @classmethod
    def from_preprocess(
        cls, preprocess: Preprocess, *, cropped: bool, max_bytes: int = filesystem.MAX_IMAGE_BYTES
    ) -> DecodeSettings:
        """cropped: whether training takes random crops"""
        if cropped and preprocess.mode == "crop":
            larger = preprocess.model_copy(update={"crop": preprocess.resize})
            return cls(larger, preprocess, max_bytes)
        return cls(preprocess, preprocess, max_bytes)

    def for_split(self, *, held: bool) -> Preprocess:
        return self.val if held else self.train

    def compute_decoded_bytes(self, rows: pa.Table) -> int:
        """Bytes that all these rows take when decoded."""
        held = rows.column("held").to_numpy().sum()
        train = rows.num_rows - held
        return int(held * compute_image_bytes(self.val) + train * compute_image_bytes(self.train))


@dataclass(frozen=True)
class DecodeFailure:
    """An image that could not be decoded."""

    url: str | None
    label: int
    held: bool
    error: str


@dataclass(frozen=True)
class Batch:
    """pixels (N, 3, S, S) uint8, labels (N,) int64; failed images are left out and counted."""

    pixels: Pixels
    labels: Int64Array
    failures: tuple[DecodeFailure, ...] = ()


class ImageDataset(Protocol):
    """One split, as a worker sees it. labels: (N,) int64 class indices."""

    labels: Int64Array

    def __len__(self) -> int: ...

    def iter_batches(self, rows: Sequence[Int64Array]) -> Iterator[Batch]:
        """A batch for each of the given sets of rows, in order, gathered ahead of their use."""


def compute_block_rows(preprocess: Preprocess) -> int:
    """Rows of a decoded block."""
    return max(1, min(MAX_BLOCK_ROWS, MAX_BLOCK_BYTES // compute_image_bytes(preprocess)))


def compute_image_bytes(preprocess: Preprocess) -> int:
    """Bytes of one decoded image."""
    return 3 * preprocess.crop**2


def decode_block(rows: pa.Table, views: DecodeSettings) -> pa.Table:
    """Fetch and decode rows of one split: the same with error (string) and pixels (binary).

    A row with an error has pixels that mean nothing.
    """
    preprocess = views.for_split(held=rows.column("held")[0].as_py())
    shape = (rows.num_rows, 3, preprocess.crop, preprocess.crop)
    stacked = np.zeros(shape, np.uint8)
    errors: list[str | None] = []
    blobs = filesystem.read_ahead(rows.column("url").to_pylist(), max_bytes=views.max_bytes)
    for place, data in enumerate(blobs):
        try:
            if isinstance(data, StorageError):
                raise data
            stacked[place] = decode.decode_image(data, preprocess)[0]
            errors.append(None)
        except (ImageError, StorageError) as error:
            errors.append(str(error))
    offsets = np.arange(rows.num_rows + 1, dtype=np.int32) * compute_image_bytes(preprocess)
    pixels = pa.Array.from_buffers(
        pa.binary(), rows.num_rows, [None, pa.py_buffer(offsets), pa.py_buffer(stacked)]
    )
    return rows.append_column("error", pa.array(errors, pa.string())).append_column(
        "pixels", pixels
    )


def view_pixels(batch: pa.RecordBatch, preprocess: Preprocess) -> Pixels:
    """(N, 3, crop, crop) uint8, the bytes of the column `pixels` in place."""
    stored, width = batch.column("pixels"), compute_image_bytes(preprocess)
    offsets = np.frombuffer(stored.buffers()[1], np.int32)
    start = int(offsets[stored.offset])
    buffer = np.frombuffer(stored.buffers()[2], np.uint8)
    shape = (len(stored), 3, preprocess.crop, preprocess.crop)
    return buffer[start : start + len(stored) * width].reshape(shape)


def prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, made by a thread that stays some ahead; it ends when they are let go."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCH_BATCHES)
    stop = threading.Event()

    def give(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                give(batch)
                if stop.is_set():
                    return
            give(None)
        except BaseException as error:  # noqa: BLE001  it is raised again where it is awaited
            give(error)

    threading.Thread(target=bind_settings(work), name="batches", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
