"""Decoding of training images to uint8 pixels, and batches of them.

Shared by the two kinds of data set: `cached` decodes each image once, `streaming` in every epoch.
An image that cannot be decoded is left out and reported, never replaced by another.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from imgcls.data import image_files
from imgcls.data.decoding import decode
from imgcls.data.decoding.decode import Pixels
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.storage.storage_settings import bind_settings
from imgcls.errors import OK, ImageError, StorageError
from imgcls.training.sampler import Int64Array

MAX_BLOCK_BYTES = 32 << 20
"""Maximum size of a decoded block; Ray Data splits blocks above 128 MiB."""
MAX_BLOCK_ROWS = 256
PREFETCH_BATCHES = 2
"""Number of batches prepared while the network computes."""


@dataclass(frozen=True)
class DecodeSettings:
    """How the images of each split are decoded.

    train:     larger than the network's input if random crops are taken from it
    val:       the same as in prediction
    max_bytes: maximum size of an image file; a larger one counts as one that cannot be decoded
    """

    train: Preprocess
    val: Preprocess
    max_bytes: int = image_files.MAX_IMAGE_BYTES

    @classmethod
    def from_preprocess(
        cls, preprocess: Preprocess, *, cropped: bool, max_bytes: int = image_files.MAX_IMAGE_BYTES
    ) -> DecodeSettings:
        """The settings of both splits. cropped: whether training takes random crops"""
        if cropped and preprocess.mode == "crop":
            larger = preprocess.model_copy(update={"crop": preprocess.resize})
            return cls(larger, preprocess, max_bytes)
        return cls(preprocess, preprocess, max_bytes)

    def for_split(self, *, held: bool) -> Preprocess:
        return self.val if held else self.train

    def compute_decoded_bytes(self, rows: pa.Table) -> int:
        """Size of all these rows when decoded, in bytes."""
        held = rows.column("held").to_numpy().sum()
        train = rows.num_rows - held
        return int(held * compute_image_bytes(self.val) + train * compute_image_bytes(self.train))


@dataclass(frozen=True)
class DecodeFailure:
    """An image that could not be decoded.

    row:    in its manifest
    status: of the error, as in a table of predictions
    """

    url: str | None
    label: int
    held: bool
    error: str
    row: int
    status: str


@dataclass(frozen=True)
class Batch:
    """Decoded images with their labels, without those that could not be decoded.

    pixels:   (N, 3, S, S) uint8
    labels:   (N,) int64 class indices
    failures: the images that were left out
    rows:     (N,) int64 rows of the images in their manifest; only validation uses them
    """

    pixels: Pixels
    labels: Int64Array
    failures: tuple[DecodeFailure, ...] = ()
    rows: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))


class ImageDataset(Protocol):
    """The images of one split, as a worker reads them. labels: (N,) int64 class indices."""

    labels: Int64Array

    def __len__(self) -> int: ...

    def iter_batches(self, rows: Sequence[Int64Array]) -> Iterator[Batch]:
        """One batch for each array of row indices, in order, prefetched."""


def compute_block_rows(preprocess: Preprocess) -> int:
    """Number of rows of a decoded block."""
    return max(1, min(MAX_BLOCK_ROWS, MAX_BLOCK_BYTES // compute_image_bytes(preprocess)))


def compute_image_bytes(preprocess: Preprocess) -> int:
    """Size of one decoded image, in bytes."""
    return 3 * preprocess.crop**2


def decode_block(rows: pa.Table, settings: DecodeSettings) -> pa.Table:
    """Fetch and decode rows of one split; adds the columns status, error and pixels.

    status and error are strings, of a decoded image "ok" and null. pixels is binary, of a row with
    an error zeros.
    """
    preprocess = settings.for_split(held=rows.column("held")[0].as_py())
    shape = (rows.num_rows, 3, preprocess.crop, preprocess.crop)
    stacked = np.zeros(shape, np.uint8)
    statuses: list[str] = []
    errors: list[str | None] = []
    blobs = image_files.read_ahead(rows.column("url").to_pylist(), max_bytes=settings.max_bytes)
    for index, data in enumerate(blobs):
        try:
            if not isinstance(data, bytes):
                raise data
            stacked[index] = decode.decode_image(data, preprocess)[0]
            statuses.append(OK)
            errors.append(None)
        except (ImageError, StorageError) as error:
            statuses.append(error.status)
            errors.append(str(error))
    offsets = np.arange(rows.num_rows + 1, dtype=np.int32) * compute_image_bytes(preprocess)
    pixels = pa.Array.from_buffers(
        pa.binary(), rows.num_rows, [None, pa.py_buffer(offsets), pa.py_buffer(stacked)]
    )
    found = {"status": statuses, "error": errors}
    for name, values in found.items():
        rows = rows.append_column(name, pa.array(values, pa.string()))
    return rows.append_column("pixels", pixels)


def list_failures(rows: Iterable[Mapping[str, Any]]) -> tuple[DecodeFailure, ...]:
    """The failed ones among decoded rows, each a dictionary of the columns but the pixels."""
    names = [each.name for each in fields(DecodeFailure)]
    return tuple(
        DecodeFailure(**{name: row[name] for name in names})
        for row in rows
        if row["error"] is not None
    )


def view_pixels(batch: pa.RecordBatch, preprocess: Preprocess) -> Pixels:
    """(N, 3, crop, crop) uint8: the column `pixels` as an array, without a copy."""
    stored, width = batch.column("pixels"), compute_image_bytes(preprocess)
    offsets = np.frombuffer(stored.buffers()[1], np.int32)
    start = int(offsets[stored.offset])
    buffer = np.frombuffer(stored.buffers()[2], np.uint8)
    shape = (len(stored), 3, preprocess.crop, preprocess.crop)
    return buffer[start : start + len(stored) * width].reshape(shape)


def prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Read `batches` ahead in a thread, which ends when the returned iterator is closed."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCH_BATCHES)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            put(error)

    threading.Thread(target=bind_settings(produce), name="batches", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
