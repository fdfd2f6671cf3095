"""Private parts of Ray that this package uses, each with its reason; read it when Ray is upgraded.

Written for Ray 2.60. No other module imports from `ray._private`, an `_internal` package or
`ray.experimental.internal_kv`, or reads a private attribute of one of Ray's objects. What takes
long to import (Ray Data, Ray Serve, Ray Train) is imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.experimental import internal_kv

if TYPE_CHECKING:
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.serve._private.request_router import (  # type: ignore[attr-defined]
        PowerOfTwoChoicesRequestRouter,
    )
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


def kill_autoscaler_monitor() -> None:
    """Kill the autoscaler of a private session: `ray.shutdown` waits for it, it ignores SIGTERM."""
    node: Any = ray._private.worker._global_node
    node.kill_monitor(check_alive=False)


# ---------------------------------------------------------------------------------- Ray Data


def get_execution_config(executor: Any, key: str) -> Any:
    """An entry of the DataContext that an executor, as given to a callback, runs with."""
    return executor._data_context.get_config(key)


def limit_result_buffer(context: Any, blocks: int) -> None:
    """Limit the result blocks that a task may produce before the driver has taken them.

    Ray Data has no public setting; by default two blocks wait in every worker.
    """
    context._max_num_blocks_in_streaming_gen_buffer = blocks


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


def find_serve_address() -> tuple[str, int] | None:
    """Host and port of Ray Serve's HTTP proxies; None when Serve does not run on the cluster.

    `serve.status()` reports no address.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        client: Any = serve.context._get_global_client(raise_if_no_controller_running=False)
    except RayServeException:
        return None
    if client is None:
        return None
    options = ray.get(client._controller.get_http_config.remote())
    return options.host, options.port
