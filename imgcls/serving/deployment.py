"""Ray Serve deployment: the replicas and their settings.

The settings of a replica are its user config, so running replicas apply a changed bundle or limit
without a restart, and requests are served throughout.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from imgcls import config as configuration
from imgcls.cluster import autoscaler, session
from imgcls.cluster.session import DeviceType
from imgcls.data.storage import filesystem, storage_settings
from imgcls.errors import ImgclsError, RequestError
from imgcls.models.bundle import is_registry_uri, load_bundle, read_description
from imgcls.models.device_support import check_device
from imgcls.models.openvino_package import check_engine
from imgcls.serving import api_keys
from imgcls.serving.api import build_app
from imgcls.serving.api_keys import ApiKey, Keyring
from imgcls.serving.auth import AccessControl
from imgcls.serving.config import LabelingConfig, ServeConfig
from imgcls.serving.coordinator import Coordinator, CoordinatorClient, ReplicaReport
from imgcls.serving.labeling.labeling import Labeling, UnavailableLabeling, open_in_replica
from imgcls.serving.metrics import ReplicaMetrics
from imgcls.serving.problems import Problem
from imgcls.serving.rate_limit import LocalAllowance
from imgcls.serving.routing import ROUTER_CLASS
from imgcls.serving.scaling import ReplicaPlan, plan_replicas
from imgcls.serving.service import ServedModel, Service

APPLICATION = "imgcls"
ENDPOINT = "endpoint"
REPORT_INTERVAL_S = 1.0
LABELING_RETRY_S = 30.0
"""Interval between two attempts of a replica to open labeling, in seconds."""
MAX_ONGOING_REQUESTS = 1024
"""Concurrent requests per replica: slow uploads wait in the replica and not in the HTTP proxy."""
MAX_QUEUED_REQUESTS = 256
"""Requests queued in each HTTP proxy while all replicas are at their maximum."""

logger = logging.getLogger("ray.serve")


@serve.deployment(name=ENDPOINT)
@serve.ingress()
class Endpoint:
    """One replica.

    Ray Serve calls `reconfigure` with the settings before the first request and after each change.
    """

    def __init__(
        self, coordinator: DeploymentHandle[Any], threads: int, device: DeviceType
    ) -> None:
        self._coordinator = CoordinatorClient(coordinator)
        self._threads = threads
        self._device = device
        self._metrics = ReplicaMetrics()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._reload_count = 0
        self._reload_requested = asyncio.Event()
        self._settings_id = ""
        self._reload_error: str | None = None
        self._service: Service | None = None
        self._labeling: Labeling | UnavailableLabeling | None = None
        self._app_lock = asyncio.Lock()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def app(scope: ASGIScope, receive: Receive, send: Send) -> None:
            if scope["type"] != "lifespan":
                await self._app(scope, receive, send)
                return
            for phase in ("startup", "shutdown"):  # starts before the settings arrive
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})

        return app

    async def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """Apply settings; a changed bundle is loaded before the old one is dropped."""
        config = ServeConfig.model_validate(settings["config"])
        fixed_keys = [ApiKey.model_validate(key) for key in settings["keys"]]
        storage_settings.set_process_settings(config.storage)
        self._config = config
        if self._service is None:
            # read the count before the bundle, so that a reload requested meanwhile is not missed;
            # a coordinator that does not run yet has no requests
            with contextlib.suppress(Problem):
                self._reload_count = (await self._coordinator.get_commands()).reload_count
            self._start_service(await asyncio.to_thread(self._load_model, config), config)
            self._settings_id = settings["settings_id"]
        else:
            await self._update_model(config, settings["settings_id"])
        assert self._service is not None
        keyring = Keyring(config.keys.file, fixed_keys) if config.keys.is_configured() else None
        allowance = LocalAllowance(self._coordinator.take_tokens)
        self._access = AccessControl(keyring, allowance, config.http.cors_origins)
        await self._build_app()

    async def _build_app(self) -> None:
        """Build the application; an error of labeling leaves the predictions running."""
        assert self._service is not None
        async with self._app_lock:
            config, spec = self._config, self._service.model.classifier.bundle.spec
            self._labeling = await asyncio.to_thread(
                open_in_replica, config.labeling, several=spec.task == "multilabel"
            )
            self._app = build_app(
                self._service, self._access, self._coordinator, config, self._labeling
            )

    def _load_model(self, config: ServeConfig) -> ServedModel:
        import torch

        torch.set_num_threads(self._threads)
        return ServedModel.load(config, self._device)

    def _start_service(self, model: ServedModel, config: ServeConfig) -> None:
        self._service = Service(
            config, model, self._metrics, decoders=self._threads, device=self._device
        )
        self._tasks = [
            asyncio.create_task(loop())
            for loop in (
                self._report_periodically,
                self._reload_on_request,
                self._refresh_keys_periodically,
                self._reopen_labeling_periodically,
            )
        ]

    async def _update_model(self, config: ServeConfig, settings_id: str) -> None:
        """Replace the model in use; one that cannot be loaded leaves the old one in use."""
        assert self._service is not None
        error: str | None = None
        try:
            await self._service.update(config)
        except ImgclsError as problem:
            error = str(problem)
            logger.error("reload failed, the previous model stays in use: %s", error)
        except Exception as problem:  # e.g. not enough memory for two models
            error = f"{type(problem).__name__}: {problem}"
            logger.exception("reload failed, the previous model stays in use")
        self._settings_id, self._reload_error = settings_id, error

    async def _report_periodically(self) -> None:
        """Report to the coordinator and apply its commands; no error ends the loop."""
        while True:
            try:
                await self._send_report()
            except Problem as problem:  # the coordinator is restarting
                logger.info("no report to the coordinator: %s", problem)
            except Exception:  # a replica without reports counts as ended and sees no reload
                logger.exception("a report to the coordinator failed")
            await asyncio.sleep(REPORT_INTERVAL_S)

    async def _send_report(self) -> None:
        assert self._service is not None
        self._metrics.waiting_images.set(self._service.num_waiting)
        self._metrics.set_model(self._service.model.sha256)
        commands = await self._coordinator.report(
            ReplicaReport(
                self._replica_id,
                self._metrics.collect_samples(),
                self._service.model.sha256,
                self._settings_id,
                self._reload_error,
            )
        )
        self._service.is_draining = commands.is_draining
        # a restarted coordinator counts from 0 again
        previous = self._reload_count if commands.reload_count >= self._reload_count else 0
        if commands.reload_count > previous:
            self._reload_requested.set()
        self._reload_count = commands.reload_count

    async def _reload_on_request(self) -> None:
        """Reload the bundle on request, apart from the reports, which must not pause meanwhile."""
        while True:
            await self._reload_requested.wait()
            self._reload_requested.clear()
            await self._update_model(self._config, self._settings_id)

    async def _reopen_labeling_periodically(self) -> None:
        """Open labeling again after an error that may pass, such as one of the storage."""
        while True:
            await asyncio.sleep(LABELING_RETRY_S)
            if not isinstance(self._labeling, UnavailableLabeling):
                continue
            try:
                await self._build_app()
            except Exception:  # predictions go on with the application in use
                logger.exception("cannot open labeling again")

    async def _refresh_keys_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._config.keys.refresh_interval_s)
            if self._access.keys is None:
                continue
            try:
                await asyncio.to_thread(self._access.keys.refresh)
            except ImgclsError as error:
                logger.error("cannot read the key file, the previous keys stay valid: %s", error)
            except Exception:  # the loop must go on, so that a leaked key can be revoked
                logger.exception("cannot read the key file, the previous keys stay valid")


def build_application(
    config: ServeConfig, fixed_keys: list[ApiKey], replicas: ReplicaPlan, settings_id: str
) -> serve.Application:
    """Build the Ray Serve application.

    settings_id: running replicas load the bundle again when this ID changes
    Raises RequestError for a precision or an engine that the replicas' device cannot run.
    """
    check_device(config.precision, config.engine, replicas.device)
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
            "keys": [key.model_dump(mode="json") for key in fixed_keys],
            "settings_id": settings_id,
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
    coordinator = Coordinator.bind()  # type: ignore[attr-defined]
    bound: serve.Application = endpoint.bind(coordinator, replicas.threads, replicas.device)
    return bound


def build_from_args(args: dict[str, Any]) -> serve.Application:
    """Application builder of a Serve config file.

    Used as `import_path: imgcls.serving.deployment:build_from_args`.

    args: `args` of that file, the settings of `imgcls serve`
    Raises ConfigError, BundleError or ResourcesError before anything is changed, and RequestError
    for relative paths in `labeling`, which would start in the working directory of each node.
    """
    config = configuration.build(ServeConfig, args)
    _check_labeling_paths(config.labeling)
    storage_settings.set_process_settings(config.storage)
    config = locate_model(config)
    fixed_keys = run_preflight_checks(config)
    replicas = plan_replicas(
        session.list_nodes(), config.replicas, max_nodes=autoscaler.find_max_nodes()
    )
    return build_application(config, fixed_keys, replicas, read_description(config.model).sha256)


def _check_labeling_paths(labeling: LabelingConfig) -> None:
    if labeling.manifest is None:
        return
    for key, value in (
        ("labeling.manifest.path", labeling.manifest.path),
        ("labeling.manifest.root", labeling.manifest.root),
        ("labeling.output", labeling.output),
    ):
        if value is not None and _is_relative(value, is_manifest=key.endswith(".path")):
            raise RequestError(
                f"{key} {value}: is relative to the working directory of each replica. Set an "
                "absolute path on a disk that all replicas share, or a URL"
            )


def _is_relative(place: str, *, is_manifest: bool) -> bool:
    if is_manifest and place.startswith("iceberg:"):
        return False
    path = place.removeprefix("delta:") if is_manifest else place
    return not (filesystem.is_url(path) or os.path.isabs(path))


def locate_model(config: ServeConfig) -> ServeConfig:
    """The settings with the folder of a bundle of the MLflow model registry, for all replicas.

    Raises BundleError, or StorageUnavailable if the registry does not answer.
    """
    if not is_registry_uri(config.model):
        return config
    bundle = read_description(config.model)
    assert bundle.registered is not None
    bundle.registered.log_version()
    return config.model_copy(update={"model": bundle.url})


def run_preflight_checks(config: ServeConfig) -> list[ApiKey]:
    """Check the API keys, the bundle, the engine and the labeling queue before anything starts.

    Returns the keys that are not in `keys.file`. Raises RequestError or one of its subclasses.
    """
    env = config.keys.env
    fixed_keys = api_keys.load_keys_from_env(env) if env is not None else []
    if config.keys.is_configured() and Keyring(config.keys.file, fixed_keys).is_empty():
        raise RequestError(
            f"keys.file {config.keys.file}: contains no key. Run `imgcls key new --file "
            f"{config.keys.file} --name NAME` to create one"
        )
    bundle = load_bundle(config.model)
    check_engine(config.engine)
    Labeling.open(config.labeling, several=bundle.spec.task == "multilabel")
    return fixed_keys
