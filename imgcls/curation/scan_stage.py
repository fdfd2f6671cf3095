"""Scan of one chunk: manifest rows in, a table of image features out.

The counterpart of `inference.stages` for a scan. Fetches as that does, computes the features, and
the embeddings if there is a model. Nothing here depends on Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcls.curation.scan_worker import ScanSpec
from imgcls.data.decoding import decode
from imgcls.data.decoding.decode import Pixels
from imgcls.data.decoding.image_features import FEATURE_FIELDS, compute_features
from imgcls.errors import OK, ImageError, StorageError
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.execution.worker import HeartbeatFn
from imgcls.inference.stages import NO_CRASHED_ROWS, FetchResult, fetch_images, time_fetch
from imgcls.models.classifier import Classifier
from imgcls.models.embeddings import normalize_embeddings


def scan_schema(embedding_width: int | None) -> pa.Schema:
    """The columns of a scan; `embedding_width` is None without a model."""
    embedding = (
        []
        if embedding_width is None
        else [pa.field("embedding", pa.list_(pa.float16(), embedding_width))]
    )
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error", pa.string()),
            pa.field("bytes", pa.int64()),
            *FEATURE_FIELDS,
            *embedding,
        ]
    )


def scan_chunk(
    spec: ScanSpec,
    classifier: Classifier | None,
    rows: pa.Table,
    task: ChunkTask,
    timings: StageTimings,
    crashed: Mapping[int, str] = NO_CRASHED_ROWS,
    heartbeat: HeartbeatFn = lambda: None,
) -> pa.Table:
    """Compute the features of each row's image: one row each, null features without an image.

    crashed:   error messages of rows that must not be processed, by index in `rows`
    heartbeat: called after each row
    """
    schema = scan_schema(None if classifier is None else classifier.embedding_width)
    start = spec.plan.rows_of(task.chunk).start
    results: list[dict[str, Any]] = []
    embeddings = _EmbeddingBatcher(classifier, spec.batch_size)
    for index, blob in enumerate(time_fetch(fetch_images(spec, rows, crashed), timings)):
        with timings.measure("prepare"):
            result: dict[str, Any] = {"row": start + index, "status": OK, "error": None}
            try:
                result |= _scan_image(spec, blob, embeddings)
            except (StorageError, ImageError) as error:
                result |= {"status": error.status, "error": str(error)}
                embeddings.skip()
            if isinstance(blob, bytes):
                result["bytes"] = len(blob)
        results.append(result)
        heartbeat()
    with timings.measure("classify"):
        vectors = embeddings.finish()
    for result, vector in zip(results, vectors, strict=True):
        if classifier is not None and result["status"] == OK and vector is None:
            failure = classifier.build_not_finite_error()
            result |= {"status": failure.status, "error": str(failure)}
        result["embedding"] = vector
    return pa.Table.from_pylist(results, schema=schema)


def _scan_image(spec: ScanSpec, blob: FetchResult, embeddings: _EmbeddingBatcher) -> dict[str, Any]:
    if not isinstance(blob, bytes):
        raise blob
    features = compute_features(blob, max_pixels=spec.max_pixels)
    embeddings.add(blob, spec.max_pixels)
    return features.to_columns()


class _EmbeddingBatcher:
    """Computes the embeddings of a chunk's images in batches, scaled to length 1.

    The embedding is None without a model, and for an image whose outputs are NaN or infinite.
    """

    def __init__(self, classifier: Classifier | None, batch_size: int) -> None:
        self._classifier = classifier
        self._batch_size = batch_size
        self._batch: list[Pixels] = []
        self._vectors: list[npt.NDArray[np.float16] | None] = []
        self._has_image: list[bool] = []

    def add(self, data: bytes, max_pixels: int) -> None:
        """Add an image file; raises an ImageError where it cannot be decoded."""
        if self._classifier is not None:
            pixels, _ = decode.decode_image(
                data, self._classifier.preprocess, max_pixels=max_pixels
            )
            self._batch.append(pixels)
            if len(self._batch) == self._batch_size:
                self._run()
        self._has_image.append(self._classifier is not None)

    def skip(self) -> None:
        """Add a row without an image."""
        self._has_image.append(False)

    def finish(self) -> list[npt.NDArray[np.float16] | None]:
        """The embeddings of all rows, in order."""
        if self._batch:
            self._run()
        vectors: Iterator[npt.NDArray[np.float16] | None] = iter(self._vectors)
        return [next(vectors) if has_image else None for has_image in self._has_image]

    def _run(self) -> None:
        assert self._classifier is not None
        output = self._classifier.classify(decode.stack_images(self._batch), embeddings=True)
        assert output.embedding is not None
        # of length 1: checks use the direction only, and float16 overflows above 65,504
        vectors = normalize_embeddings(output.embedding).astype(np.float16)
        self._vectors.extend(
            vector if finite else None
            for vector, finite in zip(vectors, output.is_finite, strict=True)
        )
        self._batch.clear()
