"""Ray session of a job: join a cluster or start a private one, and list its nodes.

Authentication, addresses and log folders are configured as in Ray: `RAY_ADDRESS` and
`RAY_AUTH_MODE` are obeyed and never changed here.

Ray has one session per process, so jobs in several threads share it: the first one starts or joins
it, and no job shuts it down; the command does so at its end.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import urllib.parse
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import grpc
import ray

from imgcls import errors
from imgcls.cluster import ray_internals, worker_forks
from imgcls.cluster.worker_forks import MALLOC_SETTINGS, WorkerForks
from imgcls.data.environment import set_env_defaults
from imgcls.errors import ImgclsError, RequestError, RunFailed, first_line

_CONNECT_TIMEOUT_S = 30
"""Enough for a busy head node; one that is gone refuses the connection at once."""

JPEG_ENGINE_GPUS = ("A100", "A30", "H100", "H200", "B200", "GB200")
"""Accelerators with a JPEG decode engine, by Ray's names."""

DeviceType = Literal["cpu", "cuda"]
"""Device that a worker or replica is planned to run its network on."""


@dataclass(frozen=True)
class Node:
    """Logical resources of one node, and its accelerator type as Ray names it.

    object_store_bytes: size of the node's object store
    """

    cpus: float
    gpus: float
    accelerator: str | None = None
    id: str = ""
    object_store_bytes: float = math.inf


class _Session:
    lock: ClassVar[threading.Lock] = threading.Lock()
    private_address: ClassVar[str | None] = None
    """Address of the private session that `connect` has started last."""
    forks: ClassVar[WorkerForks | None] = None
    """What forks its workers."""
    ray_threads: ClassVar[weakref.WeakSet[threading.Thread]] = weakref.WeakSet()

    @classmethod
    def end_forks(cls) -> None:
        if cls.forks is not None:
            cls.forks.end()
            cls.forks = None


def connect() -> None:
    """Join the cluster that this job was submitted to, or start a private one on this machine.

    Raises RunFailed within a minute when the cluster that RAY_ADDRESS names does not answer.
    """
    with _Session.lock:  # of two jobs in two threads, the second one finds the session of the first
        if not ray.is_initialized():
            _start_or_join(_find_address())


def join_cluster(address: str | None = None, *, start: bool = False) -> bool:
    """Join a running cluster; returns False when there is none.

    address: of the cluster, as RAY_ADDRESS may name it; None: the one that `connect` joins
    start:   start a private session where `connect` would

    Raises as `connect` does.
    """
    with _Session.lock:
        if ray.is_initialized():
            return True
        if address is not None and address != "local":
            check_reachable(address, "--address")
        found = address or _find_address()
        if found == "local" and not start:
            return False
        _start_or_join(found)
        return True


def _start_or_join(address: str | None) -> None:
    """Join a cluster or start a session; address: as for `ray.init`."""
    # Ray's core logs a false alarm for every actor pool; real errors arrive as exceptions
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    private = address == "local"
    if not private:
        worker_forks.discard_forks()
    # workers of other commands do not need torch, and would wait until it is imported
    fork = worker_forks.fork_workers() if worker_forks.is_prepared() else contextlib.nullcontext()
    # Ray Data imports pandas next; Ray's own processes take two seconds to start in the meantime
    threading.Thread(target=importlib.import_module, args=("pandas",), daemon=True).start()
    with (
        _hold_back_stderr(),
        set_env_defaults(MALLOC_SETTINGS if private else {}),
        ray_internals.start_without_services() if private else contextlib.nullcontext(),
        fork as forks,
        ray_internals.report_slow_start(),
    ):
        ray.init(
            address,
            logging_level=logging.WARNING,
            log_to_driver=False,
            include_dashboard=False,
        )
    if private:
        _Session.end_forks()
        _Session.forks = forks
        _Session.private_address = ray.get_runtime_context().gcs_address
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init has replaced the handler


def end_session(exit_code: int) -> None:
    """Shut down the private session that `connect` started; leave a cluster that was joined alone.

    The interpreter would do so too at its exit, but later: Ray then waits for messages, which are
    not shown here. After an interruption a thread may still be inside
    Ray's native code, which does not survive a shutdown; the process then exits here, with
    `exit_code`, and the session ends with it.
    """
    if any(thread.is_alive() for thread in _Session.ray_threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if is_private_session():
        ray.shutdown()
        _Session.end_forks()


def register_ray_thread(thread: threading.Thread) -> None:
    """Register a thread that may be inside Ray's native code when the process ends."""
    _Session.ray_threads.add(thread)


def is_private_session() -> bool:
    """Whether `connect` started the session: no node will join it.

    The program may have shut it down since, and joined another one.
    """
    return (
        _Session.private_address is not None
        and ray.is_initialized()
        and bool(ray.get_runtime_context().gcs_address == _Session.private_address)
    )


def build_malloc_env() -> dict[str, Any]:
    """Ray runtime environment for CPU workers: freed memory stays in the process.

    By default glibc returns each tensor above 32 MB to the kernel, which clears the pages again for
    the next batch: a quarter of the time of a ResNet. The variables must be set before the process
    starts, because running threads already have arenas of their own. Variables that the user has
    set are kept; other C libraries ignore them.

    Empty in a private session, whose processes were all started that way: an own runtime
    environment would start new ones.
    """
    if is_private_session():
        return {}
    return {
        "env_vars": {name: os.environ.get(name, value) for name, value in MALLOC_SETTINGS.items()}
    }


def _find_address() -> str | None:
    """The address for `ray.init`: None for a running cluster, `local` for a private session.

    The last `ray start` on a machine leaves its address in a file even if it was killed; `ray.init`
    would try that address for minutes.
    """
    named = os.environ.get("RAY_ADDRESS")
    if named == "local":
        return "local"
    if named:
        check_reachable(named)
        return None
    last = ray_internals.read_last_address()
    if last is None:
        return "local"
    host, _, port = last.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return None
    except (OSError, ValueError):
        return "local"


def check_reachable(address: str, setting: str = "RAY_ADDRESS") -> None:
    """Check that a cluster answers at an address; `ray.init` would retry for minutes.

    address: `auto`, host:port or ray://host:port; other schemes are left to Ray
    setting: the variable or the option that names it
    Raises RunFailed when nothing answers (the cluster may be back later), RequestError when the
    address is invalid.
    """
    place = f"{setting}={address}"
    if address.startswith(("http://", "https://")):
        raise RequestError(
            f"{place}: is the address of a dashboard, which `ray job submit` takes. Set {setting} "
            "to the head node's host:port (6379 by default), or unset it"
        )
    found = address.removeprefix("ray://")
    if "://" in found:
        return
    if address == "auto":
        try:
            found = ray_internals.find_local_cluster()
        except ConnectionError as error:
            raise RunFailed(
                f"{place}: no Ray cluster runs on this machine. Start one with `ray start --head`, "
                f"set {setting} to the host:port of another, or unset it"
            ) from error
    host, port = _split_address(found, 10001 if address.startswith("ray://") else None, place)
    why = _probe_server(host, port)
    if why is not None:
        raise RunFailed(
            f"{place}: no Ray cluster answers at {host}:{port} ({why}). Start the cluster, correct "
            f"{setting}, or unset it to run on this machine"
        )


def _split_address(address: str, default: int | None, place: str) -> tuple[str, int]:
    try:
        parts = urllib.parse.urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port or default
    except ValueError:
        host = port = None
    if not host or port is None:
        raise RequestError(
            f"{place}: is not an address. Use host:port, ray://host:port, auto or local"
        )
    return host, port


def _probe_server(host: str, port: int) -> str | None:
    """Why no gRPC server answers within `_CONNECT_TIMEOUT_S`; None when one does."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return None  # Ray checks the certificates
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            return f"the port is open, but no Ray server answered in {_CONNECT_TIMEOUT_S} s"
    return None


@contextlib.contextmanager
def _hold_back_stderr() -> Iterator[None]:
    """Hold back what native code writes to stderr; print it if an error follows."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def list_nodes() -> list[Node]:
    """The live nodes that have CPUs or GPUs; a head node that takes no work has none."""
    alive = [node for node in ray.nodes() if node.get("Alive")]
    found = [build_node(node.get("Resources", {}), node["NodeID"]) for node in alive]
    return [node for node in found if node.cpus or node.gpus]


def build_node(resources: Mapping[str, float], id: str = "") -> Node:
    """A node from Ray's mapping of its resources."""
    prefix = "accelerator_type:"
    names = [key[len(prefix) :] for key in resources if key.startswith(prefix)]
    return Node(
        float(resources.get("CPU", 0)),
        float(resources.get("GPU", 0)),
        names[0] if names else None,
        id,
        float(resources.get("object_store_memory", math.inf)),
    )


@contextlib.contextmanager
def unwrap_ray_errors() -> Iterator[None]:
    """Within the block, an error of this package that a task raised is raised as itself."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = find_cause(error)
        if isinstance(cause, ImgclsError):
            raise type(cause)(first_line(cause)) from error
        raise


def find_cause(error: ray.exceptions.RayError) -> BaseException:
    """The error that a task raised, or an actor while it was created; else Ray's own."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause: BaseException = error.cause
        return cause
    if isinstance(error, ray.exceptions.ActorDiedError) and error.actor_init_failed:
        return _read_creation_error(str(error))
    return error


CHAINED = re.compile(r"^(?:The above exception was|During handling of) .*$", re.MULTILINE)
"""The line in a traceback between an error and a later one."""


def _read_creation_error(text: str) -> ImgclsError:
    """The error that ended the creation of an actor, of which Ray keeps only the traceback."""
    *_, text = CHAINED.split(text)
    found = list(re.finditer(r"^imgcls\.errors\.(\w+): ", text, re.MULTILINE))
    kind = getattr(errors, found[-1][1], None) if found else None
    if isinstance(kind, type) and issubclass(kind, ImgclsError):
        return kind(text[found[-1].end() :].strip())
    *_, last = text.strip().split("\n")
    return RunFailed(f"a worker failed while it started: {last}")
