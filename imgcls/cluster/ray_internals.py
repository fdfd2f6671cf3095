"""Private parts of Ray that this package uses, each with its reason; read it when Ray is upgraded.

Written for Ray 2.60. No other module imports from `ray._private`, an `_internal` package or
`ray.experimental.internal_kv`, or reads a private attribute of one of Ray's objects. What takes
long to import (Ray Data, Ray Serve, Ray Train) is imported on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
from ray.experimental import internal_kv

from imgcls.errors import RunFailed

if TYPE_CHECKING:
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.serve._private.request_router import (  # type: ignore[attr-defined]
        PowerOfTwoChoicesRequestRouter,
    )
    from ray.serve.config import HTTPOptions
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

__all__ = [
    "ExecutionCallback",
    "PowerOfTwoChoicesRequestRouter",
    "WorkerGroupStartupTimeoutError",
]

RAY_VERSION = "2.60"
"""Version of Ray that these parts were checked against."""

_KV_NAMESPACE = "imgcls"

_CLASSES = {
    # Called before the first task starts. Ray Data hands out the executor of a running dataset in
    # no public way, and without it workers cannot be stopped when nodes join or a run is stopped.
    "ExecutionCallback": "ray.data._internal.execution.execution_callback",
    # Ray Serve's default router. The public base class, RequestRouter, chooses no replica itself.
    "PowerOfTwoChoicesRequestRouter": "ray.serve._private.request_router",
    # Distinguishes "no room on the cluster" from other failures of the controller.
    "WorkerGroupStartupTimeoutError": "ray.train.v2._internal.exceptions",
}


def __getattr__(name: str) -> Any:
    """Import a private class of Ray on first use."""
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---------------------------------------------------------------------------------- Ray Core


def put_kv(key: str, value: str) -> None:
    """Write to Ray's key-value store, which is kept by the head node.

    It outlives the workers that write to it, and needs no actor that could itself be lost with a
    node. Ray has no public store like it.
    """
    internal_kv._internal_kv_put(key, value, namespace=_KV_NAMESPACE)


def get_kv(key: str) -> bytes | None:
    value: bytes | None = internal_kv._internal_kv_get(key, namespace=_KV_NAMESPACE)
    return value


def delete_kv(key: str, *, prefix: bool = False) -> None:
    """Delete a key, or all keys that begin with it."""
    internal_kv._internal_kv_del(key, del_by_prefix=prefix, namespace=_KV_NAMESPACE)


def list_kv(prefix: str) -> list[str]:
    """All keys that begin with `prefix`."""
    found = internal_kv._internal_kv_list(prefix, namespace=_KV_NAMESPACE)
    return [key.decode() for key in found]


def is_actor_alive(actor: Any) -> bool:
    """Whether an actor's process runs. `ray.util.state` would need the dashboard for it."""
    found = ray._private.state.actors(actor._actor_id.hex())
    return bool(found.get("State") == "ALIVE")


def get_cluster_config() -> Any:
    """The node groups that an autoscaler may grow the cluster to (KubeRay); None when unknown.

    `ray.autoscaler.sdk` only takes requests and reports no limits.
    """
    return ray._private.state.state.get_cluster_config()


def read_last_address() -> str | None:
    """The address that the last `ray start` on this machine left in a file.

    `ray.init` reads it too, but then tries for minutes to connect to a cluster that was killed.
    """
    address: str | None = ray._private.utils.read_ray_address()
    return address


def find_local_cluster() -> str:
    """host:port of the cluster on this machine, as `RAY_ADDRESS=auto` finds it.

    Raises ConnectionError when there is none.
    """
    address: str = ray._private.services.canonicalize_bootstrap_address_or_die("auto")
    return address


@contextlib.contextmanager
def start_without_services() -> Iterator[None]:
    """Within the block, `ray.init` starts no dashboard, no autoscaler and no log monitor.

    They are for other clients, for nodes that may join, and for drivers that print the output of
    their workers. `ray start` has options for the last two and `ray.init` has none; with
    `include_dashboard=False` it starts a dashboard without pages and waits for it. Together they
    take 2 CPU seconds, of the 15 until the first prediction. A node whose dashboard could not start
    has the same state as one without it.

    Ray also imports the dashboard's dependencies, to know whether there are any: 0.2 CPU seconds
    for `ray[default]`, which this package requires. And its agent listens to a port that is the
    same for all sessions: where it is taken, `ray.init` waits 3.4 s until the agent stops trying.
    """
    constants = ray._private.ray_constants

    def skip_dashboard(node: Any, **_: Any) -> None:
        node._webui_url = ""
        # the agent looks for an address every second, and logs an error; this one has no server
        node.get_gcs_client().internal_kv_put(
            constants.DASHBOARD_ADDRESS.encode(),
            b"127.0.0.1:1",
            True,
            constants.KV_NAMESPACE_DASHBOARD,
        )

    build: Any = ray._private.parameter.RayParams
    parameters = functools.partial(
        build, no_monitor=True, include_log_monitor=False, dashboard_agent_listen_port=0
    )
    replaced: list[tuple[Any, str, Any]] = [
        (ray._private.node.Node, "start_api_server", skip_dashboard),
        (ray._private.parameter, "RayParams", parameters),
        (ray._private.utils, "get_dashboard_dependency_error", lambda: None),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


SLOW_START = "The current node timed out during startup"


def import_for_forks(modules: Iterable[str]) -> bool:
    """Import modules in a process that will be forked; returns whether forks draw different ids.

    Ray draws ids from a native generator, of which every fork would have the same state. It is in
    its initial state, seeded when it is first used, as long as nothing draws from it. So the ids of
    the actor classes that modules define come from the operating system here.
    """
    actor: Any = ray.actor
    class_id = actor.ActorClassID
    actor.ActorClassID = SimpleNamespace(from_random=lambda: class_id(os.urandom(class_id.size())))
    try:
        for name in modules:
            importlib.import_module(name)
    finally:
        actor.ActorClassID = class_id
    return len({_draw_id_in_fork() for _ in range(2)}) == 2


def _draw_id_in_fork() -> bytes:
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.write(writer, ray.UniqueID.from_random().binary())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        drawn = stream.read()
    os.waitpid(process, 0)
    return drawn


@contextlib.contextmanager
def report_slow_start() -> Iterator[None]:
    """Raise RunFailed where Ray raises a bare Exception: its node did not start within 30 s."""
    try:
        yield
    except Exception as error:
        # Ray has no class for it, and no setting for the 30 s
        if SLOW_START not in str(error):
            raise
        raise RunFailed(
            "Ray did not start on this machine within 30 s: its processor or memory is in use. "
            "Rerun the same command when it is less busy, or start Ray once with `ray start --head`"
        ) from error


# ---------------------------------------------------------------------------------- Ray Data


def get_execution_config(executor: Any, key: str) -> Any:
    """An entry of the DataContext that an executor, as given to a callback, runs with."""
    return executor._data_context.get_config(key)


def limit_result_buffer(context: Any, blocks: int) -> None:
    """Limit the result blocks that a task may produce before the driver has taken them.

    Ray Data has no public setting; by default two blocks wait in every worker.
    """
    context._max_num_blocks_in_streaming_gen_buffer = blocks


class _LocalActor:
    """Handle like that of a Ray actor, of an object in the process of its caller."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[_LocalActor], tuple[Any]]:
        return _LocalActor, (self._instance,)

    def __getattr__(self, name: str) -> SimpleNamespace:
        method = getattr(self._instance, name)

        def remote(*arguments: Any, **options: Any) -> ray.ObjectRef[Any]:
            with self._lock:
                return ray.put(method(*arguments, **options))

        return SimpleNamespace(remote=remote)


class _UnknownLocations:
    """Replaces Ray Data's tracker of the nodes of actors, of which a private session has one.

    Ray Data uses the node that an actor started on where the tracker does not know it.
    """

    def update_actor_location(self, logical_actor_id: str, node_id: str) -> None:
        pass

    def get_actor_locations(self, logical_actor_ids: tuple[str, ...]) -> dict[str, str]:
        return {}


def _build_stats_actor() -> Any:
    from ray.data._internal import stats

    kind: Any = stats._StatsActor
    return kind.__ray_metadata__.modified_class()


def _build_autoscaling_coordinator() -> Any:
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as module

    class Coordinator(module._AutoscalingCoordinatorActor):
        # Its thread would go on after the session and start another one. The executor of a dataset
        # sends a request every ten seconds, after which the coordinator does the same work.
        TICK_INTERVAL_S = 10**9

    return Coordinator(send_resources_request=lambda *_: None)


_DATA_ACTORS: tuple[tuple[Callable[[], Any], str, tuple[str, ...]], ...] = (
    (_build_stats_actor, "get_or_create_stats_actor", ("ray.data._internal.stats",)),
    (
        _build_autoscaling_coordinator,
        "get_or_create_autoscaling_coordinator",
        ("ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",),
    ),
    (
        _UnknownLocations,
        "get_or_create_actor_location_tracker",
        (
            "ray.data._internal.execution.operators.actor_pool_map_operator",
            "ray.data._internal.utils.cached_ray_internals",
        ),
    ),
)
"""Ray Data's actors: what builds one here, the function that Ray Data gets it from, and the modules
that call that function."""


def keep_data_actors_local(is_private: Callable[[], bool]) -> None:
    """Keep Ray Data's internal actors in the driver's process while a session is private.

    Ray Data starts three: statistics, locations of actors, and resources of datasets. Each is a
    process that imports Ray Data, 0.9 CPU seconds, and the workers wait for two of them. Only the
    dashboard and other drivers would use them too. Ray Data has no setting for it.
    """
    for build, name, modules in _DATA_ACTORS:
        for module in map(importlib.import_module, modules):
            original = getattr(module, name)
            if not hasattr(original, "__wrapped__"):
                setattr(module, name, _prefer_local(original, build, is_private))


def _prefer_local(
    original: Callable[[], Any], build: Callable[[], Any], is_private: Callable[[], bool]
) -> Callable[[], Any]:
    lock = threading.Lock()
    actors: dict[str, _LocalActor] = {}

    @functools.wraps(original)
    def get_or_create() -> Any:
        if not is_private():
            return original()
        session = ray.get_runtime_context().gcs_address
        with lock:
            if session not in actors:
                actors.clear()
                actors[session] = _LocalActor(build())
            return actors[session]

    return get_or_create


# ---------------------------------------------------------------------------------- Ray Train


def skip_dataset_actor(trainer: Any) -> None:
    """Keep a trainer without datasets from starting the actor that would split them.

    It is a process of 1.4 CPU seconds for every group of workers, which then import Ray
    Data: 0.5 CPU seconds each. Ray Train has no setting for it.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

    create = trainer._create_default_callbacks

    def create_others() -> list[Any]:
        return [callback for callback in create() if not isinstance(callback, DatasetsCallback)]

    trainer._create_default_callbacks = create_others


# ---------------------------------------------------------------------------------- Ray Serve

# A subclass of PowerOfTwoChoicesRequestRouter overrides `_choose_replica_for_request`, through
# which every request passes that has no replica yet.


def list_router_replicas(router: PowerOfTwoChoicesRequestRouter) -> list[Any]:
    """The replicas that a router knows."""
    return list(router._replicas.values())


def get_router_deployment(router: PowerOfTwoChoicesRequestRouter) -> Any:
    """The id of the deployment that a router serves, which its errors name."""
    return router._deployment_id


def iter_pending_requests(router: PowerOfTwoChoicesRequestRouter) -> Iterator[Any]:
    """Requests that wait for a replica; each has a `future`."""
    yield from list(router._pending_requests_to_fulfill)


def forget_pending_request(router: PowerOfTwoChoicesRequestRouter, request: Any) -> None:
    """Remove a request that was answered with an error; Ray Serve would keep its body."""
    router._remove_pending_request_from_indices(request)


@functools.cache
def hide_controller_messages() -> None:
    """Do not print that the last calls of Ray Serve's controller have failed.

    At its shutdown the controller ends itself before it answers. For Ray that is a failure, which
    it prints to the standard output of the program; no setting prevents it.
    """
    module: Any = ray._private.worker
    original = module.print_to_stdstream

    def print_others(data: dict[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if not line.startswith("Task ServeController.")]
        if lines:
            original({**data, "lines": lines}, ignore_prefix)

    module.print_to_stdstream = print_others


def find_serve_options() -> HTTPOptions | None:
    """The options of Ray Serve's HTTP proxies; None when Serve does not run on the cluster.

    `serve.status()` reports none of them, and `serve.start` ignores other ones.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        client: Any = serve.context._get_global_client(raise_if_no_controller_running=False)
    except RayServeException:
        return None
    if client is None:
        return None
    options: HTTPOptions = ray.get(client._controller.get_http_config.remote())
    return options
