"""`serve`: the endpoint on this machine or on a cluster, until it is told to stop.

On a cluster with `--detach` it is left serving, and the same command changes what is serving.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable

from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation

from imgcls import log
from imgcls.cluster import autoscaler, ray_internals, session
from imgcls.cluster.interrupts import Interruption
from imgcls.config import Section
from imgcls.data import filesystem
from imgcls.data.storage_settings import with_config_storage
from imgcls.errors import (
    ImgclsError,
    Interrupted,
    RequestError,
    ResourcesError,
    RunFailed,
    one_line,
)
from imgcls.log import tell
from imgcls.models.bundle import load_bundle
from imgcls.serving import proxy_middleware
from imgcls.serving.config import HttpConfig, ServeConfig
from imgcls.serving.coordinator import COORDINATOR
from imgcls.serving.deployment import APPLICATION, build_application, run_preflight_checks
from imgcls.serving.scaling import plan_replicas

UPDATE_TIMEOUT_S = 300.0
"""For replicas that are there to load another bundle."""
STATUS_INTERVAL_S = 1.0
"""Between two looks at whether replicas are missing."""

logger = logging.getLogger(__name__)


@with_config_storage
def serve(config: ServeConfig) -> None:
    """Label images over HTTP, with a page to try it on, until SIGTERM or Ctrl-C.

    Raises a RequestError before anything starts, RunFailed when replicas do not start.
    """
    log.use(config.log)
    config = _resolve_paths(config)
    _check_http(config)
    fixed = run_preflight_checks(config)
    with Interruption().handle_signals() as interruption:
        _set_environment(config)
        session.connect()
        if config.detach and session.is_private_session():
            raise RequestError(
                "detach: there is no cluster to leave it on; `ray start --head` first, or set "
                "RAY_ADDRESS"
            )
        replicas = plan_replicas(
            session.list_nodes(), config.replicas, may_grow=autoscaler.find_max_nodes() is not None
        )
        tell("layout", replicas.reason)
        _start_proxies(config)
        found = APPLICATION in ray_serve.status().applications
        asked = uuid.uuid4().hex
        try:
            ray_serve.run(
                build_application(config, fixed, replicas, asked),
                name=APPLICATION,
                route_prefix="/",
            )
            interruption.check()
            _wait_for_replicas(asked, interruption)
        except (Interrupted, RuntimeError) as error:
            _handle_failed_start(error, config, found)
            return
        _run_until_stopped(config, found, interruption)


def _handle_failed_start(
    error: Interrupted | RuntimeError, config: ServeConfig, found: bool
) -> None:
    """Undo a start that came to nothing; a service that was there before is not ours to end."""
    if isinstance(error, Interrupted):
        if found:
            raise Interrupted(
                f"{error}, before every replica had taken it up; the service goes on, and the same "
                "command goes on with the change"
            ) from error
        _delete_application()
        if config.detach:
            raise error
        return
    why = _find_start_error() or one_line(
        error, 500
    )  # what Ray Serve raises of replicas that do not start
    if found:
        raise RunFailed(
            f"the change did not come into force, and the service that was there was left: {why}; "
            "the command that started it undoes the change"
        ) from error
    _delete_application()
    raise RunFailed(f"the service did not start: {why}") from error


def _run_until_stopped(config: ServeConfig, found: bool, interruption: Interruption) -> None:
    """Say that it is ready; if not detached, wait to be told to stop, and end what was started."""
    scheme = "https" if config.http.certificate else "http"
    url = f"{scheme}://{config.http.host}:{config.http.port}/"
    try:
        tell("ready", f"{url} serves {config.model}", url=url)
        troubles = _ReplicaMonitor(config.model)
        while not config.detach:
            interruption.check()
            time.sleep(0.2)
            troubles.poll()
        return
    except Interrupted:
        if found:
            tell("stop", "the service goes on, as it did before; `serve shutdown` ends it")
            return
    _drain(config)
    _delete_application()
    tell("stop", "every request was answered")


class _ReplicaMonitor:
    """Logs why replicas are missing: Ray Serve tries to start them again and again, in silence."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._last_poll = time.monotonic()
        self._last_reason: str | None = None

    def poll(self) -> None:
        """Log a reason that is new, and the end of the trouble; asks Ray every second."""
        if time.monotonic() - self._last_poll < STATUS_INTERVAL_S:
            return
        self._last_poll = time.monotonic()
        try:
            why = self._find_reason()
        except RayError as error:  # the controller is being started again
            logger.info("no status of the service: %s", type(error).__name__)
            return
        if why is not None and why != self._last_reason:
            tell("unhealthy", f"a replica is missing, and Ray Serve keeps starting it: {why}")
        elif why is None and self._last_reason is not None:
            tell("healthy", "all replicas run again")
        self._last_reason = why

    def _find_reason(self) -> str | None:
        """Why a replica is missing; None while none is."""
        application_ = ray_serve.status().applications.get(APPLICATION)
        if application_ is None:
            return None
        missing = has_missing_replicas(each.status for each in application_.deployments.values())
        if not missing:
            return self._last_reason if missing is None else None
        if self._last_reason is None:
            try:
                load_bundle(self._model)  # the likeliest reason, known before a replica has tried
            except ImgclsError as error:
                return str(error)
        return _find_start_error() or self._last_reason or "it has died"


def has_missing_replicas(statuses: Iterable[str]) -> bool | None:
    """Whether replicas have died or do not start; None while their number or version changes.

    statuses: of the deployments, as Ray Serve has them
    """
    found = set(statuses)
    if found & {"UNHEALTHY", "DEPLOY_FAILED"}:
        return True
    return False if found <= {"HEALTHY"} else None


def _resolve_paths(config: ServeConfig) -> ServeConfig:
    """Settings that name the same files in processes with another working directory."""

    def whole(section: Section, *names: str) -> dict[str, str]:
        values = ((name, getattr(section, name)) for name in names)
        return {name: filesystem.absolute(value) for name, value in values if value is not None}

    files = {
        "keys": config.keys.model_copy(update=whole(config.keys, "file")),
        "http": config.http.model_copy(update=whole(config.http, "certificate", "private_key")),
    }
    return config.model_copy(update={**whole(config, "model"), **files})


def _check_http(config: ServeConfig) -> None:
    if not config.http.is_loopback() and not config.keys.is_configured():
        raise RequestError(
            f"http.host {config.http.host}: anyone who reaches it could use it; give --keys FILE "
            "(`imgcls key new --file FILE --name NAME` makes one), or listen on 127.0.0.1"
        )
    for name in ("certificate", "private_key"):
        file = getattr(config.http, name)
        if file is not None and not os.path.isfile(file):
            raise RequestError(f"http.{name} {file}: no such file; give a PEM file")


def _set_environment(config: ServeConfig) -> None:
    """What processes of Ray Serve find in their environment, where this one starts them.

    Its replicas do nothing on their event loop that would keep it busy, so they need no other one.
    """
    limits = config.limits
    wanted = {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": proxy_middleware.CALLBACK_PATH,
    }
    if config.http.proxy == "haproxy":
        wanted |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(_find_free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(_find_free_port()),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_find_free_port()),
        }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    largest = max(limits.body_bytes, limits.image_bytes)
    os.environ.update(proxy_middleware.build_environment(largest, limits.proxy_bytes))


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_proxies(config: ServeConfig) -> None:
    """Start Ray Serve's doors, or find those that are there to be the same."""

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    there = ray_internals.find_serve_address()
    wanted = (config.http.host, config.http.port)
    if there is not None and there != wanted:
        raise RequestError(
            f"http: Ray Serve on this cluster listens on {there[0]}:{there[1]} already; say "
            f"--http.host {there[0]} --http.port {there[1]}, or stop it with `serve shutdown`"
        )
    if there is None and session.is_private_session():
        _check_port_free(config.http)
    ray_serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options=HTTPOptions(
            host=config.http.host,
            port=config.http.port,
            request_timeout_s=config.http.request_timeout_s,
            ssl_certfile=config.http.certificate,
            ssl_keyfile=config.http.private_key,
        ),
    )


def _check_port_free(http: HttpConfig) -> None:
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise RequestError(
                f"http.port {http.port}: {error.strerror or error}; give another --http.port, or "
                "another --http.host"
            ) from error


def _wait_for_replicas(asked: str, interruption: Interruption) -> None:
    """Wait until all replicas have taken up what was asked for, under that name."""

    hub = ray_serve.get_deployment_handle(COORDINATOR, APPLICATION)
    deadline = time.monotonic() + UPDATE_TIMEOUT_S
    while True:
        interruption.check()
        reports = hub.reports.remote().result(timeout_s=60)
        errors = [said.error for said in reports if said.asked == asked and said.error is not None]
        if errors:
            raise RunFailed(f"the service goes on with the model that it had: {errors[0]}")
        if reports and all(said.asked == asked for said in reports):
            return
        if time.monotonic() > deadline:
            raise ResourcesError("replicas have not taken up the model")
        time.sleep(0.2)


def _drain(config: ServeConfig) -> None:
    """Say at /readyz that the end is near, while requests still come in."""

    if config.replicas.drain_period_s:
        tell("stop", f"draining for {config.replicas.drain_period_s:g} s")
        hub = ray_serve.get_deployment_handle(COORDINATOR, APPLICATION)
        hub.drain.remote().result(timeout_s=30)
        time.sleep(config.replicas.drain_period_s)


def _delete_application() -> None:
    """End the replicas when they have answered what is under way."""

    ray_serve.delete(APPLICATION)
    if session.is_private_session():
        ray_serve.shutdown()


def _find_start_error() -> str | None:
    """The last line of what a replica that did not start had to say."""

    application_ = ray_serve.status().applications.get(APPLICATION)
    for deployment in application_.deployments.values() if application_ else ():
        lines = [line for line in deployment.message.splitlines() if re.match(r"\w[\w.]*: ", line)]
        if lines:
            return lines[-1]
    return None
