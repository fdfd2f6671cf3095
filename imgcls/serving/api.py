"""The HTTP interface: routes, who may take them, and what every answer carries.

Knows nothing of Ray: an ASGI application around a `Service`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from imgcls import __version__
from imgcls.data.formats import MIME_TYPES
from imgcls.runs.schema import OK
from imgcls.serving import page
from imgcls.serving.app_middleware import AppMiddleware
from imgcls.serving.auth import AccessControl
from imgcls.serving.config import ServeConfig
from imgcls.serving.problems import (
    MEDIA_TYPE,
    Problem,
    build_image_problem,
    build_internal_error,
    build_status_problem,
)
from imgcls.serving.service import PredictOptions, Service
from imgcls.serving.uploads import BodyBudget, receive_uploads

_bearer_scheme = HTTPBearer(auto_error=False, description="An API key.")
_header_scheme = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key.")
BearerKey = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer_scheme)]
HeaderKey = Annotated[str | None, Security(_header_scheme)]


class PredictionRow(BaseModel):
    """One image, in the columns of a labelling run."""

    row: int
    """Its place in the request."""
    name: str | None
    """The file name that came with it."""
    predicted_label: str | None
    confidence: float | None
    accepted: bool
    topk_labels: list[str] | None
    topk_scores: list[float] | None
    width: int | None
    height: int | None
    status: str
    error: str | None
    embedding: list[float] | None = None


class PredictResponse(BaseModel):
    """What `POST /v1/predict` says."""

    model: str
    """SHA-256 of the bundle that it comes from."""
    predictions: list[PredictionRow]


class ModelDescription(BaseModel):
    """What `GET /v1/model` says."""

    sha256: str
    architecture: dict[str, Any]
    classes: list[str]
    preprocess: dict[str, Any]
    temperature: float
    threshold: float
    thresholds: dict[str, float]
    precision: str
    embedding_width: int
    metrics: dict[str, float]


class ProblemDetails(BaseModel):
    """A problem (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str


class ReloadResponse(BaseModel):
    """What `POST /v1/model/reload` says."""

    reload: int = Field(description="Counts the requests to load the model again.")


def _describe_problems(texts: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """For the description of a route: which problems it answers with, by HTTP status."""
    return {
        status: {"model": ProblemDetails, "content": {MEDIA_TYPE: {}}, "description": text}
        for status, text in texts.items()
    }


_AUTH_ERRORS = _describe_problems(
    {
        400: "The request is malformed.",
        401: "No API key, or one that is not known.",
        403: "The API key has not the scope that this needs.",
    }
)
_COORDINATOR_ERRORS = _AUTH_ERRORS | _describe_problems(
    {503: "A part is being started anew; see Retry-After."}
)
_PREDICT_ERRORS = _AUTH_ERRORS | _describe_problems(
    {
        408: "The body did not arrive in time.",
        413: "Too many bytes, pixels or images.",
        415: "Not an image, an image of a kind that is not decoded, or another kind of body.",
        422: "The one image is truncated, empty or damaged.",
        429: "The API key has sent too many images; see Retry-After.",
        503: "Too much is waiting; see Retry-After.",
    }
)
_BINARY_SCHEMA = {"schema": {"type": "string", "format": "binary"}}
_PREDICT_BODY = {
    "requestBody": {
        "required": True,
        "description": "One image as it is, or several as the files of a form.",
        "content": {
            "application/octet-stream": _BINARY_SCHEMA,
            **dict.fromkeys(MIME_TYPES, _BINARY_SCHEMA),
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            },
        },
    }
}


def build_app(service: Service, door: AccessControl, config: ServeConfig) -> ASGIApp:
    """The application; `config` gives what cannot change while it runs."""
    app = FastAPI(
        title="imgcls",
        version=__version__,
        summary="Labels images with one model.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
    )
    spool = BodyBudget(config.limits.spool_bytes)

    def presented(bearer: HTTPAuthorizationCredentials | None, header: str | None) -> str | None:
        return bearer.credentials if bearer is not None else header

    @app.post(
        "/v1/predict",
        response_model=PredictResponse,
        responses=_PREDICT_ERRORS,
        openapi_extra=_PREDICT_BODY,
        summary="Label images",
    )
    async def predict(
        request: Request,
        bearer: BearerKey,
        header: HeaderKey,
        top_k: Annotated[int | None, Query(ge=1, le=1000, description="Labels per image.")] = None,
        threshold: Annotated[
            float | None,
            Query(ge=0, le=1, description="Confidence to be accepted with, for the model's own."),
        ] = None,
        embeddings: Annotated[bool, Query(description="The final layer's input too.")] = False,
    ) -> Response:
        key = door.authorize(presented(bearer, header), "predict", request)
        service.check_capacity()
        await door.charge(key, 1)
        wanted = PredictOptions(
            top_k or service.config.top_k,
            service.config.threshold if threshold is None else threshold,
            embeddings,
        )
        async with receive_uploads(request, service.config.limits, spool) as uploads:
            if len(uploads) > 1:
                await door.charge(key, len(uploads) - 1)
            model, rows = await service.predict(uploads, wanted)
        if len(rows) == 1 and rows[0]["status"] != OK:
            raise build_image_problem(rows[0]["status"], rows[0]["error"])
        return JSONResponse({"model": model.sha256, "predictions": rows})

    @app.get(
        "/v1/model",
        response_model=ModelDescription,
        responses=_AUTH_ERRORS,
        summary="Describe the model",
    )
    async def model(request: Request, bearer: BearerKey, header: HeaderKey) -> Response:
        door.authorize(presented(bearer, header), "predict", request)
        return JSONResponse(service.describe_model())

    @app.post(
        "/v1/model/reload",
        status_code=202,
        response_model=ReloadResponse,
        responses=_COORDINATOR_ERRORS,
        summary="Load the bundle again, from where it is configured to be",
    )
    async def reload(request: Request, bearer: BearerKey, header: HeaderKey) -> Response:
        door.authorize(presented(bearer, header), "admin", request)
        return JSONResponse({"reload": await door.control.request_reload()}, 202)

    @app.get(
        "/metrics",
        responses=_COORDINATOR_ERRORS,
        response_class=PlainTextResponse,
        summary="Metrics",
    )
    async def metrics(request: Request, bearer: BearerKey, header: HeaderKey) -> Response:
        door.authorize(presented(bearer, header), "admin", request)
        return Response(
            await door.control.render_metrics(),
            media_type="text/plain; version=0.0.4; charset=utf-8",
        )

    @app.get("/healthz", response_class=PlainTextResponse, summary="Whether it is alive")
    async def healthz() -> str:
        return "ok"

    @app.get(
        "/readyz",
        response_class=PlainTextResponse,
        responses=_describe_problems({503: "It is about to end."}),
        summary="Whether it takes requests",
    )
    async def readyz() -> str:
        if door.is_draining:
            raise Problem(503, "draining", "about to end; ask another", retry_after=5)
        return "ok"

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(
            page.HTML, headers={"Content-Security-Policy": page.CONTENT_SECURITY_POLICY}
        )

    _add_error_handlers(app)
    guarded: ASGIApp = AppMiddleware(app, service, config)
    if config.http.cors_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=config.http.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    return guarded


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def of_problem(request: Request, problem: Problem) -> Response:
        return problem.build_response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        response = build_status_problem(error.status_code).build_response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)  # it goes on to the guard, which logs it
    async def of_defect(request: Request, error: Exception) -> Response:
        return build_internal_error().build_response()

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'][1:])}: {item['msg']}"
            for item in error.errors()
        )
        return Problem(400, "invalid_parameter", wrong[:500]).build_response()
