"""One chunk, from manifest rows to a table of facts: fetch, look, embed where there is a model.

The counterpart of `chunk` for a run that examines images and labels none; it fetches as that does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcls.curation.scan_worker import ScanSpec
from imgcls.data import decode
from imgcls.data.decode import Pixels
from imgcls.data.image_features import FEATURE_FIELDS, ImageFeatures, compute_features
from imgcls.errors import ImageError, StorageError
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.execution.worker import HeartbeatFn
from imgcls.inference.stages import NO_CRASHED_ROWS, FetchResult, fetch_images, time_fetch
from imgcls.models.classifier import Classifier
from imgcls.runs.schema import OK


def scan_schema(embedding: int | None) -> pa.Schema:
    """The columns of a table of facts.

    embedding: its width, where there is a model
    """
    more = [] if embedding is None else [pa.field("embedding", pa.list_(pa.float16(), embedding))]
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error", pa.string()),
            pa.field("bytes", pa.int64()),
            *FEATURE_FIELDS,
            *more,
        ]
    )


def scan_chunk(
    spec: ScanSpec,
    classifier: Classifier | None,
    rows: pa.Table,
    work: ChunkTask,
    spent: StageTimings,
    crashed: Mapping[int, str] = NO_CRASHED_ROWS,
    beat: HeartbeatFn = lambda: None,
) -> pa.Table:
    """What there is to say of each row's image: one row each, null facts without an image.

    crashed: what to say of rows, counted from the first of `rows`, that are not to be touched
    beat:    called after each row, to tell that it goes on
    """
    columns = scan_schema(None if classifier is None else classifier.embedding_width)
    start = spec.plan.rows_of(work.chunk).start
    looks: list[dict[str, Any]] = []
    embeddings = _EmbeddingBatcher(classifier, spec.batch_size)
    for place, blob in enumerate(time_fetch(fetch_images(spec, rows, crashed), spent)):
        with spent.measure("prepare"):
            told: dict[str, Any] = {"row": start + place, "status": OK, "error": None}
            try:
                told |= _scan_image(spec, blob, embeddings)
            except (StorageError, ImageError) as error:
                told |= {"status": error.status, "error": str(error)}
                embeddings.skip()
            if isinstance(blob, bytes):
                told["bytes"] = len(blob)
        looks.append(told)
        beat()
    with spent.measure("classify"):
        vectors = embeddings.finish()
    for told, vector in zip(looks, vectors, strict=True):
        if classifier is not None and told["status"] == OK and vector is None:
            failure = classifier.build_not_finite_error()
            told |= {"status": failure.status, "error": str(failure)}
        told["embedding"] = vector
    return pa.Table.from_pylist(looks, schema=columns)


def _scan_image(spec: ScanSpec, blob: FetchResult, embeddings: _EmbeddingBatcher) -> dict[str, Any]:
    if not isinstance(blob, bytes):
        raise blob
    facts: ImageFeatures = compute_features(blob, max_pixels=spec.max_pixels)
    embeddings.add(blob, spec.max_pixels)
    return facts.to_columns()


class _EmbeddingBatcher:
    """The embeddings of a chunk's images, a batch at a time; None for each without a model.

    None also for an image that the model gives NaN or infinity for.
    """

    def __init__(self, classifier: Classifier | None, batch_size: int) -> None:
        self._classifier = classifier
        self._batch_size = batch_size
        self._batch: list[Pixels] = []
        self._vectors: list[npt.NDArray[np.float16] | None] = []
        self._there: list[bool] = []

    def add(self, data: bytes, max_pixels: int) -> None:
        if self._classifier is not None:
            pixels, _ = decode.decode_image(
                data, self._classifier.preprocess, max_pixels=max_pixels
            )
            self._batch.append(pixels)
            if len(self._batch) == self._batch_size:
                self._run()
        self._there.append(self._classifier is not None)

    def skip(self) -> None:
        self._there.append(False)

    def finish(self) -> list[npt.NDArray[np.float16] | None]:
        if self._batch:
            self._run()
        vectors: Iterator[npt.NDArray[np.float16] | None] = iter(self._vectors)
        return [next(vectors) if there else None for there in self._there]

    def _run(self) -> None:
        assert self._classifier is not None
        said = self._classifier.classify(decode.stack_images(self._batch), embeddings=True)
        assert said.embedding is not None
        self._vectors.extend(
            vector if finite else None
            for vector, finite in zip(
                said.embedding.astype(np.float16), said.is_finite, strict=True
            )
        )
        self._batch.clear()
