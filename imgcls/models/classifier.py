"""Classifier: uint8 pixels in, calibrated scores out. The only place that runs a trained network.

Owns precision, memory format and the forward pass; `models.task` defines what the outputs mean.
Knows neither manifests nor Ray. Inference, evaluation and serving all use it, so they agree.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch

from imgcls.data.cuda import CudaTimer, resolve_device
from imgcls.data.decoding.decode import Pixels, stack_images
from imgcls.data.decoding.preprocess import DecodeMode
from imgcls.data.storage.storage_settings import StorageConfig, use_settings
from imgcls.errors import ImgclsError, NotFinite, RequestError
from imgcls.models import sources
from imgcls.models.bundle import (
    Bundle,
    EngineName,
    Precision,
    check_has_classes,
    load_ood_detector,
    read_description,
    resolve_int8_engine,
)
from imgcls.models.engines import build_engine
from imgcls.models.explain import Explainer
from imgcls.models.explanation import Explanations, explain_images, find_class
from imgcls.models.label_sets import build_set_column, find_label_sets
from imgcls.models.multilabel import build_label_lists
from imgcls.models.ood import OodScores
from imgcls.models.precision import choose_precision
from imgcls.models.prediction import (
    FailedPrediction,
    Prediction,
    Predictions,
    build_failed_prediction,
)
from imgcls.models.scores import PendingScores, Scores
from imgcls.models.sources import ImageSource
from imgcls.models.task import ScoreScaling, rank_on_device
from imgcls.models.tasks import find_task


class Classifier:
    """Image classifier: the network of a bundle on one device.

    Parameters
    ----------
    bundle
        A loaded bundle; `Classifier.load` takes its path or URL.
    precision
        "auto" uses bf16 where the hardware multiplies it natively, else fp32. "fp16" is for GPUs
        without bf16. The attributes `precision` and `precision_reason` hold the choice and its
        reason. "fp32" on a GPU turns TF32 off for all convolutions of the process.
    engine
        "torch", or "openvino" for CPUs, an optional package. "auto" is torch. The attribute
        `engine` holds the engine and its version.
    device
        Default: the GPU if there is one, else the CPU.
    compile
        Compile the network with `torch.compile`.
    batch_size
        Usual batch size on a GPU, or several. The forward pass of each is captured as a CUDA graph,
        and a batch is padded to the next size; a network that cannot be captured runs without one,
        and a note is logged.
    decode
        "exact" decodes JPEGs at full size, "fast" decodes large ones at 1/2, 1/4 or 1/8. Default:
        the setting of the bundle.

    Raises
    ------
    BundleError
        If the weights do not fit the network.
    RequestError
        For an unknown option, or one that this hardware cannot run.

    Examples
    --------
    >>> import imgcls
    >>> classifier = imgcls.Classifier.load("demo/bundle")  # doctest: +SKIP
    >>> classifier.predict("cat.jpg")[0].label  # doctest: +SKIP
    'cat'
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: Precision = "auto",
        engine: EngineName = "auto",
        device: str | torch.device | None = None,
        compile: bool = False,
        batch_size: int | Sequence[int] | None = None,
        decode: DecodeMode | None = None,
    ) -> None:
        bundle = bundle.with_decode(decode)
        self.bundle = bundle
        self.classes = bundle.spec.classes
        self.preprocess = bundle.spec.preprocess
        self.label_sets = bundle.spec.label_sets
        self.ood_detector = load_ood_detector(bundle)
        self.device = resolve_device(device)
        if precision == "int8" and self.device.type == "cpu":
            engine = resolve_int8_engine(engine, bundle)
        self.precision, self.precision_reason = choose_precision(precision, self.device, engine)
        self._engine = build_engine(
            engine,
            bundle,
            self.device,
            self.precision,
            compile=compile,
            batch_size=batch_size,
        )
        self.task = find_task(bundle.spec)
        self._scaling = ScoreScaling.from_spec(bundle.spec, self.device)
        self._ranks_on_device = self.device.type == "cuda"
        self._timer_lock = threading.Lock()
        self._last_timer: CudaTimer | None = None
        self._thresholds = np.array(bundle.spec.resolve_thresholds(), np.float32)

    @property
    def engine(self) -> str:
        """Name and version of the engine that runs the network, e.g. "torch 2.14.1"."""
        return f"{self._engine.name} {self._engine.version}"

    @property
    def embedding_width(self) -> int:
        """E, the length of an embedding."""
        return self._engine.embedding_width

    @classmethod
    def load(
        cls,
        url: str | os.PathLike[str],
        *,
        storage: StorageConfig | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Classifier:
        """Load the classifier of a bundle.

        Parameters
        ----------
        url
            Path or URL of the bundle folder, or `models:/NAME/VERSION` or `models:/NAME@ALIAS` in
            the MLflow model registry.
        storage
            Storage settings of the bundle, e.g. `{"endpoint_url": "http://localhost:9000"}`.
        **options
            As for the constructor.

        Raises
        ------
        BundleError
            If the bundle is missing or damaged.
        """
        with use_settings(storage):  # the constructor verifies the weights
            return cls(read_description(os.fspath(url)), **options)

    def classify(self, batch: Pixels | torch.Tensor, *, embeddings: bool = False) -> Scores:
        """Scores of (N, 3, crop, crop) uint8 RGB on any device; RequestError for other arrays."""
        return self.submit(batch, embeddings=embeddings).get()

    def upload(self, pixels: torch.Tensor) -> torch.Tensor:
        """Copy (N, 3, crop, crop) uint8 to the device, without waiting for its other work."""
        return self._engine.upload(pixels)

    @torch.inference_mode()
    def submit(
        self,
        batch: Pixels | torch.Tensor,
        *,
        embeddings: bool = False,
        top_k: int | None = None,
    ) -> PendingScores:
        """As `classify`, but return before a GPU has finished.

        top_k: number of best classes to find on a GPU; None for no `Scores.order`
        """
        sources.check_pixels(batch, self.preprocess.crop)
        pixels = self._engine.upload(batch)
        timer = CudaTimer(self.device)
        logits, features = self._engine.run(pixels, features=embeddings)
        scores = self.task.compute_scores(logits, self._scaling)
        order = None
        if top_k is not None and self._ranks_on_device:
            order = rank_on_device(scores, top_k)
        with self._timer_lock:
            timer.stop(self._last_timer)
            self._last_timer = timer
        return PendingScores(scores, None if features is None else features.float(), timer, order)

    def build_not_finite_error(self) -> NotFinite:
        """The error of an image whose scores are not finite."""
        remedy = "" if self.precision == "fp32" else "; run it with --precision fp32"
        return NotFinite(
            f"the network of {self.bundle.url} outputs NaN or infinity for this image in "
            f"{self.precision}{remedy}"
        )

    @overload
    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        top_k: int = ...,
        batch_size: int = ...,
        errors: Literal["raise"] = ...,
        storage: StorageConfig | Mapping[str, Any] | None = ...,
    ) -> Predictions[Prediction]: ...

    @overload
    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        top_k: int = ...,
        batch_size: int = ...,
        errors: Literal["return"],
        storage: StorageConfig | Mapping[str, Any] | None = ...,
    ) -> Predictions[Prediction | FailedPrediction]: ...

    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        top_k: int = 5,
        batch_size: int = 32,
        errors: Literal["raise", "return"] = "raise",
        storage: StorageConfig | Mapping[str, Any] | None = None,
    ) -> Predictions[Any]:
        """Predict the classes of images.

        Only the images of one batch are in memory at a time. A Pillow image is resized by Pillow, a
        file by the fastest correct route for its format: their scores may differ in the last bits.

        Parameters
        ----------
        images
            One image or an iterable of images: paths, URLs, bytes of a file, Pillow images, or
            uint8 arrays (height, width, 3). A four-dimensional array is a batch of images.
        top_k
            Number of classes per image; all classes if there are fewer.
        batch_size
            Number of images in one forward pass.
        errors
            "raise" raises the first error, "return" returns a `FailedPrediction` in its place.
        storage
            Storage settings for URLs of images, e.g. `{"endpoint_url": "http://localhost:9000"}`.

        Returns
        -------
        Predictions
            One `Prediction` or `FailedPrediction` per image, in order.

        Raises
        ------
        BundleError
            If the bundle is that of a backbone, which has no classes.
        RequestError
            For an argument of another type or value.
        StorageError, ImageError
            For the first image that cannot be read or decoded, named in the message; NotFinite, an
            ImageError, if the network outputs NaN or infinity for it.
        """
        check_has_classes(self.bundle)
        sources.check_positive(top_k=top_k, batch_size=batch_size)
        if errors not in ("raise", "return"):
            raise RequestError(f"errors: {errors!r} is neither 'raise' nor 'return'")
        with use_settings(storage):
            return self._predict_batches(images, top_k, batch_size, errors)

    def embed(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int = 32,
        storage: StorageConfig | Mapping[str, Any] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Compute the embeddings of images: the input of the network's final layer.

        Parameters
        ----------
        images
            One image or an iterable of images, as for `predict`.
        batch_size
            Number of images in one forward pass.
        storage
            Storage settings for URLs of images, e.g. `{"endpoint_url": "http://localhost:9000"}`.

        Returns
        -------
        ndarray of float32, shape (N, E)
            One row per image, in order, averaged over space where the input of the final layer has
            spatial dimensions.

        Raises
        ------
        RequestError
            For an argument of another type or value.
        StorageError, ImageError
            For the first image that cannot be read or decoded, named in the message; NotFinite, an
            ImageError, if the network outputs NaN or infinity for it.

        Examples
        --------
        >>> import imgcls
        >>> classifier = imgcls.Classifier.load("demo/bundle")  # doctest: +SKIP
        >>> classifier.embed(["cat.jpg", "dog.jpg"]).shape  # doctest: +SKIP
        (2, 512)
        """
        sources.check_positive(batch_size=batch_size)
        parts = [np.empty((0, self.embedding_width), np.float32)]
        position = 0
        with use_settings(storage):
            for batch in sources.iterate_batches(images, batch_size):
                pixels = []
                for place, source in enumerate(batch, position):
                    try:
                        pixels.append(sources.load_pixels(source, self.preprocess))
                    except ImgclsError as error:
                        raise sources.add_source_name(error, source, place) from error
                found = self.classify(stack_images(pixels), embeddings=True)
                assert found.embedding is not None
                is_finite = found.is_finite & np.isfinite(found.embedding).all(1)
                if not is_finite.all():
                    at = int(is_finite.argmin())
                    failure = self.build_not_finite_error()
                    raise sources.add_source_name(failure, batch[at], position + at)
                parts.append(found.embedding)
                position += len(batch)
        return np.concatenate(parts)

    def explain(
        self,
        images: ImageSource | Iterable[ImageSource],
        class_name: str | None = None,
        *,
        storage: StorageConfig | Mapping[str, Any] | None = None,
    ) -> Explanations:
        """Compute class activation maps: the image regions that contribute to the score of a class.

        The first call loads the network a second time, in float32 and plain PyTorch.

        Parameters
        ----------
        images
            One image or an iterable of images, as for `predict`.
        class_name
            Class to explain. Default: of each image the class with the highest score.
        storage
            Storage settings for URLs of images, as for `predict`.

        Returns
        -------
        Explanations
            One `Explanation` per image, in order.

        Raises
        ------
        BundleError
            If the network has no feature map over the image, or the bundle has no classes.
        RequestError
            If the class is not one of the bundle, or for an argument of another type.
        StorageError, ImageError
            For the first image that cannot be read, decoded or classified, named in the message.

        Examples
        --------
        >>> classifier = Classifier.load("demo/bundle")  # doctest: +SKIP
        >>> classifier.explain("cat.jpg")[0].overlay().save("why.png")  # doctest: +SKIP
        """
        chosen = None if class_name is None else find_class(self.classes, class_name)
        with use_settings(storage):
            return explain_images(self._explainer, images, chosen, self._find_best_class)

    @functools.cached_property
    def _explainer(self) -> Explainer:
        return Explainer(self.bundle, self.device)

    def _find_best_class(self, pixels: Pixels) -> int:
        found = self.classify(pixels[None])
        if not found.is_finite[0]:
            raise self.build_not_finite_error()
        return int(found.scores[0].argmax())

    def _predict_batches(
        self,
        images: ImageSource | Iterable[ImageSource],
        top_k: int,
        batch_size: int,
        errors: Literal["raise", "return"],
    ) -> Predictions[Any]:
        results: Predictions[Any] = Predictions()
        for batch in sources.iterate_batches(images, batch_size):
            pixels: list[Pixels] = []
            failures: list[FailedPrediction | None] = []
            for position, source in enumerate(batch, len(results)):
                try:
                    pixels.append(sources.load_pixels(source, self.preprocess))
                    failures.append(None)
                except ImgclsError as error:
                    failures.append(build_failed_prediction(error, source, position, errors))
            predicted = iter(self._predict_pixels(pixels, top_k))
            for source, failure in zip(batch, failures, strict=True):
                result = next(predicted) if failure is None else failure
                if isinstance(result, NotFinite):
                    result = build_failed_prediction(result, source, len(results), errors)
                results.append(replace(result, source=source))
        return results

    def _predict_pixels(self, pixels: list[Pixels], top_k: int) -> list[Prediction | NotFinite]:
        if not pixels:
            return []
        scored = self.classify(stack_images(pixels), embeddings=self.ood_detector is not None)
        ood = None if scored.embedding is None else self.find_ood(scored.embedding)
        ranked = self.rank_scores(scored.scores, ood, top_k=top_k)
        return [
            prediction if finite else self.build_not_finite_error()
            for prediction, finite in zip(ranked, scored.is_finite, strict=True)
        ]

    def rank_scores(
        self,
        scores: npt.NDArray[np.float32],
        ood: OodScores | None = None,
        *,
        top_k: int = 5,
        threshold: float | None = None,
    ) -> list[Prediction]:
        """Predictions of (N, C) scores.

        ood:       as `find_ood` returns it; an image out of distribution is not accepted
        threshold: overrides the thresholds of the bundle
        Raises RequestError for a top_k below 1.
        """
        sources.check_positive(top_k=top_k)
        thresholds = self._thresholds
        if threshold is not None:
            thresholds = np.full(len(self.classes), threshold, np.float32)
        decisions = self.task.decide(scores, thresholds, top_k)
        sets = self._find_sets(scores)
        labels = self._list_labels(scores, decisions.is_predicted)
        predictions = [
            Prediction(
                label=self.classes[best[0]],
                confidence=float(value[0]),
                accepted=bool(accepted),
                topk_labels=[self.classes[i] for i in best],
                topk_scores=[float(v) for v in value],
                label_set=label_set,
                labels=predicted,
            )
            for best, value, accepted, label_set, predicted in zip(
                decisions.classes, decisions.scores, decisions.accepted, sets, labels, strict=True
            )
        ]
        if ood is None:
            return predictions
        return [
            replace(
                each,
                accepted=each.accepted and not is_ood,
                ood_score=float(value),
                is_ood=bool(is_ood),
            )
            for each, value, is_ood in zip(predictions, ood.values, ood.is_ood, strict=True)
        ]

    def _list_labels(
        self, scores: npt.NDArray[np.float32], is_predicted: npt.NDArray[np.bool_] | None
    ) -> Sequence[list[str] | None]:
        """The predicted labels of each row, best first; None for one label per image."""
        if is_predicted is None:
            return [None] * len(scores)
        lists: list[list[str]] = build_label_lists(scores, is_predicted, self.classes).to_pylist()
        return lists

    def find_ood(self, embeddings: npt.NDArray[np.float32]) -> OodScores | None:
        """OOD scores of (N, E) embeddings; None for a bundle without a detector."""
        return None if self.ood_detector is None else self.ood_detector.classify(embeddings)

    def _find_sets(self, scores: npt.NDArray[np.float32]) -> Sequence[list[str] | None]:
        """The label set of each row; None for a bundle without label sets."""
        if self.label_sets is None:
            return [None] * len(scores)
        order, is_included = find_label_sets(scores, self.label_sets)
        lists: list[list[str]] = build_set_column(order, is_included, self.classes).to_pylist()
        return lists
