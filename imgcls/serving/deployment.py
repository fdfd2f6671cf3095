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
from imgcls.data import storage_settings
from imgcls.errors import ImgclsError, RequestError
from imgcls.models.bundle import load_bundle, read_description
from imgcls.serving import api_keys
from imgcls.serving.api import build_app
from imgcls.serving.api_keys import ApiKey, Keyring
from imgcls.serving.auth import AccessControl
from imgcls.serving.config import ServeConfig
from imgcls.serving.coordinator import Coordinator, CoordinatorClient, ReplicaReport
from imgcls.serving.metrics import ReplicaMetrics
from imgcls.serving.problems import Problem
from imgcls.serving.rate_limit import LocalAllowance
from imgcls.serving.routing import ROUTER_CLASS
from imgcls.serving.scaling import ReplicaPlan, plan_replicas
from imgcls.serving.service import ServedModel, Service

APPLICATION = "imgcls"
ENDPOINT = "endpoint"
REPORT_INTERVAL_S = 1.0
MAX_ONGOING_REQUESTS = 1024
"""Requests under way per replica: slow uploads are many, and wait here and not at the door."""
MAX_QUEUED_REQUESTS = 256
"""Requests that wait at each door for a replica that takes one more."""

logger = logging.getLogger("ray.serve")


@serve.deployment(name=ENDPOINT)
@serve.ingress()
class Endpoint:
    """One replica. `reconfigure` gives it its settings: before the first request, and whenever
    they change."""

    def __init__(self, hub: DeploymentHandle, threads: int) -> None:
        self._coordinator = CoordinatorClient(hub)
        self._threads = threads
        self._metrics = ReplicaMetrics()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._reload_count = 0
        self._reload_requested = asyncio.Event()
        self._settings_id = ""
        self._reload_error: str | None = None
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
        fixed = [ApiKey.model_validate(key) for key in settings["keys"]]
        storage_settings.set_process_settings(config.storage)
        self._config = config
        if self._service is None:
            with contextlib.suppress(Problem):  # no hub yet, so nobody has asked for anything
                self._reload_count = (
                    await self._coordinator.get_commands()
                ).reload_count  # before there is what may be old
            self._start_service(await asyncio.to_thread(self._load_model, config), config)
            self._settings_id = settings["asked"]
        else:
            await self._update_model(config, settings["asked"])
        assert self._service is not None
        ring = Keyring(config.keys.file, fixed) if config.keys.is_configured() else None
        origins = config.http.cors_origins
        self._access = AccessControl(
            ring, LocalAllowance(self._coordinator.take_tokens), self._coordinator, origins
        )
        self._app = build_app(self._service, self._access, config)

    def _load_model(self, config: ServeConfig) -> ServedModel:
        import torch

        torch.set_num_threads(self._threads)
        return ServedModel.load(config)

    def _start_service(self, model: ServedModel, config: ServeConfig) -> None:
        self._service = Service(config, model, self._metrics, decoders=self._threads)
        self._tasks = [
            asyncio.create_task(work())
            for work in (
                self._report_periodically,
                self._reload_on_request,
                self._refresh_keys_periodically,
            )
        ]

    async def _update_model(self, config: ServeConfig, asked: str) -> None:
        """Change the model in use; one that cannot be loaded leaves the old one in place."""
        assert self._service is not None
        error: str | None = None
        try:
            await self._service.update(config)
        except ImgclsError as problem:
            error = str(problem)
            logger.error("the model stays as it was: %s", error)
        except Exception as problem:  # no memory for two of them, say: one goes on
            error = f"{type(problem).__name__}: {problem}"
            logger.exception("the model stays as it was")
        self._settings_id, self._reload_error = asked, error

    async def _report_periodically(self) -> None:
        """Tell the hub how it goes, and hear what it says; nothing that goes wrong ends that."""
        while True:
            try:
                await self._send_report()
            except Problem as problem:  # a hub that is started anew
                logger.info("no report: %s", problem)
            except Exception:  # without reports a replica counts as gone, and hears of no reload
                logger.exception("a report to the hub failed")
            await asyncio.sleep(REPORT_INTERVAL_S)

    async def _send_report(self) -> None:
        assert self._service is not None
        self._metrics.waiting_images.set(self._service.num_waiting)
        self._metrics.set_model(self._service.model.sha256)
        orders = await self._coordinator.report(
            ReplicaReport(
                self._replica_id,
                self._metrics.collect_samples(),
                self._service.model.sha256,
                self._settings_id,
                self._reload_error,
            )
        )
        self._access.is_draining = orders.is_draining
        before = (
            self._reload_count if orders.reload_count >= self._reload_count else 0
        )  # a new hub counts anew
        if orders.reload_count > before:
            self._reload_requested.set()
        self._reload_count = orders.reload_count

    async def _reload_on_request(self) -> None:
        """Whenever that was asked for; beside `_beat`, which must not be silent for so long."""
        while True:
            await self._reload_requested.wait()
            self._reload_requested.clear()
            await self._update_model(self._config, self._settings_id)

    async def _refresh_keys_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._config.keys.refresh_interval_s)
            if self._access.keys is None:
                continue
            try:
                await asyncio.to_thread(self._access.keys.refresh)
            except ImgclsError as error:
                logger.error("the API keys stay as they were: %s", error)
            except Exception:  # a key that leaked must be gone whatever went wrong the last time
                logger.exception("the API keys stay as they were; they are looked at again")


def build_application(
    config: ServeConfig, fixed: list[ApiKey], replicas: ReplicaPlan, asked: str
) -> serve.Application:
    """The application for Ray Serve.

    fixed: keys beside those of `config.keys.file`
    asked: replicas that are there load the bundle again when it is another than before
    """
    options: dict[str, Any] = {"num_replicas": replicas.min_replicas}
    if replicas.max_replicas > replicas.min_replicas:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.min_replicas,
                max_replicas=replicas.max_replicas,
                target_ongoing_requests=config.replicas.target_ongoing_requests,
            )
        }
    endpoint = Endpoint.options(  # type: ignore[attr-defined]
        **options,
        user_config={
            "config": config.dump_for_replicas(),
            "keys": [key.model_dump(mode="json") for key in fixed],
            "asked": asked,
        },
        ray_actor_options={
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            "runtime_env": session.build_malloc_env(),
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER_CLASS),  # type: ignore[arg-type]
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.http.request_timeout_s,
    )
    bound: serve.Application = endpoint.bind(Coordinator.bind(), replicas.threads)  # type: ignore[attr-defined]
    return bound


def build_from_args(settings: dict[str, Any]) -> serve.Application:
    """The application of a Serve config file: `import_path: imgcls.serving.deployment:build`.

    settings: `args` in that file, in the form of `imgcls serve --config`
    Raises ConfigError, BundleError or ResourcesError before anything is changed.
    """
    config = configuration.build(ServeConfig, settings)
    storage_settings.set_process_settings(config.storage)
    fixed = run_preflight_checks(config)
    replicas = plan_replicas(
        session.list_nodes(), config.replicas, may_grow=autoscaler.find_max_nodes() is not None
    )
    return build_application(config, fixed, replicas, read_description(config.model).sha256)


def run_preflight_checks(config: ServeConfig) -> list[ApiKey]:
    """What can be found wrong before anything starts; returns the keys that stand in no file.

    Raises RequestError or BundleError.
    """
    fixed = api_keys.load_keys_from_env(config.keys.env) if config.keys.env is not None else []
    if config.keys.is_configured() and Keyring(config.keys.file, fixed).is_empty():
        raise RequestError(
            f"keys.file {config.keys.file}: holds no key; `imgcls key new --file "
            f"{config.keys.file} --name NAME` makes one"
        )
    load_bundle(config.model)
    return fixed
