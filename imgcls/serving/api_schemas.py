"""Parts of the OpenAPI description that several routes share: API keys, responses, problems."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field

from imgcls.errors import OK
from imgcls.models.bundle import TaskName
from imgcls.serving.problems import MEDIA_TYPE, build_image_problem

_bearer_scheme = HTTPBearer(auto_error=False, description="API key.")
_header_scheme = APIKeyHeader(name="X-API-Key", auto_error=False, description="API key.")
BearerKey = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer_scheme)]
HeaderKey = Annotated[str | None, Security(_header_scheme)]


async def _get_secret(bearer: BearerKey, header: HeaderKey) -> str | None:
    return bearer.credentials if bearer is not None else header


Secret = Annotated[str | None, Depends(_get_secret)]
"""The API key that a request carries, in either header."""


class ExplanationImage(BaseModel):
    """Class activation map (Grad-CAM): image regions that contribute to the score of a class."""

    label: str = Field(description="The explained class: the one with the highest score.")
    image: str = Field(
        description="JPEG as a data URI (base64): the image with the map over it, at most 512 "
        "pixels wide and high."
    )


class PredictionRow(BaseModel):
    """Prediction of one image, in the columns of the batch job."""

    row: int = Field(description="Index of the image in the request.")
    name: str | None = Field(description="File name that the client sent.")
    predicted_label: str | None = Field(
        default=None, description="Class with the highest score; absent with task multilabel."
    )
    confidence: float | None = Field(
        default=None, description="Score of predicted_label; absent with task multilabel."
    )
    predicted_labels: list[str] | None = Field(
        default=None,
        description="All classes whose score reaches their threshold, best first, possibly none; "
        "only with task multilabel. Null for an image without a prediction.",
    )
    accepted: bool = Field(
        description="Whether the confidence reaches its threshold, or with task multilabel any "
        "score does, and the image is not out of distribution."
    )
    topk_labels: list[str] | None = Field(description="The top_k best classes, best first.")
    topk_scores: list[float] | None = Field(description="Their scores.")
    scores: dict[str, float] | None = Field(
        default=None, description="Score of each class, on request: scores=true."
    )
    label_set: list[str] | None = Field(
        default=None, description="Conformal label set, of a model that has them."
    )
    ood_score: float | None = Field(
        default=None,
        description="How unlike the training data the image is, if the model has a detector.",
    )
    is_ood: bool | None = Field(
        default=None, description="Whether the image is out of distribution: never accepted."
    )
    width: int | None
    height: int | None
    status: str
    error: str | None
    embedding: list[float] | None = None
    explanation: ExplanationImage | None = Field(
        default=None, description="On request, explain=true, of an image with a prediction."
    )


class PredictResponse(BaseModel):
    """Response to `POST /v1/predict`."""

    model: str = Field(description="SHA-256 of the bundle that was used.")
    predictions: list[PredictionRow]


def build_predict_response(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A PredictResponse as JSON.

    model: SHA-256 of the bundle
    Raises the Problem of a request whose only image was rejected.
    """
    if len(rows) == 1 and rows[0]["status"] != OK:
        raise build_image_problem(rows[0]["status"], rows[0]["error"])
    return {"model": model, "predictions": rows}


class ModelDescription(BaseModel):
    """Response to `GET /v1/model`."""

    sha256: str
    task: TaskName = Field(
        description="single_label: one class per image. multilabel: any number of classes."
    )
    architecture: dict[str, Any]
    classes: list[str]
    preprocess: dict[str, Any]
    temperature: float
    threshold: float = Field(
        description="Minimum confidence of an accepted prediction; with task multilabel, minimum "
        "score of a predicted label."
    )
    thresholds: dict[str, float] = Field(
        description="Thresholds of single classes, instead of threshold."
    )
    label_set_coverage: float | None = Field(
        default=None, description="Probability that a label set includes the label."
    )
    ood_rate: float | None = Field(
        default=None, description="Share of images like the held-out ones with is_ood."
    )
    precision: str
    engine: str = Field(description="Library that runs the network, and its version.")
    embedding_width: int
    metrics: dict[str, float]
    explained_images: int = Field(
        description="Maximum number of images in a request with explain=true; 0: not available."
    )


class ProblemDetails(BaseModel):
    """Problem details (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str


class ReloadResponse(BaseModel):
    """Response to `POST /v1/model/reload`."""

    reload: int = Field(description="Number of reloads requested since the service started.")


def describe_problems(texts: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI description of the problems of a route, by HTTP status."""
    return {
        status: {"model": ProblemDetails, "content": {MEDIA_TYPE: {}}, "description": text}
        for status, text in texts.items()
    }


AUTH_ERRORS = describe_problems(
    {
        400: "Malformed request.",
        401: "Missing or unknown API key.",
        403: "The API key does not have the required scope.",
    }
)
"""Problems of every route that needs an API key."""
