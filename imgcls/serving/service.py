"""Images in, rows out: decoding in threads, forward passes over whatever is waiting together.

Owns the model in use and its change while requests go on. Uses the same decoding, network,
temperature and thresholds as labelling does, so that a row here is the row of the table there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from imgcls.data import decode
from imgcls.data.decode import Pixels
from imgcls.errors import ImageError, ImageTooLarge
from imgcls.models.bundle import load_bundle
from imgcls.models.classifier import Classifier, Prediction
from imgcls.runs.schema import OK
from imgcls.serving.batching import DynamicBatcher
from imgcls.serving.config import ServeConfig
from imgcls.serving.metrics import ReplicaMetrics
from imgcls.serving.problems import build_busy_problem
from imgcls.serving.uploads import Upload


@dataclass(frozen=True)
class PredictOptions:
    """What a request asks of each of its images."""

    top_k: int
    threshold: float | None = None
    embeddings: bool = False


class ServedModel:
    """A bundle that is ready to answer: loaded, and its network run once at either batch size."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.sha256 = classifier.bundle.sha256

    @classmethod
    def load(cls, config: ServeConfig) -> ServedModel:
        """Raises BundleError when the bundle is missing or damaged."""
        bundle = load_bundle(config.model)
        on_gpu = torch.cuda.is_available()
        classifier = Classifier(
            bundle,
            precision=config.precision,
            batch_size=config.batch_size if on_gpu else None,
            decode=config.decode,
        )
        crop = bundle.spec.preprocess.crop
        for count in (1, config.batch_size):
            blank = np.zeros((count, crop, crop, 3), np.uint8).transpose(0, 3, 1, 2)
            classifier.classify(blank, embeddings=count == 1)
        return cls(classifier)

    def describe(self, threshold: float | None) -> dict[str, Any]:
        """What anyone with a key may know of it.

        threshold: takes the place of the bundle's own, and of those of its classes
        """
        spec = self.classifier.bundle.spec
        return {
            "sha256": self.sha256,
            "architecture": spec.architecture.model_dump(mode="json"),
            "classes": spec.classes,
            "preprocess": self.classifier.preprocess.model_dump(mode="json"),
            "temperature": spec.temperature,
            "threshold": spec.threshold if threshold is None else threshold,
            "thresholds": spec.thresholds if threshold is None else {},
            "precision": self.classifier.precision,
            "embedding_width": self.classifier.embedding_width,
            "metrics": spec.metrics,
        }


@dataclass(frozen=True)
class ForwardItem:
    """One image on its way through the network."""

    model: ServedModel
    pixels: Pixels
    embedding: bool


@dataclass(frozen=True)
class ImageScores:
    """scores: (C,) float32; embedding: (E,) float32, None unless asked for"""

    scores: np.ndarray[Any, np.dtype[np.float32]]
    embedding: np.ndarray[Any, np.dtype[np.float32]] | None


class Service:
    """Answers requests with one model at a time.

    decoders: threads that decode
    """

    def __init__(
        self, config: ServeConfig, model: ServedModel, telemetry: ReplicaMetrics, *, decoders: int
    ) -> None:
        self.config = config
        self.model = model
        self.metrics = telemetry
        self._decode_pool = ThreadPoolExecutor(decoders, "decode")
        self._batcher: DynamicBatcher[ForwardItem, ImageScores] = DynamicBatcher(
            self._classify_batch, config.batch_size
        )
        self._num_waiting = 0
        self._seconds_per_image = 0.05
        self._update_lock = asyncio.Lock()

    @property
    def num_waiting(self) -> int:
        """Images that have been let in and not answered."""
        return self._num_waiting

    def check_capacity(self, count: int = 1) -> None:
        """Raise the Problem of a service that has more to do than it may keep waiting."""
        if self._num_waiting + count > self.config.limits.waiting_images:
            raise build_busy_problem(self._num_waiting * self._seconds_per_image)

    def describe_model(self) -> dict[str, Any]:
        """The model in use, with the threshold in force."""
        return self.model.describe(self.config.threshold)

    async def predict(
        self, uploads: Sequence[Upload], wanted: PredictOptions
    ) -> tuple[ServedModel, list[dict[str, Any]]]:
        """One row per image, in the columns of a labelling run, and the model that they come from.

        Raises a Problem when they cannot be taken in now.
        """
        self.check_capacity(len(uploads))
        model = self.model
        self._num_waiting += len(uploads)
        began = time.perf_counter()
        try:
            rows = await asyncio.gather(
                *(self._predict_one(model, item, wanted) for item in uploads)
            )
        finally:
            self._num_waiting -= len(uploads)
        # what an image takes of this replica, for who is told to come again
        spent = (time.perf_counter() - began) / (self._num_waiting + len(uploads))
        self._seconds_per_image += 0.05 * (spent - self._seconds_per_image)
        for place, (row, upload) in enumerate(zip(rows, uploads, strict=True)):
            row["row"], row["name"] = place, upload.name
            self.metrics.images.labels(status=row["status"]).inc()
        return model, rows

    async def update(self, config: ServeConfig) -> bool:
        """Answer with the bundle that is now at `config.model`; the old one does so until then.

        Returns whether it was another. Raises BundleError, and then keeps the old one.
        """
        async with self._update_lock:
            loop = asyncio.get_running_loop()
            model = await loop.run_in_executor(None, ServedModel.load, config)
            changed = model.sha256 != self.model.sha256
            self.config, self.model = config, model
            self._batcher.size = config.batch_size
            return changed

    async def _predict_one(
        self, model: ServedModel, upload: Upload, wanted: PredictOptions
    ) -> dict[str, Any]:
        scores: asyncio.Future[ImageScores] = asyncio.get_running_loop().create_future()

        def decode() -> tuple[int, int]:
            pixels, shown = self._decode_upload(model, upload)
            self._batcher.submit(ForwardItem(model, pixels, wanted.embeddings), scores)
            return shown

        try:
            width, height = await asyncio.wrap_future(self._decode_pool.submit(decode))
        except ImageError as error:
            return _build_row(None, status=error.status, error=str(error))
        scored = await scores
        if np.isnan(scored.scores).any():
            failure = model.classifier.build_not_finite_error()
            return _build_row(None, status=failure.status, error=str(failure))
        prediction = model.classifier.rank_scores(
            scored.scores[None], top_k=wanted.top_k, threshold=wanted.threshold
        )[0]
        row = _build_row(prediction, width=width, height=height)
        if scored.embedding is not None:
            row["embedding"] = scored.embedding.tolist()
        return row

    def _decode_upload(self, model: ServedModel, upload: Upload) -> tuple[Pixels, tuple[int, int]]:
        limits = self.config.limits
        if upload.size > limits.image_bytes:
            raise ImageTooLarge(
                f"{upload.size:,} bytes, more than image_bytes {limits.image_bytes:,}"
            )
        with self.metrics.time_stage("decode"):
            return decode.decode_image(
                upload.read(), model.classifier.preprocess, max_pixels=limits.pixels
            )

    def _classify_batch(self, items: Sequence[ForwardItem]) -> list[ImageScores]:
        """Batches of one model each: while it changes, both are asked for."""
        results: dict[int, ImageScores] = {}
        groups: dict[tuple[str, bool], list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault((item.model.sha256, item.embedding), []).append(place)
        for places in groups.values():
            first = items[places[0]]
            self.metrics.batch_images.observe(len(places))
            with self.metrics.time_stage("classify"):
                said = first.model.classifier.classify(
                    decode.stack_images([items[place].pixels for place in places]),
                    embeddings=first.embedding,
                )
            for i, place in enumerate(places):
                embedding = None if said.embedding is None else said.embedding[i]
                results[place] = ImageScores(said.scores[i], embedding)
        return [results[place] for place in range(len(items))]


def _build_row(
    prediction: Prediction | None,
    *,
    width: int | None = None,
    height: int | None = None,
    status: str = OK,
    error: str | None = None,
) -> dict[str, Any]:
    return {
        "row": 0,
        "name": None,
        "predicted_label": None if prediction is None else prediction.label,
        "confidence": None if prediction is None else prediction.confidence,
        "accepted": prediction is not None and prediction.accepted,
        "topk_labels": None if prediction is None else prediction.topk_labels,
        "topk_scores": None if prediction is None else prediction.topk_scores,
        "width": width,
        "height": height,
        "status": status,
        "error": error,
    }
