"""The `serve` job: runs the endpoint on this machine or on a cluster until it is stopped.

With `--detach` the service keeps running on the cluster, and the same command changes it.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import time
import uuid
from collections.abc import Iterable
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imgcls import log
from imgcls.cluster import autoscaler, ray_internals, session
from imgcls.cluster.interrupts import Interruption
from imgcls.config import Section, to_option
from imgcls.data.manifests.discovery import resolve_source
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import (
    ImgclsError,
    Interrupted,
    RequestError,
    ResourcesError,
    RunFailed,
    one_line,
)
from imgcls.models.bundle import load_bundle
from imgcls.serving import proxy_middleware
from imgcls.serving.config import HttpConfig, LabelingConfig, ServeConfig
from imgcls.serving.coordinator import COORDINATOR
from imgcls.serving.deployment import (
    APPLICATION,
    build_application,
    locate_model,
    run_preflight_checks,
)
from imgcls.serving.scaling import plan_replicas

UPDATE_TIMEOUT_S = 300.0
"""Maximum time for running replicas to load a changed bundle."""
STATUS_INTERVAL_S = 1.0
"""Interval between two checks for missing replicas."""

logger = logging.getLogger(__name__)


@with_config_storage
def serve(config: ServeConfig) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C; return once it runs with `detach`.

    Parameters
    ----------
    config : ServeConfig
        Model bundle, listening address, API keys, limits and replicas.

    Raises
    ------
    RequestError
        If a setting is wrong or the resources do not suffice; nothing was started.
    RunFailed
        If the replicas do not start, or running replicas cannot load a changed bundle.
    """
    config = _resolve_paths(locate_model(config))
    _check_http(config)
    fixed_keys = run_preflight_checks(config)
    with Interruption().handle_signals() as interruption:
        _set_environment(config)
        session.connect()
        if config.detach and session.is_private_session():
            raise RequestError(
                "detach: no Ray cluster is running. Start one with `ray start --head`, or set "
                "RAY_ADDRESS"
            )
        replicas = plan_replicas(
            session.list_nodes(), config.replicas, max_nodes=autoscaler.find_max_nodes()
        )
        log.emit("layout", replicas.reason)
        _start_proxies(config)
        was_running = APPLICATION in ray_serve.status().applications
        settings_id = uuid.uuid4().hex
        application = build_application(config, fixed_keys, replicas, settings_id)
        try:
            ray_serve.run(application, name=APPLICATION, route_prefix="/")
            interruption.check()
            _wait_for_replicas(settings_id, interruption)
        except (ImgclsError, RayError, RayServeException, RuntimeError, TimeoutError) as error:
            _handle_failed_start(error, config, was_running)
            return
        _run_until_stopped(config, was_running, interruption)


def _handle_failed_start(error: Exception, config: ServeConfig, was_running: bool) -> None:
    """Undo a failed start; a service that was running before is kept."""
    if isinstance(error, Interrupted):
        if was_running:
            raise Interrupted(
                f"{error} before every replica had applied the change. The service keeps running; "
                "rerun the same command to finish the change"
            ) from error
        _delete_application()
        if config.detach:
            raise error
        return
    if isinstance(error, ImgclsError):
        if not was_running:
            _delete_application()
        raise error
    # the RuntimeError of Ray Serve names no reason; the status of the application may
    reason = _find_start_error() or one_line(error, 500)
    if was_running:
        raise RunFailed(
            f"the change failed, and the running service was kept: {reason}. Rerun the command "
            "that started the service to undo the change"
        ) from error
    _delete_application()
    raise RunFailed(f"the service did not start: {reason}") from error


def _run_until_stopped(config: ServeConfig, was_running: bool, interruption: Interruption) -> None:
    """Wait for a signal, then shut down what was started; return at once with `detach`."""
    scheme = "https" if config.http.certificate else "http"
    url = f"{scheme}://{config.http.host}:{config.http.port}/"
    try:
        log.emit("ready", f"{url} serves {config.model}", url=url)
        if config.labeling.output is not None:
            log.emit("label", f"{url}label writes labels to {config.labeling.output}")
        monitor = _ReplicaMonitor(config.model)
        while not config.detach:
            interruption.check()
            time.sleep(0.2)
            monitor.poll()
        return
    except Interrupted:
        if was_running:
            log.emit(
                "stop",
                "the service was running before this command and keeps running. Run "
                "`serve shutdown` to stop it",
            )
            return
    _drain(config)
    _delete_application()
    log.emit("stop", "all requests were answered; stopped")


class _ReplicaMonitor:
    """Logs why replicas are missing; Ray Serve restarts them without a message."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._last_poll = time.monotonic()
        self._last_reason: str | None = None

    def poll(self) -> None:
        """Log a new reason, or that all replicas run again; checks at most once per second."""
        if time.monotonic() - self._last_poll < STATUS_INTERVAL_S:
            return
        self._last_poll = time.monotonic()
        try:
            reason = self._find_reason()
        except RayError as error:  # Ray Serve's controller is restarting
            logger.info("no status of the service: %s", type(error).__name__)
            return
        if reason is not None and reason != self._last_reason:
            log.emit("unhealthy", f"a replica is missing, Ray Serve keeps restarting it: {reason}")
        elif reason is None and self._last_reason is not None:
            log.emit("healthy", "all replicas are running again")
        self._last_reason = reason

    def _find_reason(self) -> str | None:
        """Why a replica is missing; None if none is."""
        application = ray_serve.status().applications.get(APPLICATION)
        if application is None:
            return None
        is_missing = has_missing_replicas(each.status for each in application.deployments.values())
        if not is_missing:
            return self._last_reason if is_missing is None else None
        if self._last_reason is None:
            try:
                load_bundle(self._model)  # the likeliest reason, known before a replica restarts
            except ImgclsError as error:
                return str(error)
        return _find_start_error() or self._last_reason or "it crashed"


def has_missing_replicas(statuses: Iterable[str]) -> bool | None:
    """Whether replicas have crashed or do not start; None during a change of number or version.

    statuses: Ray Serve's status of each deployment
    """
    found = set(statuses)
    if found & {"UNHEALTHY", "DEPLOY_FAILED"}:
        return True
    return False if found <= {"HEALTHY"} else None


def _resolve_paths(config: ServeConfig) -> ServeConfig:
    """Make local paths absolute: Ray's processes have another working directory."""

    def resolve(section: Section, *names: str) -> dict[str, str]:
        values = ((name, getattr(section, name)) for name in names)
        return {name: filesystem.absolute(value) for name, value in values if value is not None}

    files = {
        "keys": config.keys.model_copy(update=resolve(config.keys, "file")),
        "http": config.http.model_copy(update=resolve(config.http, "certificate", "private_key")),
        "labeling": _resolve_labeling(config.labeling),
    }
    return config.model_copy(update={**resolve(config, "model"), **files})


def _resolve_labeling(labeling: LabelingConfig) -> LabelingConfig:
    manifest, output = labeling.manifest, labeling.output
    if manifest is None or output is None:
        return labeling
    root = None if manifest.root is None else filesystem.absolute(manifest.root)
    changes = {"path": resolve_source(manifest.path), "root": root}
    return labeling.model_copy(
        update={
            "manifest": manifest.model_copy(update=changes),
            "output": filesystem.absolute(output),
        }
    )


def _check_http(config: ServeConfig) -> None:
    if not config.http.is_loopback() and not config.keys.is_configured():
        raise RequestError(
            f"http.host {config.http.host}: the service would accept requests from other machines "
            "without API keys. Create a key with `imgcls key new --file FILE --name NAME` and pass "
            "--keys FILE, or listen on 127.0.0.1"
        )
    for name in ("certificate", "private_key"):
        file = getattr(config.http, name)
        if file is not None and not os.path.isfile(file):
            raise RequestError(f"http.{name} {file}: no such file. Pass a PEM file")
    if config.http.certificate is not None:
        _check_certificate(config.http.certificate, config.http.private_key)


def _check_certificate(certificate: str, private_key: str | None) -> None:
    """Load the certificate and its key as the proxies do, which only log that they cannot."""

    def refuse_password() -> str:
        raise RequestError(
            f"http.private_key {private_key}: is encrypted with a password. Pass a key without one"
        )

    try:
        # without a callback, OpenSSL asks for the password on the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certificate, private_key, refuse_password
        )
    except ssl.SSLError as error:
        reason = (
            f"http.private_key {private_key} is the key of another certificate"
            if error.reason == "KEY_VALUES_MISMATCH"
            else f"it, or http.private_key {private_key}, is not a valid PEM file"
        )
        raise RequestError(
            f"http.certificate {certificate}: {reason}. Pass PEM files of a certificate chain and "
            "of its private key"
        ) from error
    except OSError as error:
        raise RequestError(
            f"http.certificate {certificate}, http.private_key {private_key}: "
            f"{error.strerror or error}. Pass files that can be read"
        ) from error


def _set_environment(config: ServeConfig) -> None:
    """Set the environment variables that Ray Serve's processes read, if they are not set already.

    The limits of request bodies are always set.

    User code runs in the main thread: nothing in a replica blocks its event loop for long.
    """
    limits = config.limits
    variables = {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": proxy_middleware.CALLBACK_PATH,
    }
    if config.http.proxy == "haproxy":
        variables |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(_find_free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(_find_free_port()),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_find_free_port()),
        }
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    body_bytes = max(limits.body_bytes, limits.image_bytes)
    os.environ.update(proxy_middleware.build_environment(body_bytes, limits.proxy_bytes))


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_proxies(config: ServeConfig) -> None:
    """Start Ray Serve's HTTP proxies, or check that those of the cluster have the same settings."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    current = ray_internals.find_serve_options()
    certificate, private_key = (
        file if file is None else os.path.abspath(file)
        for file in (config.http.certificate, config.http.private_key)
    )
    wanted = HTTPOptions(
        host=config.http.host,
        port=config.http.port,
        request_timeout_s=config.http.request_timeout_s,
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
    )
    if current is None:
        _check_ports_free(config.http)
    else:
        _check_running_proxies(current, wanted)
    ray_serve.start(proxy_location=ProxyLocation.EveryNode, http_options=wanted)


def _check_running_proxies(current: HTTPOptions, wanted: HTTPOptions) -> None:
    """Check that running proxies have the wanted settings: Ray Serve would ignore other ones."""
    if (current.host, current.port) != (wanted.host, wanted.port):
        raise RequestError(
            f"http: Ray Serve already listens on {current.host}:{current.port} on this cluster. "
            f"Pass --http.host {current.host} --http.port {current.port}, or stop it with `serve "
            "shutdown`"
        )
    for key, name in (
        ("certificate", "ssl_certfile"),
        ("private_key", "ssl_keyfile"),
        ("request_timeout_s", "request_timeout_s"),
    ):
        running, value = getattr(current, name), getattr(wanted, name)
        if running == value:
            continue
        if key == "request_timeout_s" and running is None:
            # started by another program, whose applications a shutdown would stop too
            log.emit(
                "note",
                f"http.request_timeout_s {value:g} has no effect: Ray Serve already runs on this "
                "cluster, without a timeout. Stop it with `serve shutdown` first to set one",
            )
            continue
        there = f"with http.{key} {running}" if running else f"without http.{key}"
        remedy = f"Pass --{to_option(f'http.{key}')} {running}" if running else f"Omit http.{key}"
        raise RequestError(
            f"http.{key} {value or 'none'}: Ray Serve already runs {there} on this cluster. "
            f"{remedy}, or stop it with `serve shutdown`"
        )


def _check_ports_free(http: HttpConfig) -> None:
    """Check on every node that nothing listens on the address of the proxies.

    A proxy of Ray Serve shares its port with any other one on the machine (SO_REUSEPORT): each
    would get a part of the other's requests.
    """
    if session.is_private_session():
        failures = {"": _find_bind_error(http)}
    else:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        probes: list[Any] = []
        for node in nodes:
            on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probe: Any = ray.remote(num_cpus=0)(_find_bind_error)
            probes.append(probe.options(scheduling_strategy=on_node).remote(http))
        places = [f" on node {node['NodeManagerAddress']}" for node in nodes]
        failures = dict(zip(places, ray.get(probes), strict=True))
    for place, error in failures.items():
        if error is not None:
            raise RequestError(
                f"http.port {http.port}{place}: {error}. Pass another --http.port or --http.host"
            )


def _find_bind_error(http: HttpConfig) -> str | None:
    """Why this machine cannot listen on the address; None if it can."""
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            return error.strerror or str(error)
    return None


def _wait_for_replicas(settings_id: str, interruption: Interruption) -> None:
    """Wait until all replicas have applied the settings with this ID."""
    coordinator = ray_serve.get_deployment_handle(COORDINATOR, APPLICATION)
    deadline = time.monotonic() + UPDATE_TIMEOUT_S
    while True:
        interruption.check()
        reports = coordinator.list_reports.remote().result(timeout_s=60)
        current = [report for report in reports if report.settings_id == settings_id]
        errors = [report.error for report in current if report.error is not None]
        if errors:
            raise RunFailed(f"the previous model stays in use: {errors[0]}")
        if reports and len(current) == len(reports):
            return
        if time.monotonic() > deadline:
            raise ResourcesError(
                f"not all replicas have loaded the model within {UPDATE_TIMEOUT_S:g} s"
            )
        time.sleep(0.2)


def _drain(config: ServeConfig) -> None:
    """Turn /readyz to 503 and keep serving for the drain period."""
    if config.replicas.drain_period_s:
        log.emit("stop", f"draining for {config.replicas.drain_period_s:g} s")
        coordinator = ray_serve.get_deployment_handle(COORDINATOR, APPLICATION)
        coordinator.start_draining.remote().result(timeout_s=30)
        time.sleep(config.replicas.drain_period_s)


def _delete_application() -> None:
    """Delete the application; its replicas first finish their requests."""
    ray_serve.delete(APPLICATION)
    if session.is_private_session():
        ray_internals.hide_controller_messages()
        ray_serve.shutdown()


def _find_start_error() -> str | None:
    """The last line of the traceback of a replica that did not start, from Ray Serve's status."""
    application = ray_serve.status().applications.get(APPLICATION)
    for deployment in application.deployments.values() if application else ():
        lines = [line for line in deployment.message.splitlines() if re.match(r"\w[\w.]*: ", line)]
        if lines:
            return lines[-1]
    return None
