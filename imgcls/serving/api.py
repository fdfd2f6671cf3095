"""HTTP interface of the service: routes, OpenAPI description and error responses.

An ASGI application around a `Service`; does not import Ray.
"""

from __future__ import annotations

from typing import Annotated, Protocol

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from imgcls import __version__
from imgcls.data.formats import MIME_TYPES
from imgcls.serving import page
from imgcls.serving.api_schemas import (
    AUTH_ERRORS,
    ModelDescription,
    PredictResponse,
    ReloadResponse,
    Secret,
    build_predict_response,
    describe_problems,
)
from imgcls.serving.app_middleware import AppMiddleware
from imgcls.serving.auth import AccessControl
from imgcls.serving.config import ServeConfig
from imgcls.serving.explanations import EXPLANATION_COST
from imgcls.serving.labeling.labeling import Labeling, UnavailableLabeling
from imgcls.serving.problems import (
    Problem,
    build_internal_error,
    build_status_problem,
)
from imgcls.serving.service import PredictOptions, Service
from imgcls.serving.uploads import BodyBudget, receive_uploads


class ServiceControl(Protocol):
    """Operations on all replicas of the service."""

    async def request_reload(self) -> int:
        """Have all replicas reload their bundle. Returns the number of reloads requested so far."""

    async def render_metrics(self) -> bytes:
        """The summed metrics of all replicas, in Prometheus' text format."""


_COORDINATOR_ERRORS = AUTH_ERRORS | describe_problems(
    {503: "A part of the service is restarting; see Retry-After."}
)
_PREDICT_ERRORS = AUTH_ERRORS | describe_problems(
    {
        408: "The request body did not arrive in time.",
        413: "Too many bytes, pixels or images.",
        415: "Not an image, an unsupported image format, or an unsupported content type.",
        422: "The only image of the request is truncated, empty or damaged.",
        429: "Rate limit of the API key exceeded; see Retry-After.",
        501: "With explain=true: the network cannot be explained, or explanations are off.",
        503: "The queue is full, the GPU failed or has no memory left, or the weights of the model "
        "cannot be read again; see Retry-After.",
    }
)
_THRESHOLD_TEXT = (
    "Minimum confidence of an accepted prediction, or with task multilabel minimum score of each "
    "predicted label. Replaces the thresholds of all classes. Default: those of the model."
)
_EXPLAIN_TEXT = (
    "Also return a class activation map of each image: the regions that contribute to the highest "
    f"score. For few images per request; each counts as {1 + EXPLANATION_COST} images of the rate "
    "limit."
)
_BINARY_SCHEMA = {"schema": {"type": "string", "format": "binary"}}
_PREDICT_BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes of one image, or a form with one or more image files.",
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


def build_app(
    service: Service,
    access: AccessControl,
    control: ServiceControl,
    config: ServeConfig,
    labeling: Labeling | UnavailableLabeling | None = None,
) -> ASGIApp:
    """Build the ASGI application.

    config:   settings that do not change while the application runs
    labeling: adds the labeling page
    """
    app = FastAPI(
        title="imgcls",
        version=__version__,
        summary="Image classification with one model.",
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
    )
    budget = BodyBudget(config.limits.spool_bytes)
    _add_predict_route(app, service, access, budget)
    _add_model_routes(app, service, access, control)
    _add_public_routes(app, service)
    if labeling is not None:
        from imgcls.serving.labeling.routes import add_labeling_routes

        add_labeling_routes(app, service, access, labeling, budget)
    _add_error_handlers(app)
    wrapped: ASGIApp = AppMiddleware(app, service.metrics, config)
    if config.http.cors_origins:
        wrapped = CORSMiddleware(
            wrapped,
            allow_origins=config.http.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    return wrapped


def _add_predict_route(
    app: FastAPI, service: Service, access: AccessControl, budget: BodyBudget
) -> None:
    @app.post(
        "/v1/predict",
        response_model=PredictResponse,
        responses=_PREDICT_ERRORS,
        openapi_extra=_PREDICT_BODY,
        summary="Classify images",
    )
    async def predict(
        request: Request,
        secret: Secret,
        top_k: Annotated[
            int | None, Query(ge=1, le=1000, description="Labels in topk_labels.")
        ] = None,
        threshold: Annotated[
            float | None,
            Query(ge=0, le=1, description=_THRESHOLD_TEXT),
        ] = None,
        embeddings: Annotated[bool, Query(description="Also return the embeddings.")] = False,
        scores: Annotated[bool, Query(description="Also return the score of each class.")] = False,
        explain: Annotated[bool, Query(description=_EXPLAIN_TEXT)] = False,
    ) -> Response:
        key = access.authorize(secret, "predict", request)
        service.check_capacity()
        if explain:
            service.check_explanations(1)
        cost = 1 + EXPLANATION_COST if explain else 1
        await access.charge(key, cost)
        options = PredictOptions(
            top_k or service.config.top_k,
            service.config.threshold if threshold is None else threshold,
            embeddings,
            scores,
            explain,
        )
        async with receive_uploads(request, service.config.limits, budget) as uploads:
            service.check_capacity(len(uploads))
            if explain:
                service.check_explanations(len(uploads))
            if len(uploads) > 1:
                await access.charge(key, cost * (len(uploads) - 1), paid=cost)
            model, rows = await service.predict(uploads, options)
        return JSONResponse(build_predict_response(model.sha256, rows))


def _add_model_routes(
    app: FastAPI, service: Service, access: AccessControl, control: ServiceControl
) -> None:
    @app.get(
        "/v1/model",
        response_model=ModelDescription,
        responses=AUTH_ERRORS,
        summary="Describe the model",
    )
    async def model(request: Request, secret: Secret) -> Response:
        access.authorize(secret, "predict", request)
        return JSONResponse(service.describe_model())

    @app.post(
        "/v1/model/reload",
        status_code=202,
        response_model=ReloadResponse,
        responses=_COORDINATOR_ERRORS,
        summary="Reload the bundle from its configured location",
    )
    async def reload(request: Request, secret: Secret) -> Response:
        access.authorize(secret, "admin", request)
        return JSONResponse({"reload": await control.request_reload()}, 202)

    @app.get(
        "/metrics",
        responses=_COORDINATOR_ERRORS,
        response_class=PlainTextResponse,
        summary="Prometheus metrics of all replicas",
    )
    async def metrics(request: Request, secret: Secret) -> Response:
        access.authorize(secret, "admin", request)
        text = await control.render_metrics()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_public_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that need no API key: health checks and the page."""

    @app.get("/healthz", response_class=PlainTextResponse, summary="Liveness check")
    async def healthz() -> str:
        return "ok"

    @app.get(
        "/readyz",
        response_class=PlainTextResponse,
        responses=describe_problems({503: "The service is about to shut down."}),
        summary="Readiness check",
    )
    async def readyz() -> str:
        if service.is_draining:
            raise Problem(503, "draining", "the service is about to shut down", retry_after=5)
        return "ok"

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return page.DEMO_PAGE.build_response()


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def handle_problem(request: Request, problem: Problem) -> Response:
        return problem.build_response()

    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> Response:
        response = build_status_problem(error.status_code).build_response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)  # re-raised to AppMiddleware, which logs it
    async def handle_unexpected(request: Request, error: Exception) -> Response:
        return build_internal_error().build_response()

    @app.exception_handler(RequestValidationError)
    async def handle_validation(request: Request, error: RequestValidationError) -> Response:
        detail = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'][1:])}: {item['msg']}"
            for item in error.errors()
        )
        return Problem(400, "invalid_parameter", detail[:500]).build_response()
