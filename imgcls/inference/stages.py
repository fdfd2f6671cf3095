"""Stages of labeling one chunk, from manifest rows to prediction columns: fetch, prepare, classify.

They are separate functions, so that each placement can run them where the hardware is. Every
placement composes the same ones: same batches, same bytes written. Ray is not used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from imgcls.data import image_files
from imgcls.data.decoding import decode, device_decode
from imgcls.data.decoding.decode import Pixels
from imgcls.data.decoding.device_decode import DeviceJpeg
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.manifests import manifest
from imgcls.errors import OK, CrashingImage, ImageError, NotFinite, StorageError
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.execution.worker import HeartbeatFn
from imgcls.inference.specs import ImageSpec, PredictSpec, build_run_schema
from imgcls.metrics.columns import encode_classes
from imgcls.models.classifier import Classifier
from imgcls.models.scores import PendingScores
from imgcls.runs.schema import EmbeddingType

FetchResult = bytes | StorageError | ImageError
"""The bytes of an image file, or why they cannot be read."""
DecodeFn = Callable[[bytes], tuple[Pixels, tuple[int, int]] | DeviceJpeg]
"""Decodes a file to pixels and display size, or verifies a JPEG for a GPU to decode."""
NO_CRASHED_ROWS: Mapping[int, str] = MappingProxyType({})


def _ignore_heartbeat() -> None:
    pass


@dataclass
class PreparedImages:
    """The images of N rows before the model: pixels of the good ones, errors of the others.

    pixels: uint8 (K, crop, crop, 3) of the K ok rows without those of `jpegs`, in row order; where
        a GPU decoded some of them, a list of tensors (3, crop, crop) on the GPU
    status, error, width, height: one entry per row; width and height are null unless ok
    jpegs:  by row, what a GPU is still to decode; the row is ok until the GPU finds otherwise
    """

    pixels: Pixels | list[torch.Tensor] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    error: list[str | None] = field(default_factory=list)
    width: list[int | None] = field(default_factory=list)
    height: list[int | None] = field(default_factory=list)
    jpegs: dict[int, DeviceJpeg] = field(default_factory=dict)

    def add_image(self, size: tuple[int, int]) -> None:
        """Add a good image of (width, height)."""
        self.status.append(OK)
        self.error.append(None)
        self.width.append(size[0])
        self.height.append(size[1])

    def add_jpeg(self, file: DeviceJpeg) -> None:
        """Add an image for a GPU to decode."""
        self.jpegs[len(self.status)] = file
        self.add_image(file.display_size)

    def add_error(self, error: StorageError | ImageError) -> None:
        """Add a row whose image cannot be used."""
        self.add_image((0, 0))
        self.set_error(len(self.status) - 1, error)

    def drop_jpeg(self, row: int, error: ImageError) -> None:
        """Make an error of a row that a GPU was to decode; any other row stays as it is."""
        if self.jpegs.pop(row, None) is not None:
            self.set_error(row, error)

    def set_error(self, row: int, error: StorageError | ImageError) -> None:
        """Make an error of a row that was ok."""
        self.status[row], self.error[row] = error.status, str(error)
        self.width[row] = self.height[row] = None


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
    files = image_files.read_ahead(urls, spec.io_concurrency, spec.max_bytes)
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
    file: FetchResult, decode_file: DecodeFn, prepared: PreparedImages
) -> Pixels | None:
    """Decode one row's image and add its status to `prepared`.

    Returns the pixels; None for a bad image, and for one that a GPU is to decode.
    """
    try:
        if not isinstance(file, bytes):
            raise file
        decoded = decode_file(file)
    except (StorageError, ImageError) as error:
        prepared.add_error(error)
        return None
    if isinstance(decoded, DeviceJpeg):
        prepared.add_jpeg(decoded)
        return None
    pixels, size = decoded
    prepared.add_image(size)
    return pixels


def prepare_on_cpu(
    spec: PredictSpec,
    rows: pa.Table,
    preprocess: Preprocess,
    timings: StageTimings,
    crashed_rows: Mapping[int, str] = NO_CRASHED_ROWS,
    heartbeat: HeartbeatFn = _ignore_heartbeat,
    max_device_bytes: int = 0,
) -> PreparedImages:
    """Fetch the rows of a chunk on a CPU, and decode what a GPU is not to decode.

    max_device_bytes: maximum total size of the JPEGs left for the GPU; 0 to decode every file here
    """
    prepared = PreparedImages()
    decode_here = partial(decode.decode_image, spec=preprocess, max_pixels=spec.max_pixels)
    left = max_device_bytes

    def decode_or_verify(data: bytes) -> tuple[Pixels, tuple[int, int]] | DeviceJpeg:
        nonlocal left
        if len(data) > left:
            return decode_here(data)
        found = device_decode.prepare_file(data, preprocess, max_pixels=spec.max_pixels)
        if isinstance(found, DeviceJpeg):
            left -= len(found.data)
        return found

    files = fetch_images(spec, rows, crashed_rows)
    decoded = list(_iter_decoded(files, decode_or_verify, prepared, timings, heartbeat))
    if decoded:
        prepared.pixels = decode.stack_images(decoded).transpose(0, 2, 3, 1)
    return prepared


def decode_on_device(
    prepared: PreparedImages, classifier: Classifier, timings: StageTimings
) -> None:
    """Decode the JPEGs of a prepared chunk on the classifier's device, where the pixels stay."""
    if not prepared.jpegs:
        return
    with timings.measure("prepare"):
        results = device_decode.decode_batch(
            list(prepared.jpegs.values()), classifier.preprocess, device=classifier.device
        )
        others: Iterator[torch.Tensor] = iter(())
        if not isinstance(prepared.pixels, list):
            others = iter(classifier.upload(_view_as_tensor(prepared.pixels)))
        by_row = dict(zip(prepared.jpegs, results, strict=True))
        pixels = []
        for row, status in enumerate(prepared.status):
            result = by_row.get(row)
            if isinstance(result, ImageError):
                prepared.set_error(row, result)
            elif status == OK:
                pixels.append(next(others) if result is None else result[0])
    prepared.pixels, prepared.jpegs = pixels, {}


def decode_alone(file: DeviceJpeg, classifier: Classifier) -> None:
    """Decode one file on the classifier's device, to see whether the process survives it."""
    device_decode.decode_batch([file], classifier.preprocess, device=classifier.device)


def classify_prepared(
    spec: PredictSpec,
    classifier: Classifier,
    rows: pa.Table,
    task: ChunkTask,
    prepared: PreparedImages,
    timings: StageTimings,
) -> pa.Table:
    """Classify prepared pixels: the second stage where there are GPUs.

    prepared: without `jpegs`
    """
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
    decode_file = partial(
        decode.decode_image, spec=classifier.preprocess, max_pixels=spec.max_pixels
    )
    for pixels in _iter_decoded(files, decode_file, prepared, timings, heartbeat):
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
        has_ood = spec.has_predictions and classifier.ood_detector is not None
        self._needs_embeddings = spec.embeddings is not None or has_ood
        self._pending: list[PendingScores] = []
        self.scores: list[npt.NDArray[np.float32]] = []
        self.embeddings: list[npt.NDArray[np.float32]] = []
        self.order: list[npt.NDArray[np.int64]] = []
        self.finite: list[npt.NDArray[np.bool_]] = []

    def submit(self, batch: Pixels | torch.Tensor) -> None:
        """Start a forward pass; a GPU runs it while the next batch is prepared."""
        self._pending.append(
            self._classifier.submit(
                batch, embeddings=self._needs_embeddings, top_k=self._spec.top_k
            )
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
    files: Iterator[FetchResult],
    decode_file: DecodeFn,
    prepared: PreparedImages,
    timings: StageTimings,
    heartbeat: HeartbeatFn,
) -> Iterator[Pixels]:
    for file in time_fetch(files, timings):
        with timings.measure("prepare"):
            pixels = prepare_image(file, decode_file, prepared)
        heartbeat()
        if pixels is not None:
            yield pixels


def build_schema(spec: PredictSpec, classifier: Classifier) -> pa.Schema:
    """The prediction columns that the spec asks for."""
    width = classifier.embedding_width if spec.embeddings else None
    return build_run_schema(spec, classifier.bundle.spec, width)


def _build_table(
    spec: PredictSpec,
    classifier: Classifier,
    rows: pa.Table,
    task: ChunkTask,
    prepared: PreparedImages,
    head: _BatchedForward,
) -> pa.Table:
    """The prediction columns of a chunk: one row per manifest row, null without an image."""
    schema = build_schema(spec, classifier)
    _mark_not_finite(prepared, head, classifier)
    # place[i]: the row of `scores` for row i, null where there is none
    ok = np.array([status == OK for status in prepared.status], bool)
    place = pa.array(np.where(ok, np.cumsum(ok) - 1, 0), mask=~ok)
    start = spec.plan.rows_of(task.chunk).start
    offsets = range(rows.num_rows) if task.offsets is None else task.offsets
    empty = np.empty((0, classifier.embedding_width), np.float32)
    embeddings = np.concatenate([empty, *head.embeddings])
    columns = {}
    if spec.has_predictions:
        columns = _build_predictions(spec, classifier, rows, head, ok, embeddings)
    if spec.embeddings:
        columns["embedding"] = _build_embeddings(embeddings, spec.embeddings)
    columns = {name: column.take(place) for name, column in columns.items()}
    if spec.has_predictions:
        columns["accepted"] = pc.fill_null(columns["accepted"], False)
    else:
        _mark_overflow(prepared, columns["embedding"], ok, spec.embeddings)
    columns["row"] = pa.array([start + offset for offset in offsets], pa.int64())
    columns["width"] = pa.array(prepared.width, pa.int32())
    columns["height"] = pa.array(prepared.height, pa.int32())
    columns["status"] = pa.array(prepared.status, pa.string()).dictionary_encode()
    columns["error"] = pa.array(prepared.error, pa.string())
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _build_predictions(
    spec: PredictSpec,
    classifier: Classifier,
    rows: pa.Table,
    head: _BatchedForward,
    ok: npt.NDArray[np.bool_],
    embeddings: npt.NDArray[np.float32],
) -> dict[str, pa.Array]:
    """The task's columns of the rows that are ok.

    embeddings: of these rows; of no rows if neither the run nor the bundle needs them
    """
    classes = classifier.classes
    codes = None
    if spec.label_column is not None:  # never for multilabel
        labels = manifest.normalize_labels(rows.column(spec.label_column))
        codes = encode_classes(pa.chunked_array([labels]), classes)[ok]
    return classifier.task.build_columns(
        np.concatenate([np.empty((0, len(classes)), np.float32), *head.scores]),
        classes,
        spec.thresholds,
        top_k=spec.top_k,
        order=np.concatenate(head.order) if head.order else None,
        codes=codes,
        label_sets=classifier.label_sets,
        ood=classifier.find_ood(embeddings),
        scores_type=spec.scores_type if spec.scores else None,
    )


def _mark_overflow(
    prepared: PreparedImages,
    embeddings: pa.Array,
    ok: npt.NDArray[np.bool_],
    dtype: EmbeddingType | None,
) -> None:
    """Set an error on the rows whose only result is an embedding beyond the range of its type."""
    has_value = embeddings.is_valid().to_numpy(zero_copy_only=False)
    remedy = "; pass --dtype float32" if dtype == "float16" else ""
    for row in np.flatnonzero(ok & ~has_value):
        error = NotFinite(f"the embedding is beyond the range of {dtype}{remedy}")
        prepared.set_error(int(row), error)


def _build_embeddings(
    embeddings: npt.NDArray[np.float32], dtype: EmbeddingType
) -> pa.FixedSizeListArray:
    """The column of (N, E) embeddings; null where a value is beyond the range of the type."""
    with np.errstate(over="ignore"):
        stored = embeddings.astype(dtype)
    mask = pa.array(~np.isfinite(stored).all(1))
    return pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1], mask=mask)


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
        prepared.set_error(row, error)
