"""Explanations in one replica, apart from the predictions: one image at a time, in a thread.

The network that explains is loaded by the first request that needs it, so that a service without
such requests has neither its memory nor its time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from imgcls.errors import BundleError
from imgcls.models.classifier import Classifier
from imgcls.models.explain import Explainer
from imgcls.models.explanation import explain_file
from imgcls.models.notebook_repr import encode_data_uri
from imgcls.serving.problems import Problem, build_busy_problem, build_out_of_memory_problem

EXPLANATION_COST = 4
"""Images of the rate limit that an explanation counts as, in addition to the prediction."""
MAX_WAITING = 16
"""Maximum number of images that wait for an explanation in one replica."""
_SECONDS_EACH = 0.5


class LazyExplainer:
    """The explainer of a served model, loaded when it is first used."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._lock = threading.Lock()
        self._explainer: Explainer | None = None

    def load(self) -> Explainer:
        """Raises a Problem (501) if the network cannot be explained."""
        with self._lock:
            if self._explainer is None:
                try:
                    bundle = self._classifier.bundle
                    self._explainer = Explainer(bundle, self._classifier.device)
                except BundleError as error:
                    raise Problem(501, "not_explainable", str(error)) from error
            return self._explainer


class ExplanationQueue:
    """Explains images one at a time, in the order of the requests."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "explain")
        self._waiting = 0

    def check_capacity(self, count: int) -> None:
        """Raise a Problem (503) if `count` more images would be too many."""
        if self._waiting + count > MAX_WAITING:
            raise build_busy_problem(self._waiting * _SECONDS_EACH)

    async def explain(
        self, explainer: LazyExplainer, images: Sequence[tuple[bytes, str]], max_pixels: int
    ) -> list[str]:
        """Overlays as data URIs.

        images: bytes of the files with the class to explain
        Raises a Problem if too many images wait, the network cannot be explained, or a GPU has no
        memory for it.
        """
        self.check_capacity(len(images))
        self._waiting += len(images)
        loop = asyncio.get_running_loop()
        try:
            return [
                await loop.run_in_executor(self._pool, _draw, explainer, data, label, max_pixels)
                for data, label in images
            ]
        finally:
            self._waiting -= len(images)


def _draw(explainer: LazyExplainer, data: bytes, label: str, max_pixels: int) -> str:
    try:
        loaded = explainer.load()
        code = loaded.classes.index(label)
        explanation = explain_file(loaded, data, [code], max_pixels=max_pixels)[0]
    except torch.OutOfMemoryError as error:
        raise build_out_of_memory_problem(1) from error
    return encode_data_uri(explanation.overlay())
