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
from imgcls.runs.layout import OK
from imgcls.serving.batching import Batches
from imgcls.serving.config import ServeConfig
from imgcls.serving.metrics import Telemetry
from imgcls.serving.problems import busy
from imgcls.serving.uploads import Upload


@dataclass(frozen=True)
class Wanted:
    """What a request asks of each of its images."""

    top_k: int
    threshold: float | None = None
    embeddings: bool = False


class Model:
    """A bundle that is ready to answer: loaded, and its network run once at either batch size."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.sha256 = classifier.bundle.sha256

    @classmethod
    def load(cls, config: ServeConfig) -> Model:
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

    def described(self, threshold: float | None) -> dict[str, Any]:
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
class Item:
    """One image on its way through the network."""

    model: Model
    pixels: Pixels
    embedding: bool


@dataclass(frozen=True)
class Scored:
    """scores: (C,) float32; embedding: (E,) float32, None unless asked for"""

    scores: np.ndarray[Any, np.dtype[np.float32]]
    embedding: np.ndarray[Any, np.dtype[np.float32]] | None


class Service:
    """Answers requests with one model at a time.

    decoders: threads that decode
    """

    def __init__(
        self, config: ServeConfig, model: Model, telemetry: Telemetry, *, decoders: int
    ) -> None:
        self.config = config
        self.model = model
        self.telemetry = telemetry
        self._decoders = ThreadPoolExecutor(decoders, "decode")
        self._batches: Batches[Item, Scored] = Batches(self._forward, config.batch_size)
        self._waiting = 0
        self._image_seconds = 0.05
        self._swapping = asyncio.Lock()

    @property
    def waiting(self) -> int:
        """Images that have been let in and not answered."""
        return self._waiting

    def check_room(self, count: int = 1) -> None:
        """Raise the Problem of a service that has more to do than it may keep waiting."""
        if self._waiting + count > self.config.limits.waiting_images:
            raise busy(self._waiting * self._image_seconds)

    def described(self) -> dict[str, Any]:
        """The model in use, with the threshold in force."""
        return self.model.described(self.config.threshold)

    async def predict(
        self, uploads: Sequence[Upload], wanted: Wanted
    ) -> tuple[Model, list[dict[str, Any]]]:
        """One row per image, in the columns of a labelling run, and the model that they come from.

        Raises a Problem when they cannot be taken in now.
        """
        self.check_room(len(uploads))
        model = self.model
        self._waiting += len(uploads)
        began = time.perf_counter()
        try:
            rows = await asyncio.gather(*(self._row(model, item, wanted) for item in uploads))
        finally:
            self._waiting -= len(uploads)
        # what an image takes of this replica, for who is told to come again
        spent = (time.perf_counter() - began) / (self._waiting + len(uploads))
        self._image_seconds += 0.05 * (spent - self._image_seconds)
        for place, (row, upload) in enumerate(zip(rows, uploads, strict=True)):
            row["row"], row["name"] = place, upload.name
            self.telemetry.images.labels(status=row["status"]).inc()
        return model, rows

    async def swap(self, config: ServeConfig) -> bool:
        """Answer with the bundle that is now at `config.model`; the old one does so until then.

        Returns whether it was another. Raises BundleError, and then keeps the old one.
        """
        async with self._swapping:
            loop = asyncio.get_running_loop()
            model = await loop.run_in_executor(None, Model.load, config)
            changed = model.sha256 != self.model.sha256
            self.config, self.model = config, model
            self._batches.size = config.batch_size
            return changed

    async def _row(self, model: Model, upload: Upload, wanted: Wanted) -> dict[str, Any]:
        scores: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()

        def decode() -> tuple[int, int]:
            pixels, shown = self._decode(model, upload)
            self._batches.put(Item(model, pixels, wanted.embeddings), scores)
            return shown

        try:
            width, height = await asyncio.wrap_future(self._decoders.submit(decode))
        except ImageError as error:
            return _row(None, status=error.status, error=str(error))
        scored = await scores
        if np.isnan(scored.scores).any():
            failure = model.classifier.not_finite()
            return _row(None, status=failure.status, error=str(failure))
        prediction = model.classifier.ranked(
            scored.scores[None], top_k=wanted.top_k, threshold=wanted.threshold
        )[0]
        row = _row(prediction, width=width, height=height)
        if scored.embedding is not None:
            row["embedding"] = scored.embedding.tolist()
        return row

    def _decode(self, model: Model, upload: Upload) -> tuple[Pixels, tuple[int, int]]:
        limits = self.config.limits
        if upload.size > limits.image_bytes:
            raise ImageTooLarge(
                f"{upload.size:,} bytes, more than image_bytes {limits.image_bytes:,}"
            )
        with self.telemetry.stage("decode"):
            return decode.decode(
                upload.read(), model.classifier.preprocess, max_pixels=limits.pixels
            )

    def _forward(self, items: Sequence[Item]) -> list[Scored]:
        """Batches of one model each: while it changes, both are asked for."""
        results: dict[int, Scored] = {}
        groups: dict[tuple[str, bool], list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault((item.model.sha256, item.embedding), []).append(place)
        for places in groups.values():
            first = items[places[0]]
            self.telemetry.batch.observe(len(places))
            with self.telemetry.stage("classify"):
                said = first.model.classifier.classify(
                    decode.stack([items[place].pixels for place in places]),
                    embeddings=first.embedding,
                )
            for i, place in enumerate(places):
                embedding = None if said.embedding is None else said.embedding[i]
                results[place] = Scored(said.scores[i], embedding)
        return [results[place] for place in range(len(items))]


def _row(
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
