"""HTTP routes of labeling: the page, images of the queue, decisions, undo and progress.

A client names an image by its row in the queue, never by a path. A row is valid only together with
the ID of the queue: a replica with another list of images rejects the request (409).
"""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import unicodedata
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Path, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import ValidationError

from imgcls.errors import OutputError, StorageError
from imgcls.serving import page
from imgcls.serving.api_keys import ApiKey
from imgcls.serving.api_schemas import (
    AUTH_ERRORS,
    PredictResponse,
    Secret,
    build_predict_response,
    describe_problems,
)
from imgcls.serving.auth import AccessControl
from imgcls.serving.labeling.images import BROWSER_FORMATS, QueueImages, convert_for_browser
from imgcls.serving.labeling.labeling import Labeling, UnavailableLabeling
from imgcls.serving.labeling.schemas import (
    DecisionRequest,
    LabelingRequest,
    ProgressResponse,
    QueueDescription,
    UndoRequest,
    WorkResponse,
    build_progress_response,
    build_work_response,
)
from imgcls.serving.problems import Problem
from imgcls.serving.service import PredictOptions, Service
from imgcls.serving.uploads import BodyBudget, Upload, receive_json

T = TypeVar("T")
R = TypeVar("R", bound=LabelingRequest)

_RETRY_AFTER_S = 5
_STORE_ERRORS = AUTH_ERRORS | describe_problems(
    {
        409: "The list of images has changed, or the request does not fit the stored decisions; "
        "the detail has the reason.",
        503: "The manifest or the folder of the labels cannot be read or written; see Retry-After.",
    }
)
_BODY_ERRORS = _STORE_ERRORS | describe_problems(
    {
        404: "No such image or decision.",
        408: "The request body did not arrive in time.",
        413: "The request body is too large.",
        415: "The content type is not application/json.",
    }
)
_IMAGE_ERRORS = AUTH_ERRORS | describe_problems(
    {
        404: "No such image.",
        409: "The list of images has changed.",
        413: "Too many bytes or pixels.",
        415: "Not an image, or an unsupported image format.",
        422: "The image is missing, truncated, empty or damaged.",
        429: "Rate limit of the API key exceeded; see Retry-After.",
        503: "The image or the manifest cannot be read now, or the queue of the model is full; see "
        "Retry-After.",
    }
)
_UNAVAILABLE_ERRORS = AUTH_ERRORS | describe_problems(
    {503: "This replica cannot read the manifest or the folder of the labels; see Retry-After."}
)
_IMAGE_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": f"The image file, or a JPEG if it is none of {sorted(BROWSER_FORMATS)}.",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
QueueId = Annotated[str, Path(max_length=64, description="ID of the queue.")]
Row = Annotated[int, Path(ge=0, description="Index of the image in the queue.")]

logger = logging.getLogger("ray.serve")


def add_labeling_routes(
    app: FastAPI,
    service: Service,
    access: AccessControl,
    labeling: Labeling | UnavailableLabeling,
    budget: BodyBudget,
) -> None:
    """Add the labeling page and its routes.

    If labeling is unavailable, each route is answered with a problem (503), which the page retries.
    """
    label_page = page.StaticPage.load("label.html")

    @app.get("/label", response_class=HTMLResponse, include_in_schema=False)
    async def label() -> HTMLResponse:
        return label_page.build_response()

    if isinstance(labeling, UnavailableLabeling):
        _add_unavailable_routes(app, access, labeling)
        return
    _add_image_routes(app, service, access, labeling)
    _add_queue_routes(app, service, access, labeling)
    _add_decision_routes(app, service, access, labeling, budget)


def _add_unavailable_routes(
    app: FastAPI, access: AccessControl, labeling: UnavailableLabeling
) -> None:
    path = "/v1/labeling/{path:path}"

    @app.get(path, responses=_UNAVAILABLE_ERRORS, summary="Labeling is not available")
    @app.post(path, responses=_UNAVAILABLE_ERRORS, summary="Labeling is not available")
    async def unavailable(request: Request, secret: Secret, path: str) -> Response:
        access.authorize(secret, "label", request)
        raise Problem(
            503,
            "labeling_unavailable",
            f"labeling is not available in this replica: {labeling.reason}",
            retry_after=_RETRY_AFTER_S,
        )


def _add_image_routes(
    app: FastAPI, service: Service, access: AccessControl, labeling: Labeling
) -> None:
    images = QueueImages(labeling.queue, service.config.limits)

    @app.get(
        "/v1/labeling/images/{queue}/{row}",
        responses=_IMAGE_RESPONSE | _IMAGE_ERRORS,
        response_class=Response,
        summary="Image of the labeling queue",
    )
    async def image(request: Request, secret: Secret, queue: QueueId, row: Row) -> Response:
        access.authorize(secret, "label", request)
        _check_image(labeling, queue, row)
        data = await images.read(row)
        limits = service.config.limits
        shown, kind = await service.run_in_decoder(lambda: convert_for_browser(data, limits))
        return Response(shown, media_type=kind)

    @app.get(
        "/v1/labeling/images/{queue}/{row}/suggestion",
        response_model=PredictResponse,
        response_model_exclude_unset=True,
        responses=_IMAGE_ERRORS,
        summary="Prediction for an image of the labeling queue",
    )
    async def suggestion(request: Request, secret: Secret, queue: QueueId, row: Row) -> Any:
        key = access.authorize(secret, "label", request)
        _check_image(labeling, queue, row)
        service.check_capacity()
        await access.charge(key, 1)  # for the image, too: a page asks for both
        data = await images.read(row)
        options = PredictOptions(service.config.top_k, service.config.threshold)
        model, rows = await service.predict([Upload(io.BytesIO(data), len(data))], options)
        return build_predict_response(model.sha256, rows)


def _add_queue_routes(
    app: FastAPI, service: Service, access: AccessControl, labeling: Labeling
) -> None:
    @app.get(
        "/v1/labeling/queue",
        response_model=QueueDescription,
        responses=_STORE_ERRORS,
        summary="Describe the labeling queue",
    )
    async def queue(request: Request, secret: Secret) -> QueueDescription:
        key = access.authorize(secret, "label", request)
        return QueueDescription(
            queue=labeling.queue.queue_id,
            task="multilabel" if labeling.several else "single_label",
            classes=_list_classes(service, labeling),
            images=len(labeling.queue),
            annotations_per_image=labeling.annotations_per_image,
            annotator=None if key is None else key.name,
        )

    @app.get(
        "/v1/labeling/progress",
        response_model=ProgressResponse,
        responses=_STORE_ERRORS,
        summary="Labels, agreement and disagreements of all annotators",
    )
    async def progress(request: Request, secret: Secret) -> ProgressResponse:
        access.authorize(secret, "label", request)
        classes = _list_classes(service, labeling)
        found = await _run(labeling.progress_thread, lambda: labeling.measure_progress(classes))
        return build_progress_response(found, labeling.queue)


def _add_decision_routes(
    app: FastAPI,
    service: Service,
    access: AccessControl,
    labeling: Labeling,
    budget: BodyBudget,
) -> None:
    async def receive(request: Request, secret: str | None, model: type[R]) -> tuple[R, str]:
        """The body of a request and the name of its annotator."""
        key = access.authorize(secret, "label", request)
        body = _parse(model, await receive_json(request, service.config.limits, budget))
        _check_queue(labeling, body.queue)
        return body, _find_annotator(key, body)

    post = functools.partial(app.post, response_model=WorkResponse, responses=_BODY_ERRORS)

    @post(
        "/v1/labeling/next",
        openapi_extra=_describe_body(LabelingRequest),
        summary="Assign the next images to an annotator",
    )
    async def assign_next(request: Request, secret: Secret) -> WorkResponse:
        _, annotator = await receive(request, secret, LabelingRequest)
        work = await _run(labeling.threads, lambda: labeling.assign(annotator))
        return build_work_response(work, labeling.queue)

    @post(
        "/v1/labeling/decisions",
        openapi_extra=_describe_body(DecisionRequest),
        summary="Store the labels of an image",
    )
    async def decide(request: Request, secret: Secret) -> WorkResponse:
        body, annotator = await receive(request, secret, DecisionRequest)
        _check_image(labeling, body.queue, body.row)
        labels = _check_labels(body.labels, _list_classes(service, labeling), labeling.several)
        work = await _run(
            labeling.threads,
            lambda: labeling.submit(annotator, body.row, labels, body.submission),
        )
        return build_work_response(work, labeling.queue)

    @post(
        "/v1/labeling/undo",
        openapi_extra=_describe_body(UndoRequest),
        summary="Undo a decision",
    )
    async def undo(request: Request, secret: Secret) -> WorkResponse:
        body, annotator = await receive(request, secret, UndoRequest)
        work = await _run(labeling.threads, lambda: labeling.undo(annotator, body.submission))
        return build_work_response(work, labeling.queue)


async def _run(threads: Executor, call: Callable[[], T]) -> T:
    """Run a call of the store in a thread; its errors become problems."""
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, call)
    except StorageError as error:
        logger.error("the folder of the labels: %s", error)
        raise Problem(503, "labels_unavailable", str(error), retry_after=_RETRY_AFTER_S) from error
    except OutputError as error:
        logger.error("the folder of the labels: %s", error)
        raise Problem(409, "labels_refused", str(error)) from error


def _parse(model: type[R], data: bytes) -> R:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)
        )
        raise Problem(400, "invalid_parameter", "; ".join(problems)[:500]) from None


def _describe_body(model: type[LabelingRequest]) -> dict[str, Any]:
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _find_annotator(key: ApiKey | None, body: LabelingRequest) -> str:
    if key is not None:
        return key.name
    if body.annotator is None:
        raise Problem(400, "annotator_missing", "annotator: the name of the annotator is missing")
    return unicodedata.normalize("NFC", body.annotator)


def _list_classes(service: Service, labeling: Labeling) -> list[str]:
    """The classes of the model in use, and those added in the settings."""
    spec = service.model.classifier.bundle.spec
    if (spec.task == "multilabel") != labeling.several:
        raise Problem(
            409,
            "task_changed",
            "the model was replaced by one of another task; restart the service",
        )
    return list(dict.fromkeys((*spec.classes, *labeling.added_classes)))


def _check_queue(labeling: Labeling, queue: str) -> None:
    if queue != labeling.queue.queue_id:
        raise Problem(409, "queue_changed", "the list of images has changed. Load the page again")


def _check_image(labeling: Labeling, queue: str, row: int) -> None:
    _check_queue(labeling, queue)
    if row >= len(labeling.queue):
        raise Problem(404, "image_unknown", f"the queue has no image {row}")


def _check_labels(
    labels: list[str] | None, classes: list[str], several: bool
) -> tuple[str, ...] | None:
    """The labels in the order of the classes. Raises a Problem (400)."""
    if labels is None:
        return None
    places = {name: place for place, name in enumerate(classes)}
    unknown = next((name for name in labels if name not in places), None)
    if unknown is not None:
        raise Problem(400, "unknown_class", f"labels: {unknown[:100]!r} is not a class")
    if not several and len(labels) != 1:
        raise Problem(400, "invalid_labels", "labels: exactly one class is needed, or null")
    if len(set(labels)) < len(labels):
        raise Problem(400, "invalid_labels", "labels: a class is listed twice")
    return tuple(sorted(labels, key=places.__getitem__))
