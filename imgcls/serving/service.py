"""Inference of one replica: threads decode uploads, and the model runs on whatever is waiting.

Holds the model in use and replaces it while requests are being served. Uses the same decoding,
network, temperature and thresholds as the batch job, so a row here equals the row of its table.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from imgcls.cluster.session import DeviceType
from imgcls.data.cuda import exit_after_device_failure, find_worker_device
from imgcls.data.decoding import decode
from imgcls.data.decoding.decode import Pixels
from imgcls.errors import OK, ImageError, ImageTooLarge, ResourcesError, one_line
from imgcls.models.bundle import load_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.graph_sizes import SIZE_FACTOR, choose_graph_sizes
from imgcls.models.ood import OodScores
from imgcls.models.prediction import Prediction
from imgcls.serving.batching import DynamicBatcher
from imgcls.serving.config import ServeConfig
from imgcls.serving.explanations import ExplanationQueue, LazyExplainer
from imgcls.serving.metrics import ReplicaMetrics
from imgcls.serving.problems import (
    Problem,
    build_busy_problem,
    build_device_failure_problem,
    build_out_of_memory_problem,
)
from imgcls.serving.uploads import Upload

EXIT_DELAY_S = 1.0
"""Time for the responses of a replica whose GPU has failed, before its process ends."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictOptions:
    """Options of one request, for each of its images."""

    top_k: int
    threshold: float | None = None
    embeddings: bool = False
    scores: bool = False
    explain: bool = False


class ServedModel:
    """A loaded bundle whose network has run once per batch size, so that requests find it warm."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.sha256 = classifier.bundle.sha256
        self.explainer = LazyExplainer(classifier)

    @classmethod
    def load(cls, config: ServeConfig, device: DeviceType) -> ServedModel:
        """Load and warm up.

        Raises BundleError if the bundle is missing or damaged, and ResourcesError if a GPU has no
        memory for it.
        """
        try:
            return cls._load(config, device)
        except torch.OutOfMemoryError as error:
            raise ResourcesError(
                f"bundle {config.model}: the GPU has not enough memory for it and batches of "
                f"{config.batch_size}: {one_line(error)}. Set a smaller --batch-size, or use a GPU "
                "with more memory"
            ) from error

    @classmethod
    def _load(cls, config: ServeConfig, device: DeviceType) -> ServedModel:
        bundle = load_bundle(config.model)
        # a lone image must not wait for the forward pass of a full batch
        sizes = choose_graph_sizes(config.batch_size)
        classifier = Classifier(
            bundle,
            precision=config.precision,
            engine=config.engine,
            device=find_worker_device(device),
            batch_size=sizes,
            decode=config.decode,
        )
        crop = bundle.spec.preprocess.crop
        for count in sizes if classifier.device.type == "cuda" else (1, config.batch_size):
            blank = np.zeros((count, crop, crop, 3), np.uint8).transpose(0, 3, 1, 2)
            needs_embeddings = count == 1 or classifier.ood_detector is not None
            classifier.classify(blank, embeddings=needs_embeddings)
        return cls(classifier)

    def describe(self, threshold: float | None) -> dict[str, Any]:
        """Description of the model for clients.

        threshold: replaces the thresholds of the bundle and of its classes; None keeps them
        """
        spec = self.classifier.bundle.spec
        return {
            "sha256": self.sha256,
            "task": spec.task,
            "architecture": spec.architecture.model_dump(mode="json"),
            "classes": spec.classes,
            "preprocess": self.classifier.preprocess.model_dump(mode="json"),
            "temperature": spec.temperature,
            "threshold": spec.threshold if threshold is None else threshold,
            "thresholds": spec.thresholds if threshold is None else {},
            "ood_rate": None if spec.ood is None else spec.ood.max_rate,
            "label_set_coverage": None if spec.label_sets is None else spec.label_sets.coverage,
            "precision": self.classifier.precision,
            "engine": self.classifier.engine,
            "embedding_width": self.classifier.embedding_width,
            "metrics": spec.metrics,
        }


@dataclass(frozen=True)
class ForwardItem:
    """One decoded image, waiting for the forward pass."""

    model: ServedModel
    pixels: Pixels
    embedding: bool


@dataclass(frozen=True)
class ImageScores:
    """Output of the network for one image.

    scores:    (C,) float32
    embedding: (E,) float32, None unless requested
    ood:       of one image; None for a bundle without a detector
    """

    scores: np.ndarray[Any, np.dtype[np.float32]]
    embedding: np.ndarray[Any, np.dtype[np.float32]] | None
    ood: OodScores | None = None


ForwardResult = ImageScores | Problem


class Service:
    """Classifies uploads with one model at a time.

    decoders:    number of decoding threads
    device:      planned device of the model
    is_draining: the service is about to shut down, as /readyz reports
    """

    def __init__(
        self,
        config: ServeConfig,
        model: ServedModel,
        metrics: ReplicaMetrics,
        *,
        decoders: int,
        device: DeviceType,
    ) -> None:
        self.config = config
        self._device = device
        self.model = model
        self.metrics = metrics
        self.is_draining = False
        self._decode_pool = ThreadPoolExecutor(decoders, "decode")
        self._explanations = ExplanationQueue()
        self._has_failed_device = False
        self._batcher: DynamicBatcher[ForwardItem, ForwardResult] = DynamicBatcher(
            self._classify_batch, config.batch_size
        )
        self._num_waiting = 0
        self._seconds_per_image = 0.05
        self._update_lock = asyncio.Lock()

    @property
    def num_waiting(self) -> int:
        """Number of images that are queued or being processed."""
        return self._num_waiting

    def check_capacity(self, count: int = 1) -> None:
        """Raise a Problem (503) if `count` more images exceed the queue, or the GPU has failed."""
        if self._has_failed_device:
            raise build_device_failure_problem()
        if self._num_waiting + count > self.config.limits.waiting_images:
            raise build_busy_problem(self._num_waiting * self._seconds_per_image)

    def check_explanations(self, count: int) -> None:
        """Raise a Problem if a request may not have its images explained, or too many wait."""
        limit = self.config.limits.explained_images
        if limit == 0:
            raise Problem(
                501,
                "explanations_off",
                "this service explains no predictions: limits.explained_images is 0",
            )
        if count > limit:
            raise Problem(
                413,
                "too_many_images",
                f"the request has {count} images; with explain=true at most {limit} are allowed",
            )
        self._explanations.check_capacity(count)

    def describe_model(self) -> dict[str, Any]:
        """Description of the model in use, with the threshold in effect."""
        limit = self.config.limits.explained_images
        return self.model.describe(self.config.threshold) | {"explained_images": limit}

    async def predict(
        self, uploads: Sequence[Upload], options: PredictOptions
    ) -> tuple[ServedModel, list[dict[str, Any]]]:
        """Classify uploads.

        Returns the model and one row per upload, in the columns of the batch job. Raises a Problem
        if the queue is full, or the GPU has failed or has no memory for the images.
        """
        self.check_capacity(len(uploads))
        model = self.model
        self._num_waiting += len(uploads)
        started_at = time.perf_counter()
        try:
            rows = await asyncio.gather(
                *(self._predict_one(model, upload, options) for upload in uploads)
            )
        finally:
            self._num_waiting -= len(uploads)
        # running mean of the time per image, for Retry-After
        spent = (time.perf_counter() - started_at) / (self._num_waiting + len(uploads))
        self._seconds_per_image += 0.05 * (spent - self._seconds_per_image)
        for index, (row, upload) in enumerate(zip(rows, uploads, strict=True)):
            row["row"], row["name"] = index, upload.name
            self.metrics.images.labels(status=row["status"]).inc()
        if options.explain:
            await self._explain(model, uploads, rows)
        return model, rows

    async def _explain(
        self, model: ServedModel, uploads: Sequence[Upload], rows: Sequence[dict[str, Any]]
    ) -> None:
        """Add the explanations of images with a prediction to their rows."""
        explained = [
            (upload, row) for upload, row in zip(uploads, rows, strict=True) if row["status"] == OK
        ]
        max_pixels = self.config.limits.pixels
        requests = [(upload, row["topk_labels"][0]) for upload, row in explained]
        try:
            pictures = await self._explanations.explain(model.explainer, requests, max_pixels)
        except torch.AcceleratorError as error:
            self._replace_replica()
            raise build_device_failure_problem() from error
        for (_, row), (_, label), picture in zip(explained, requests, pictures, strict=True):
            row["explanation"] = {"label": label, "image": picture}

    async def run_in_decoder(self, call: Callable[[], T]) -> T:
        """Run a call that decodes an image in one of the decoding threads."""
        return await asyncio.wrap_future(self._decode_pool.submit(call))

    async def update(self, config: ServeConfig) -> bool:
        """Load the bundle at `config.model`, then use it; requests meanwhile use the old one.

        Returns whether its hash differs. Raises BundleError and keeps the old one if it is damaged.
        """
        async with self._update_lock:
            loop = asyncio.get_running_loop()
            model = await loop.run_in_executor(None, ServedModel.load, config, self._device)
            has_changed = model.sha256 != self.model.sha256
            self.config, self.model = config, model
            self._batcher.size = config.batch_size
            return has_changed

    async def _predict_one(
        self, model: ServedModel, upload: Upload, options: PredictOptions
    ) -> dict[str, Any]:
        future: asyncio.Future[ForwardResult] = asyncio.get_running_loop().create_future()

        needs_embedding = options.embeddings or model.classifier.ood_detector is not None

        def decode_and_submit() -> tuple[int, int]:
            pixels, size = self._decode_upload(model, upload)
            self._batcher.submit(ForwardItem(model, pixels, needs_embedding), future)
            return size

        try:
            width, height = await asyncio.wrap_future(self._decode_pool.submit(decode_and_submit))
        except ImageError as error:
            return _build_failed_row(model, error)
        output = await future
        if isinstance(output, Problem):
            raise output
        if np.isnan(output.scores).any():
            return _build_failed_row(model, model.classifier.build_not_finite_error())
        prediction = model.classifier.rank_scores(
            output.scores[None],
            output.ood,
            top_k=options.top_k,
            threshold=options.threshold,
        )[0]
        row = _build_row(prediction, width, height)
        if options.scores:
            row["scores"] = dict(zip(model.classifier.classes, output.scores.tolist(), strict=True))
        if prediction.label_set is not None:
            row["label_set"] = prediction.label_set
        if prediction.is_ood is not None:
            # JSON has no infinity, the score of an embedding that is not finite
            value = prediction.ood_score
            is_finite = value is not None and math.isfinite(value)
            row |= {"ood_score": value if is_finite else None, "is_ood": prediction.is_ood}
        if options.embeddings and output.embedding is not None:
            row["embedding"] = output.embedding.tolist()
        return row

    def _decode_upload(self, model: ServedModel, upload: Upload) -> tuple[Pixels, tuple[int, int]]:
        """Decode an upload to pixels; also returns the width and height of the original."""
        limits = self.config.limits
        if upload.size > limits.image_bytes:
            raise ImageTooLarge(
                f"the file has {upload.size:,} bytes, more than image_bytes {limits.image_bytes:,}"
            )
        with self.metrics.time_stage("decode"):
            return decode.decode_image(
                upload.read(), model.classifier.preprocess, max_pixels=limits.pixels
            )

    def _classify_batch(self, items: Sequence[ForwardItem]) -> list[ForwardResult]:
        """Run the network, in one batch per model: during an update requests of both may wait."""
        results: dict[int, ForwardResult] = {}
        groups: dict[tuple[str, bool], list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault((item.model.sha256, item.embedding), []).append(index)
        for indices in groups.values():
            self.metrics.batch_images.observe(len(indices))
            with self.metrics.time_stage("classify"):
                found = self._classify_group([items[index] for index in indices])
            results.update(zip(indices, found, strict=True))
        return [results[index] for index in range(len(items))]

    def _replace_replica(self) -> None:
        """End the process: every later call of CUDA in it fails, too."""
        self._has_failed_device = True
        exit_after_device_failure(EXIT_DELAY_S)

    def _classify_group(self, items: Sequence[ForwardItem]) -> Sequence[ForwardResult]:
        """Run the network once, or in smaller batches if a GPU has no memory for all images."""
        count = len(items)
        sizes = dict.fromkeys((count, -(-count // SIZE_FACTOR)))  # of one captured size less
        for size in sizes:
            if self._has_failed_device:
                break
            try:
                return [
                    scores
                    for start in range(0, count, size)
                    for scores in _run_network(items[start : start + size])
                ]
            except torch.OutOfMemoryError as error:
                logger.warning("no memory for a forward pass of %d images: %s", size, error)
            except torch.AcceleratorError:
                self._replace_replica()
        if self._has_failed_device:
            return [build_device_failure_problem() for _ in items]
        return [build_out_of_memory_problem(min(sizes)) for _ in items]


def _run_network(items: Sequence[ForwardItem]) -> list[ImageScores]:
    """Scores of images of one model, all with embeddings or none."""
    output = items[0].model.classifier.classify(
        decode.stack_images([item.pixels for item in items]), embeddings=items[0].embedding
    )
    if output.embedding is None:
        return [ImageScores(scores, None) for scores in output.scores]
    ood = items[0].model.classifier.find_ood(output.embedding)
    parts = [None] * len(items) if ood is None else ood.split()
    return list(map(ImageScores, output.scores, output.embedding, parts))


def _build_row(prediction: Prediction, width: int, height: int) -> dict[str, Any]:
    if prediction.labels is None:
        decision = {"predicted_label": prediction.label, "confidence": prediction.confidence}
    else:
        decision = {"predicted_labels": prediction.labels}
    return {
        "row": 0,
        "name": None,
        **decision,
        "accepted": prediction.accepted,
        "topk_labels": prediction.topk_labels,
        "topk_scores": prediction.topk_scores,
        "width": width,
        "height": height,
        "status": OK,
        "error": None,
    }


def _build_failed_row(model: ServedModel, error: ImageError) -> dict[str, Any]:
    """Row of an image without a prediction, with the keys of the others."""
    is_multilabel = model.classifier.bundle.spec.task == "multilabel"
    names = ("predicted_labels",) if is_multilabel else ("predicted_label", "confidence")
    return {
        "row": 0,
        "name": None,
        **dict.fromkeys(names),
        "accepted": False,
        "topk_labels": None,
        "topk_scores": None,
        "width": None,
        "height": None,
        "status": error.status,
        "error": str(error),
    }
