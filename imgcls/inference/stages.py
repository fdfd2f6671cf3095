"""One chunk, from manifest rows to a table of predictions: fetch, prepare, classify.

The stages are separate functions so that each cluster layout may put them where the hardware is,
and every layout composes the same ones: same batches, same bytes out. Nothing here knows Ray.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from imgcls.data import decode, filesystem, manifest
from imgcls.data.decode import Pixels
from imgcls.data.preprocess import Preprocess
from imgcls.errors import CrashingImage, ImageError, StorageError
from imgcls.execution.messages import ChunkTask, PredictSpec, RunSpec, StageTimings
from imgcls.metrics.columns import encode_classes
from imgcls.models.classifier import Classifier, PendingScores
from imgcls.runs import layout

FetchResult = bytes | StorageError | ImageError
HeartbeatFn = Callable[[], None]
NO_CRASHED_ROWS: Mapping[int, str] = MappingProxyType({})


def _ignore_heartbeat() -> None:
    pass


@dataclass
class PreparedImages:
    """What became of N rows' images before the model: pixels of the good ones, reasons of the rest.

    pixels: uint8 (K, crop, crop, 3) of the K ok rows, in row order; where a GPU decoded them, a
        list of tensors (3, crop, crop)
    status, error, width, height: one entry per row; width and height are null unless ok
    """

    pixels: Pixels | list[torch.Tensor] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    error: list[str | None] = field(default_factory=list)
    width: list[int | None] = field(default_factory=list)
    height: list[int | None] = field(default_factory=list)

    def add_image(self, size: tuple[int, int]) -> None:
        """A good image of (width, height)."""
        self.status.append(layout.OK)
        self.error.append(None)
        self.width.append(size[0])
        self.height.append(size[1])

    def add_error(self, error: StorageError | ImageError) -> None:
        """A row without an image that can be used."""
        self.status.append(error.status)
        self.error.append(str(error))
        self.width.append(None)
        self.height.append(None)


def read_chunk_rows(spec: RunSpec, work: ChunkTask) -> pa.Table:
    """The manifest columns of a chunk's rows, read from its shard."""
    if work.rows is not None:
        return work.rows
    part = spec.plan.part_of(work.chunk)
    group = work.chunk - spec.plan.chunks_of(part).start
    with _SHARD_LOCK:  # one file handle for the threads of a worker
        shard = _open_shard(layout.shard_url(spec.output, part), spec.plan.run_id)
        table: pa.Table = shard.read_row_group(group)
    return table


_SHARD_LOCK = threading.Lock()


@functools.lru_cache(maxsize=2)
def _open_shard(url: str, run_id: str) -> pq.ParquetFile:
    """Kept open between chunks; by run, since one that starts over has shards of the same name."""
    return pq.ParquetFile(filesystem.open_read(url), pre_buffer=False)


def fetch_images(
    spec: RunSpec, rows: pa.Table, crashed: Mapping[int, str] = NO_CRASHED_ROWS
) -> Iterator[FetchResult]:
    """Each row's bytes or why they cannot be had, reads running ahead of the consumer.

    crashed: what to say of rows, counted from the first of `rows`, that are not to be touched
    """
    paths = rows.column(spec.path_column).to_pylist()
    urls = (
        manifest.resolve_path(path, spec.root) for i, path in enumerate(paths) if i not in crashed
    )
    blobs = filesystem.read_ahead(urls, spec.io_concurrency, spec.max_bytes)
    if not crashed:
        return blobs
    return (CrashingImage(crashed[i]) if i in crashed else next(blobs) for i in range(len(paths)))


def prepare_image(
    blob: FetchResult, preprocess: Preprocess, max_pixels: int, prepared: PreparedImages
) -> Pixels | None:
    """Decode one row's image, noting its status; the pixels when it is good."""
    try:
        if not isinstance(blob, bytes):
            raise blob
        pixels, size = decode.decode_image(blob, preprocess, max_pixels=max_pixels)
    except (StorageError, ImageError) as error:
        prepared.add_error(error)
        return None
    prepared.add_image(size)
    return pixels


def prepare_on_cpu(
    spec: PredictSpec,
    rows: pa.Table,
    preprocess: Preprocess,
    spent: StageTimings,
    crashed: Mapping[int, str] = NO_CRASHED_ROWS,
    beat: HeartbeatFn = _ignore_heartbeat,
) -> PreparedImages:
    """Fetch and decode all rows of a chunk on CPUs, for a GPU to classify."""
    prepared = PreparedImages()
    blobs = fetch_images(spec, rows, crashed)
    decoded = list(_iter_decoded(spec, blobs, preprocess, prepared, spent, beat))
    if decoded:
        prepared.pixels = decode.stack_images(decoded).transpose(0, 2, 3, 1)
    return prepared


def prepare_on_device(
    spec: PredictSpec, blobs: Sequence[FetchResult], classifier: Classifier, spent: StageTimings
) -> PreparedImages:
    """Decode fetched rows in bulk on the classifier's device, where the pixels stay."""
    prepared = PreparedImages()
    with spent.measure("prepare"):
        decoded = iter(
            decode.decode_batch(
                [blob for blob in blobs if isinstance(blob, bytes)],
                classifier.preprocess,
                device=classifier.device,
                max_pixels=spec.max_pixels,
            )
        )
        pixels: list[torch.Tensor] = []
        for blob in blobs:
            result = next(decoded) if isinstance(blob, bytes) else blob
            spent.bytes += len(blob) if isinstance(blob, bytes) else 0
            if isinstance(result, tuple):
                pixels.append(result[0])
                prepared.add_image(result[1])
            else:
                prepared.add_error(result)
    prepared.pixels = pixels
    return prepared


def classify_prepared(
    spec: PredictSpec,
    classifier: Classifier,
    rows: pa.Table,
    work: ChunkTask,
    prepared: PreparedImages,
    spent: StageTimings,
) -> pa.Table:
    """Run the model over prepared pixels; the second half of the layouts with GPUs."""
    head = _BatchedForward(spec, classifier)
    with spent.measure("classify"):
        for start in range(0, len(prepared.pixels), spec.batch_size):
            head.submit(_stack_batch(prepared.pixels[start : start + spec.batch_size]))
        head.collect(spent)
    return _build_table(spec, classifier, rows, work, prepared, head)


def predict_chunk(
    spec: PredictSpec,
    classifier: Classifier,
    rows: pa.Table,
    work: ChunkTask,
    spent: StageTimings,
    crashed: Mapping[int, str] = NO_CRASHED_ROWS,
    beat: HeartbeatFn = _ignore_heartbeat,
) -> pa.Table:
    """Fetch, decode and classify a chunk, holding one batch of pixels at a time.

    beat: called after each row, to tell that it goes on
    """
    prepared = PreparedImages()
    head = _BatchedForward(spec, classifier)
    batch: list[Pixels] = []
    blobs = fetch_images(spec, rows, crashed)
    for pixels in _iter_decoded(spec, blobs, classifier.preprocess, prepared, spent, beat):
        batch.append(pixels)
        if len(batch) == spec.batch_size:
            with spent.measure("classify"):
                head.submit(decode.stack_images(batch))
            batch.clear()
    with spent.measure("classify"):
        if batch:
            head.submit(decode.stack_images(batch))
        head.collect(spent)
    return _build_table(spec, classifier, rows, work, prepared, head)


def read_committed(spec: RunSpec, work: ChunkTask) -> pa.Table | None:
    """The statuses of a chunk that is durable: a lost worker's block is done anew."""
    url = _get_chunk_url(spec, work)
    if not filesystem.exists(url):
        return None
    return pq.read_table(filesystem.open_read(url), columns=["status"])


def _get_chunk_url(spec: RunSpec, work: ChunkTask) -> str:
    name = layout.chunk_url if work.offsets is None else layout.retry_url
    return name(spec.output, spec.plan.part_of(work.chunk), work.chunk, spec.plan.run_id)


def write_chunk(spec: RunSpec, work: ChunkTask, table: pa.Table, spent: StageTimings) -> None:
    """Write a chunk under its own name, atomically; doing it twice writes the same bytes."""
    with spent.measure("commit"):
        layout.write_table(_get_chunk_url(spec, work), table)


def _stack_batch(pixels: Pixels | list[torch.Tensor]) -> Pixels | torch.Tensor:
    return torch.stack(pixels) if isinstance(pixels, list) else pixels.transpose(0, 3, 1, 2)


class _BatchedForward:
    """Gathers what the model says, batch after batch."""

    def __init__(self, spec: PredictSpec, classifier: Classifier) -> None:
        self._spec = spec
        self._classifier = classifier
        self._pending: list[PendingScores] = []
        self.scores: list[npt.NDArray[np.float32]] = []
        self.embeddings: list[npt.NDArray[np.float32]] = []
        self.finite: list[npt.NDArray[np.bool_]] = []

    def submit(self, batch: Pixels | torch.Tensor) -> None:
        """Hand a batch to the device; a GPU works on it while the next one is made ready."""
        self._pending.append(self._classifier.submit(batch, embeddings=self._spec.embeddings))

    def collect(self, spent: StageTimings) -> None:
        """Have the scores of all batches, and the time that a GPU took for them."""
        for pending in self._pending:
            result = pending.get()
            finite = result.is_finite
            self.finite.append(finite)
            self.scores.append(result.scores[finite])
            if result.embedding is not None:
                self.embeddings.append(result.embedding[finite])
            spent.gpu += pending.gpu_seconds()
        self._pending.clear()


def _iter_decoded(
    spec: PredictSpec,
    blobs: Iterator[FetchResult],
    preprocess: Preprocess,
    prepared: PreparedImages,
    spent: StageTimings,
    beat: HeartbeatFn,
) -> Iterator[Pixels]:
    end = object()
    while True:
        with spent.measure("fetch"):
            blob = next(blobs, end)
        if blob is end:
            return
        with spent.measure("prepare"):
            pixels = prepare_image(blob, preprocess, spec.max_pixels, prepared)  # type: ignore[arg-type]
        if isinstance(blob, bytes):
            spent.bytes += len(blob)
        beat()
        if pixels is not None:
            yield pixels


def _build_table(
    spec: PredictSpec,
    classifier: Classifier,
    rows: pa.Table,
    work: ChunkTask,
    prepared: PreparedImages,
    head: _BatchedForward,
) -> pa.Table:
    """The prediction columns of a chunk: one row per manifest row, null without an image."""
    classes, task = classifier.classes, classifier.task
    schema = layout.build_prediction_schema(
        labelled=spec.label_column is not None,
        scores=len(classes) if spec.scores else None,
        scores_type=spec.scores_type,
        embedding=classifier.embedding_width if spec.embeddings else None,
    )
    scores = np.concatenate(head.scores) if head.scores else np.empty((0, len(classes)), np.float32)
    _mark_not_finite(prepared, head, classifier)
    # place[i] is the row of `scores` that belongs to row i; a null where there is none
    ok = np.array([status == layout.OK for status in prepared.status], bool)
    place = pa.array(np.where(ok, np.cumsum(ok) - 1, 0), mask=~ok)
    start = spec.plan.rows_of(work.chunk).start
    offsets = range(rows.num_rows) if work.offsets is None else work.offsets
    codes = None
    if spec.label_column is not None:
        labels = manifest.normalize_labels(rows.column(spec.label_column))
        codes = encode_classes(pa.chunked_array([labels]), classes)[ok]
    columns = task.build_columns(
        scores,
        classes,
        spec.thresholds,
        top_k=spec.top_k,
        codes=codes,
        scores_type=spec.scores_type if spec.scores else None,
    )
    if spec.embeddings:
        width = classifier.embedding_width
        stacked = np.concatenate([np.empty((0, width), np.float32), *head.embeddings])
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(stacked.ravel()), width)
    columns = {name: column.take(place) for name, column in columns.items()}
    columns["accepted"] = pc.fill_null(columns["accepted"], False)
    columns["row"] = pa.array([start + offset for offset in offsets], pa.int64())
    columns["width"] = pa.array(prepared.width, pa.int32())
    columns["height"] = pa.array(prepared.height, pa.int32())
    columns["status"] = pa.array(prepared.status, pa.string()).dictionary_encode()
    columns["error"] = pa.array(prepared.error, pa.string())
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _mark_not_finite(
    prepared: PreparedImages, head: _BatchedForward, classifier: Classifier
) -> None:
    """Give the rows without finite scores, which `head` left out, an error instead of a label."""
    finite = np.concatenate([np.empty(0, bool), *head.finite])
    if finite.all():
        return
    error = classifier.build_not_finite_error()
    good = [row for row, status in enumerate(prepared.status) if status == layout.OK]
    for row in np.array(good)[~finite]:
        prepared.status[row], prepared.error[row] = error.status, str(error)
        prepared.width[row] = prepared.height[row] = None
