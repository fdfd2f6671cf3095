"""Results of `Classifier.predict`: the prediction of an image, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

from imgcls.errors import ImageError, ImgclsError, StorageError
from imgcls.models.notebook_repr import render_failed_prediction, render_prediction
from imgcls.models.sources import ImageSource, add_source_name


@dataclass(frozen=True)
class Prediction:
    """Prediction of one image.

    Parameters
    ----------
    label, confidence
        Class with the highest score, and this score.
    accepted
        Whether the confidence reaches the threshold, and the image is not out of distribution. Of a
        multi-label model: whether there is a predicted label.
    topk_labels, topk_scores
        The k best classes and their scores, best first.
    labels
        Predicted labels of a multi-label model, best first: all classes that reach their threshold,
        possibly none. None for a model of one label per image.
    label_set
        Conformal label set, best label first; None for a bundle without label sets.
    ood_score, is_ood
        How unlike the training data the image is, and whether the score exceeds the bundle's
        maximum; None for a bundle without an out-of-distribution detector.
    source
        The image as it was passed, for display in a notebook.
    status, error
        Always "ok" and None, as in the output columns of `imgcls predict`.
    """

    label: str
    confidence: float
    accepted: bool
    topk_labels: list[str]
    topk_scores: list[float]
    label_set: list[str] | None = None
    ood_score: float | None = None
    is_ood: bool | None = None
    source: ImageSource | None = field(default=None, repr=False, compare=False)
    status: str = "ok"
    error: str | None = None
    labels: list[str] | None = None

    def _repr_html_(self) -> str:
        return render_prediction(
            self.source, self.topk_labels, self.topk_scores, self.accepted, self.labels
        )


@dataclass(frozen=True)
class FailedPrediction:
    """Result for an image without a prediction, with the fields of `Prediction`.

    Parameters
    ----------
    status, error
        Kind and text of the error, as in the output columns of `imgcls predict`.
    source
        The image as it was passed, for display in a notebook.
    """

    status: str
    error: str
    source: ImageSource | None = field(default=None, repr=False, compare=False)
    label: None = None
    confidence: None = None
    accepted: bool = False
    topk_labels: list[str] = field(default_factory=list)
    topk_scores: list[float] = field(default_factory=list)
    label_set: None = None
    ood_score: None = None
    is_ood: None = None
    labels: None = None

    def _repr_html_(self) -> str:
        return render_failed_prediction(self.source, self.error)


AnyPrediction = TypeVar("AnyPrediction", bound=Prediction | FailedPrediction)


class Predictions(list[AnyPrediction]):
    """List of predictions in the order of their images, with an HTML view for notebooks."""

    def _repr_html_(self) -> str:
        shown = "".join(prediction._repr_html_() for prediction in self[:MAX_SHOWN])
        more = len(self) - MAX_SHOWN
        return shown + (f"<p>and {more:,} more</p>" if more > 0 else "")


MAX_SHOWN = 24
"""Number of predictions in the HTML view."""


def build_failed_prediction(
    error: ImgclsError, source: ImageSource, position: int, errors: Literal["raise", "return"]
) -> FailedPrediction:
    """The result for an image that cannot be used; raises the error with the image's name instead
    if `errors` is "raise", or for an argument of another type or value.
    """
    named = add_source_name(error, source, position)
    if errors == "raise" or not isinstance(error, (StorageError, ImageError)):
        raise named from error
    return FailedPrediction(error.status, str(named), source)
