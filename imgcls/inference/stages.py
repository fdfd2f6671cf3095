"""Stages of labeling one chunk, from manifest rows to prediction columns: fetch, prepare, classify.

They are separate functions, so that each placement can run them where the hardware is. Every
placement composes the same ones: same batches, same bytes written. Ray is not used here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from imgcls.data import decode, device_decode, filesystem, manifest
from imgcls.data.decode import Pixels
from imgcls.data.preprocess import Preprocess
from imgcls.errors import OK, CrashingImage, ImageError, StorageError
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.execution.worker import HeartbeatFn
from imgcls.inference.specs import ImageSpec, PredictSpec
from imgcls.metrics.columns import encode_classes
from imgcls.models.classifier import Classifier
from imgcls.models.scores import PendingScores
from imgcls.runs.schema import build_prediction_schema

FetchResult = bytes | StorageError | ImageError
"""The bytes of an image file, or why they cannot be read."""
NO_CRASHED_ROWS: Mapping[int, str] = MappingProxyType({})


def _ignore_heartbeat() -> None:
    pass


@dataclass
class PreparedImages:
    """The images of N rows before the model: pixels of the good ones, errors of the others.

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
        """Add a good image of (width, height)."""
        self.status.append(OK)
        self.error.append(None)
        self.width.append(size[0])
        self.height.append(size[1])

    def add_error(self, error: StorageError | ImageError) -> None:
        """Add a row whose image cannot be used."""
        self.status.append(error.status)
        self.error.append(str(error))
        self.width.append(None)
        self.height.append(None)


def fetch_images(
    spec: ImageSpec, rows: pa.Table, crashed_rows: Mapping[int, str] = NO_CRASHED_ROWS
) -> Iterator[FetchResult]:
    """Each row's file or error, in order; reads run ahead of the consumer.

    crashed_rows: message by row, counted from the first of `rows`, of rows not to be touched
    """
    paths = rows.column(spec.path_column).to_pylist()
    urls = (
        manifest.resolve_path(path, spec.root)
        for row, path in enumerate(paths)
        if row not in crashed_rows
    )
    files = filesystem.read_ahead(urls, spec.io_concurrency, spec.max_bytes)
    if not crashed_rows:
        return files
    return (
        CrashingImage(crashed_rows[row]) if row in crashed_rows else next(files)
        for row in range(len(paths))
    )


def time_fetch(files: Iterator[FetchResult], timings: StageTimings) -> Iterator[FetchResult]:
    """The same files; the time that the consumer waits for them is added to `fetch`."""
    end = object()
    while True:
        with timings.measure("fetch"):
            file: Any = next(files, end)
        if file is end:
            return
        if isinstance(file, bytes):
            timings.bytes += len(file)
        yield file


def prepare_image(
    file: FetchResult, preprocess: Preprocess, max_pixels: int, prepared: PreparedImages
) -> Pixels | None:
    """Decode one row's image and add its status to `prepared`; returns the pixels if it is good."""
    try:
        if not isinstance(file, bytes):
            raise file
        pixels, size = decode.decode_image(file, preprocess, max_pixels=max_pixels)
    except (StorageError, ImageError) as error:
        prepared.add_error(error)
        return None
    prepared.add_image(size)
    return pixels


def prepare_on_cpu(
    spec: PredictSpec,
    rows: pa.Table,
    preprocess: Preprocess,
    timings: StageTimings,
    crashed_rows: Mapping[int, str] = NO_CRASHED_ROWS,
    heartbeat: HeartbeatFn = _ignore_heartbeat,
) -> PreparedImages:
    """Fetch and decode all rows of a chunk on a CPU, for a GPU to classify."""
    prepared = PreparedImages()
    files = fetch_images(spec, rows, crashed_rows)
    decoded = list(_iter_decoded(spec, files, preprocess, prepared, timings, heartbeat))
    if decoded:
        prepared.pixels = decode.stack_images(decoded).transpose(0, 2, 3, 1)
    return prepared


def prepare_on_device(
    spec: PredictSpec, files: Sequence[FetchResult], classifier: Classifier, timings: StageTimings
) -> PreparedImages:
    """Decode fetched files in a batch on the classifier's device, where the pixels stay."""
    prepared = PreparedImages()
    with timings.measure("prepare"):
        decoded = iter(
            device_decode.decode_batch(
                [file for file in files if isinstance(file, bytes)],
                classifier.preprocess,
                device=classifier.device,
                max_pixels=spec.max_pixels,
            )
        )
        pixels: list[torch.Tensor] = []
        for file in files:
            result = next(decoded) if isinstance(file, bytes) else file
            timings.bytes += len(file) if isinstance(file, bytes) else 0
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
    task: ChunkTask,
    prepared: PreparedImages,
    timings: StageTimings,
) -> pa.Table:
    """Classify prepared pixels: the second stage where there are GPUs."""
    head = _BatchedForward(spec, classifier)
    pixels = prepared.pixels
    images = pixels if isinstance(pixels, list) else _view_as_tensor(pixels)
    with timings.measure("classify"):
        for start in range(0, len(images), spec.batch_size):
            batch = images[start : start + spec.batch_size]
            head.submit(torch.stack(batch) if isinstance(batch, list) else batch)
        head.collect(timings)
    return _build_table(spec, classifier, rows, task, prepared, head)


def predict_chunk(
    spec: PredictSpec,
    classifier: Classifier,
    rows: pa.Table,
    task: ChunkTask,
    timings: StageTimings,
    crashed_rows: Mapping[int, str] = NO_CRASHED_ROWS,
    heartbeat: HeartbeatFn = _ignore_heartbeat,
) -> pa.Table:
    """Fetch, decode and classify a chunk, with one batch of pixels in memory at a time."""
    prepared = PreparedImages()
    head = _BatchedForward(spec, classifier)
    batch: list[Pixels] = []
    files = fetch_images(spec, rows, crashed_rows)
    for pixels in _iter_decoded(spec, files, classifier.preprocess, prepared, timings, heartbeat):
        batch.append(pixels)
        if len(batch) == spec.batch_size:
            with timings.measure("classify"):
                head.submit(decode.stack_images(batch))
            batch.clear()
    with timings.measure("classify"):
        if batch:
            head.submit(decode.stack_images(batch))
        head.collect(timings)
    return _build_table(spec, classifier, rows, task, prepared, head)


def _view_as_tensor(pixels: Pixels) -> torch.Tensor:
    """(K, crop, crop, 3) pixels as (K, 3, crop, crop), without a copy.

    They may lie in shared memory that is read-only, for which `torch.from_numpy` prints a warning.
    """
    flat = torch.utils.dlpack.from_dlpack(pa.array(pixels.reshape(-1)))
    return flat.view(pixels.shape).permute(0, 3, 1, 2)


class _BatchedForward:
    """Forward passes of a chunk, batch by batch; collects their results."""

    def __init__(self, spec: PredictSpec, classifier: Classifier) -> None:
        self._spec = spec
        self._classifier = classifier
        self._pending: list[PendingScores] = []
        self.scores: list[npt.NDArray[np.float32]] = []
        self.embeddings: list[npt.NDArray[np.float32]] = []
        self.order: list[npt.NDArray[np.int64]] = []
        self.finite: list[npt.NDArray[np.bool_]] = []

    def submit(self, batch: Pixels | torch.Tensor) -> None:
        """Start a forward pass; a GPU runs it while the next batch is prepared."""
        self._pending.append(
            self._classifier.submit(batch, embeddings=self._spec.embeddings, top_k=self._spec.top_k)
        )

    def collect(self, timings: StageTimings) -> None:
        """Wait for the scores of all batches; adds the time that the GPU took."""
        for pending in self._pending:
            result = pending.get()
            finite = result.is_finite
            self.finite.append(finite)
            self.scores.append(result.scores[finite])
            if result.embedding is not None:
                self.embeddings.append(result.embedding[finite])
            if result.order is not None:
                self.order.append(result.order[finite])
            timings.gpu += pending.gpu_seconds()
        self._pending.clear()


def _iter_decoded(
    spec: PredictSpec,
    files: Iterator[FetchResult],
    preprocess: Preprocess,
    prepared: PreparedImages,
    timings: StageTimings,
    heartbeat: HeartbeatFn,
) -> Iterator[Pixels]:
    for file in time_fetch(files, timings):
        with timings.measure("prepare"):
            pixels = prepare_image(file, preprocess, spec.max_pixels, prepared)
        heartbeat()
        if pixels is not None:
            yield pixels


def build_schema(spec: PredictSpec, classifier: Classifier) -> pa.Schema:
    """The prediction columns that the spec asks for."""
    return build_prediction_schema(
        labeled=spec.label_column is not None,
        scores=len(classifier.classes) if spec.scores else None,
        scores_type=spec.scores_type,
        embedding=classifier.embedding_width if spec.embeddings else None,
    )


def _build_table(
    spec: PredictSpec,
    classifier: Classifier,
    rows: pa.Table,
    task: ChunkTask,
    prepared: PreparedImages,
    head: _BatchedForward,
) -> pa.Table:
    """The prediction columns of a chunk: one row per manifest row, null without an image."""
    classes = classifier.classes
    schema = build_schema(spec, classifier)
    scores = np.concatenate(head.scores) if head.scores else np.empty((0, len(classes)), np.float32)
    _mark_not_finite(prepared, head, classifier)
    # place[i]: the row of `scores` for row i, null where there is none
    ok = np.array([status == OK for status in prepared.status], bool)
    place = pa.array(np.where(ok, np.cumsum(ok) - 1, 0), mask=~ok)
    start = spec.plan.rows_of(task.chunk).start
    offsets = range(rows.num_rows) if task.offsets is None else task.offsets
    codes = None
    if spec.label_column is not None:
        labels = manifest.normalize_labels(rows.column(spec.label_column))
        codes = encode_classes(pa.chunked_array([labels]), classes)[ok]
    columns = classifier.task.build_columns(
        scores,
        classes,
        spec.thresholds,
        top_k=spec.top_k,
        order=np.concatenate(head.order) if head.order else None,
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
    """Set an error on the rows without finite scores, which `head` left out."""
    finite = np.concatenate([np.empty(0, bool), *head.finite])
    if finite.all():
        return
    error = classifier.build_not_finite_error()
    good = [row for row, status in enumerate(prepared.status) if status == OK]
    for row in np.array(good)[~finite]:
        prepared.status[row], prepared.error[row] = error.status, str(error)
        prepared.width[row] = prepared.height[row] = None
