"""Explanations in one replica, apart from the predictions: one image at a time, in a thread.

The network that explains is loaded by the first request that needs it, so that a service without
such requests has neither its memory nor its time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from imgcls.data.encode_image import encode_data_uri
from imgcls.errors import BundleError, NotExplainable, StorageError
from imgcls.models.classifier import Classifier
from imgcls.models.explain import Explainer
from imgcls.models.explanation import explain_file
from imgcls.serving.config import MAX_WAITING_EXPLANATIONS
from imgcls.serving.problems import Problem, build_busy_problem, build_out_of_memory_problem
from imgcls.serving.uploads import Upload

EXPLANATION_COST = 4
"""Images of the rate limit that an explanation counts as, in addition to the prediction."""
_RETRY_S = 30
"""Time between two attempts to read weights after a storage error, in seconds."""
_SECONDS_EACH = 0.5


class LazyExplainer:
    """The explainer of a served model, loaded when it is first used. Used by one thread."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._explainer: Explainer | None = None
        self._failure: Exception | None = None
        self._failed_at = 0.0

    def load(self) -> Explainer:
        """Load the network, unless that failed before.

        Raises a Problem: 501 if the network cannot be explained, 503 if its weights cannot be read.
        """
        if self._explainer is not None:
            return self._explainer
        is_temporary = isinstance(self._failure, StorageError)
        if is_temporary and time.monotonic() - self._failed_at > _RETRY_S:
            self._failure = None
        if self._failure is None:
            try:
                self._explainer = Explainer(self._classifier.bundle, self._classifier.device)
                return self._explainer
            except (BundleError, StorageError) as error:
                self._failure, self._failed_at = error, time.monotonic()
        raise _build_load_problem(self._failure) from self._failure


def _build_load_problem(error: Exception) -> Problem:
    """Problem for an explainer that cannot be loaded.

    If weights are missing or replaced, restore the bundle and reload the model.
    """
    if isinstance(error, NotExplainable):
        return Problem(501, "not_explainable", str(error))
    return Problem(
        503,
        "weights_unavailable",
        f"the weights of the served model cannot be read again: {error}. Restore the bundle if it "
        "is missing, then reload the model (POST /v1/model/reload)",
    )


class ExplanationQueue:
    """Explains images one at a time, in the order of the requests."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "explain")
        self._waiting = 0

    def check_capacity(self, count: int) -> None:
        """Raise a Problem (503) if `count` more images would be too many."""
        if self._waiting + count > MAX_WAITING_EXPLANATIONS:
            raise build_busy_problem(self._waiting * _SECONDS_EACH)

    async def explain(
        self, explainer: LazyExplainer, images: Sequence[tuple[Upload, str]], max_pixels: int
    ) -> list[str]:
        """Overlays as data URIs.

        images: files with the class to explain
        Raises a Problem if too many images wait, the network cannot be explained, or a GPU has no
        memory for it.
        """
        self.check_capacity(len(images))
        self._waiting += len(images)
        loop = asyncio.get_running_loop()
        try:
            return [
                await loop.run_in_executor(self._pool, _draw, explainer, upload, label, max_pixels)
                for upload, label in images
            ]
        finally:
            self._waiting -= len(images)


def _draw(explainer: LazyExplainer, upload: Upload, label: str, max_pixels: int) -> str:
    try:
        loaded = explainer.load()
        code = loaded.classes.index(label)
        explanation = explain_file(loaded, upload.read(), [code], max_pixels=max_pixels)[0]
    except torch.OutOfMemoryError as error:
        raise build_out_of_memory_problem(1) from error
    return encode_data_uri(explanation.overlay())
