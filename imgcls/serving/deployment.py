"""Ray Serve's side: replicas that answer, and how many of them there are.

A replica's settings come as its user config, so that a changed bundle or limit is taken up by the
replicas that are there, without a moment in which nobody answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from imgcls import config as configuration
from imgcls.cluster import autoscaler, session
from imgcls.data import object_store
from imgcls.errors import ImgclsError, RequestError
from imgcls.models.bundle import load_bundle, read_description
from imgcls.serving import api_keys
from imgcls.serving.api import build_app
from imgcls.serving.api_keys import Key, Keyring
from imgcls.serving.auth import Door
from imgcls.serving.config import ServeConfig
from imgcls.serving.coordinator import Hub, Line, Report
from imgcls.serving.metrics import Telemetry
from imgcls.serving.problems import Problem
from imgcls.serving.rate_limit import Pocket
from imgcls.serving.routing import ROUTER
from imgcls.serving.scaling import Replicas, plan_replicas
from imgcls.serving.service import Model, Service

APPLICATION = "imgcls"
ENDPOINT = "endpoint"
BEAT_SECONDS = 1.0
ONGOING = 1024
"""Requests under way per replica: slow uploads are many, and wait here and not at the door."""
QUEUED = 256
"""Requests that wait at each door for a replica that takes one more."""

logger = logging.getLogger("ray.serve")


@serve.deployment(name=ENDPOINT)
@serve.ingress()
class Endpoint:
    """One replica. `reconfigure` gives it its settings: before the first request, and whenever
    they change."""

    def __init__(self, hub: DeploymentHandle, threads: int) -> None:
        self._hub = Line(hub)
        self._threads = threads
        self._telemetry = Telemetry()
        self._name = serve.get_replica_context().replica_id.unique_id
        self._reloads = 0
        self._reload = asyncio.Event()
        self._asked = ""
        self._error: str | None = None
        self._service: Service | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def app(scope: ASGIScope, receive: Receive, send: Send) -> None:
            if scope["type"] != "lifespan":
                await self._app(scope, receive, send)
                return
            for moment in ("startup", "shutdown"):  # it begins before there are settings
                await receive()
                await send({"type": f"lifespan.{moment}.complete"})

        return app

    async def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """Take up settings; the bundle is loaded before the old one is let go."""
        config = ServeConfig.model_validate(settings["config"])
        fixed = [Key.model_validate(key) for key in settings["keys"]]
        object_store.use(config.storage)
        self._config = config
        if self._service is None:
            with contextlib.suppress(Problem):  # no hub yet, so nobody has asked for anything
                self._reloads = (await self._hub.orders()).reload  # before there is what may be old
            self._begin(await asyncio.to_thread(self._load, config), config)
            self._asked = settings["asked"]
        else:
            await self._take_up(config, settings["asked"])
        assert self._service is not None
        ring = Keyring(config.keys.file, fixed) if config.keys.are_given() else None
        origins = config.http.cors_origins
        self._door = Door(ring, Pocket(self._hub.take), self._hub, origins)
        self._app = build_app(self._service, self._door, config)

    def _load(self, config: ServeConfig) -> Model:
        import torch

        torch.set_num_threads(self._threads)
        return Model.load(config)

    def _begin(self, model: Model, config: ServeConfig) -> None:
        self._service = Service(config, model, self._telemetry, decoders=self._threads)
        self._tasks = [
            asyncio.create_task(work())
            for work in (self._beat, self._load_again, self._look_at_keys)
        ]

    async def _take_up(self, config: ServeConfig, asked: str) -> None:
        """Change the model in use; one that cannot be loaded leaves the old one in place."""
        assert self._service is not None
        error: str | None = None
        try:
            await self._service.swap(config)
        except ImgclsError as problem:
            error = str(problem)
            logger.error("the model stays as it was: %s", error)
        except Exception as problem:  # no memory for two of them, say: one goes on
            error = f"{type(problem).__name__}: {problem}"
            logger.exception("the model stays as it was")
        self._asked, self._error = asked, error

    async def _beat(self) -> None:
        """Tell the hub how it goes, and hear what it says; nothing that goes wrong ends that."""
        while True:
            try:
                await self._report()
            except Problem as problem:  # a hub that is started anew
                logger.info("no report: %s", problem)
            except Exception:  # without reports a replica counts as gone, and hears of no reload
                logger.exception("a report to the hub failed")
            await asyncio.sleep(BEAT_SECONDS)

    async def _report(self) -> None:
        assert self._service is not None
        self._telemetry.waiting.set(self._service.waiting)
        self._telemetry.answers_with(self._service.model.sha256)
        orders = await self._hub.report(
            Report(
                self._name,
                self._telemetry.samples(),
                self._service.model.sha256,
                self._asked,
                self._error,
            )
        )
        self._door.draining = orders.draining
        before = self._reloads if orders.reload >= self._reloads else 0  # a new hub counts anew
        if orders.reload > before:
            self._reload.set()
        self._reloads = orders.reload

    async def _load_again(self) -> None:
        """Whenever that was asked for; beside `_beat`, which must not be silent for so long."""
        while True:
            await self._reload.wait()
            self._reload.clear()
            await self._take_up(self._config, self._asked)

    async def _look_at_keys(self) -> None:
        while True:
            await asyncio.sleep(self._config.keys.refresh_seconds)
            if self._door.keys is None:
                continue
            try:
                await asyncio.to_thread(self._door.keys.refresh)
            except ImgclsError as error:
                logger.error("the API keys stay as they were: %s", error)
            except Exception:  # a key that leaked must be gone whatever went wrong the last time
                logger.exception("the API keys stay as they were; they are looked at again")


def application(
    config: ServeConfig, fixed: list[Key], replicas: Replicas, asked: str
) -> serve.Application:
    """The application for Ray Serve.

    fixed: keys beside those of `config.keys.file`
    asked: replicas that are there load the bundle again when it is another than before
    """
    options: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.least,
                max_replicas=replicas.most,
                target_ongoing_requests=config.replicas.target_requests,
            )
        }
    endpoint = Endpoint.options(  # type: ignore[attr-defined]
        **options,
        user_config={
            "config": config.for_replicas(),
            "keys": [key.model_dump(mode="json") for key in fixed],
            "asked": asked,
        },
        ray_actor_options={
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            "runtime_env": session.keep_memory(),
        },
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # type: ignore[arg-type]
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.http.request_seconds,
    )
    bound: serve.Application = endpoint.bind(Hub.bind(), replicas.threads)  # type: ignore[attr-defined]
    return bound


def build(settings: dict[str, Any]) -> serve.Application:
    """The application of a Serve config file: `import_path: imgcls.serving.deployment:build`.

    settings: `args` in that file, in the form of `imgcls serve --config`
    Raises ConfigError, BundleError or ResourcesError before anything is changed.
    """
    config = configuration.build(ServeConfig, settings)
    object_store.use(config.storage)
    fixed = checked(config)
    replicas = plan_replicas(
        session.nodes(), config.replicas, may_grow=autoscaler.most_nodes() is not None
    )
    return application(config, fixed, replicas, read_description(config.model).sha256)


def checked(config: ServeConfig) -> list[Key]:
    """What can be found wrong before anything starts; returns the keys that stand in no file.

    Raises RequestError or BundleError.
    """
    fixed = api_keys.from_environment(config.keys.env) if config.keys.env is not None else []
    if config.keys.are_given() and Keyring(config.keys.file, fixed).is_empty():
        raise RequestError(
            f"keys.file {config.keys.file}: holds no key; `imgcls key new --file "
            f"{config.keys.file} --name NAME` makes one"
        )
    load_bundle(config.model)
    return fixed
