"""The Ray session under a job: connect or start one, quietly, and say what it has.

Shared by the rooms that use Ray. Authentication, addresses and log folders stay Ray's own business:
what `RAY_ADDRESS` and `RAY_AUTH_MODE` say is obeyed and never changed here.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import queue
import re
import signal
import socket
import sys
import tempfile
import threading
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar, TypeVar

import grpc
import ray

from imgcls import errors
from imgcls.data.storage_settings import bind_settings
from imgcls.errors import ImgclsError, Interrupted, RequestError, RunFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """One machine's logical resources and the accelerator it names, as Ray knows them.

    store_bytes: of its object store
    """

    cpus: float
    gpus: float
    accelerator: str | None = None
    id: str = ""
    object_store_bytes: float = math.inf


def connect() -> None:
    """Join the cluster this job was submitted to, or start a private one on this machine.

    Raises RunFailed within a minute when the cluster that RAY_ADDRESS names does not answer.
    """
    # Ray's core prints a false alarm for every actor pool; what matters reaches us as an exception
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = _find_address()
    private = address == "local"
    # Ray Data imports it next; Ray's own processes take two seconds to start in the meantime
    threading.Thread(target=importlib.import_module, args=("pandas",), daemon=True).start()
    with _hold_back_stderr(), _set_malloc_env() if private else contextlib.nullcontext():
        ray.init(
            address,
            logging_level=logging.WARNING,
            log_to_driver=False,
            include_dashboard=False,
        )
    _Session.private = private
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in its place


def silence_data_logger() -> None:
    """Have Ray Data raise its errors without logging them too; once it is imported, not before."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def end_session(exit_code: int) -> None:
    """End the private session that `connect` has started; a cluster that was joined stays.

    At the interpreter's exit Ray does so too, a second and a half later: it waits for messages that
    are shown nowhere here, and for its autoscaler, which in a private session has nothing to do and
    does not heed SIGTERM.
    Where a run was broken off, a thread may still be within Ray's native code, which does not
    survive a shutdown: the process then ends here, with `exit_code`, and the session ends with it.
    """
    if any(thread.is_alive() for thread in _Session.ray_threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if _Session.private and ray.is_initialized():
        node: Any = ray._private.worker._global_node
        node.kill_monitor(check_alive=False)
        ray.shutdown()
    _Session.private = False


def register_ray_thread(thread: threading.Thread) -> None:
    """Note a thread that may be within Ray's native code when the process is to end."""
    _Session.ray_threads.append(thread)


def build_malloc_env() -> dict[str, Any]:
    """The runtime environment of processes that compute on a CPU: what they free, they keep.

    By its own rules glibc gives every tensor of more than 32 MB back to the kernel, and clears the
    pages anew for the next batch: a quarter of the time of a ResNet. They are set from outside,
    before the process starts, since threads that are there already have heaps of their own. Other
    C libraries pay no heed; what the environment says already is obeyed.

    Empty in a private session that `connect` has started: all its processes are like that, and
    those that wait for work need not be started anew.
    """
    if _Session.private:
        return {}
    return {
        "env_vars": {name: os.environ.get(name, value) for name, value in _MALLOC_SETTINGS.items()}
    }


class _Session:
    private = False
    ray_threads: ClassVar[list[threading.Thread]] = []


@contextlib.contextmanager
def _set_malloc_env() -> Iterator[None]:
    """Have the processes that are started within it keep what they free."""
    added = {name: value for name, value in _MALLOC_SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


_MALLOC_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
}
"""In bytes, but for the number of heaps."""


def _find_address() -> str | None:
    """None for a cluster that is there, and `local` for a session of our own.

    The last `ray start` on a machine leaves its address in a file, also when it was killed, and
    `ray.init` then tries that address for minutes.
    """
    named = os.environ.get("RAY_ADDRESS")
    if named == "local":
        return "local"
    if named:
        check_reachable(named)
        return None
    last: Any = ray._private.utils.read_ray_address()
    if last is None:
        return "local"
    host, _, port = last.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return None
    except (OSError, ValueError):
        return "local"


def check_reachable(address: str) -> None:
    """Raise if no cluster answers at RAY_ADDRESS; `ray.init` would retry for minutes.

    address: `auto`, host:port or ray://host:port; another scheme is left to Ray
    Raises RunFailed when nothing answers: the cluster may be back later. Raises RequestError when
    the address cannot be one.
    """
    place = f"RAY_ADDRESS={address}"
    if address.startswith(("http://", "https://")):
        raise RequestError(
            f"{place}: is the address of a dashboard, which `ray job submit` takes. Set "
            "RAY_ADDRESS to the head node's host:port (6379 by default), or unset it"
        )
    found = address.removeprefix("ray://")
    if "://" in found:
        return
    if address == "auto":
        try:
            found = ray._private.services.canonicalize_bootstrap_address_or_die("auto")
        except ConnectionError as error:
            raise RunFailed(
                f"{place}: no Ray cluster runs on this machine. Start one with `ray start --head`, "
                "set RAY_ADDRESS to the host:port of another, or unset it"
            ) from error
    host, port = _split_address(found, 10001 if address.startswith("ray://") else None, place)
    why = _probe_server(host, port)
    if why is not None:
        raise RunFailed(
            f"{place}: no Ray cluster answers at {host}:{port} ({why}). Start the cluster, correct "
            "RAY_ADDRESS, or unset it to run on this machine"
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
    """Why no gRPC server answers there within `_ANSWER_SECONDS`; None when one does."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return None  # the certificates are Ray's to check
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            return f"the port is open, but no Ray server answered in {_CONNECT_TIMEOUT_S} s"
    return None


_CONNECT_TIMEOUT_S = 30
"""For a head node that is busy; one that is gone refuses the connection at once."""


@contextlib.contextmanager
def _hold_back_stderr() -> Iterator[None]:
    """Hold back what native code writes to stderr; it is shown after all when an error follows."""
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
    """The live machines, those without resources (a head that takes no work) left out."""
    machines = [node for node in ray.nodes() if node.get("Alive")]
    found = [build_node(machine.get("Resources", {}), machine["NodeID"]) for machine in machines]
    return [node for node in found if node.cpus or node.gpus]


def build_node(resources: Mapping[str, float], id: str = "") -> Node:
    """A machine of what Ray calls its resources."""
    prefix = "accelerator_type:"
    names = [key[len(prefix) :] for key in resources if key.startswith(prefix)]
    return Node(
        float(resources.get("CPU", 0)),
        float(resources.get("GPU", 0)),
        names[0] if names else None,
        id,
        float(resources.get("object_store_memory", math.inf)),
    )


def is_private_session() -> bool:
    """Whether the session was started by `connect`: no machine will join it."""
    return _Session.private


def is_actor_alive(actor: Any) -> bool:
    """Whether an actor's process is there, as far as Ray knows."""
    return bool(ray._private.state.actors(actor._actor_id.hex()).get("State") == "ALIVE")


@contextlib.contextmanager
def unwrap_ray_errors() -> Iterator[None]:
    """Within it, an error of this package that a task raised comes out as itself."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = find_cause(error)
        if isinstance(cause, ImgclsError):
            words = (str(cause).strip() or "no message").splitlines()[0]
            raise type(cause)(words) from error
        raise


def find_cause(error: ray.exceptions.RayError) -> BaseException:
    """What a task raised: the error of this package that Ray tells of, else what Ray holds.

    Ray Data wraps what a function raises, and of the chain only the words come through.
    """
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    told = re.search(r"^imgcls\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
    if isinstance(cause, ImgclsError) or told is None:
        return cause
    kind: type[ImgclsError] = getattr(errors, told[1], ImgclsError)
    return kind(told[2])


class Interruption:
    """SIGTERM and Ctrl-C while a job runs.

    The first signal raises Interrupted in the main thread at once. Native code that calls back into
    Python may swallow that, so the job also asks `check` between its steps.
    """

    def __init__(self) -> None:
        self._why: str | None = None

    def request_stop(self, why: str) -> None:
        """Have `check` raise, for a reason other than a signal."""
        self._why = why

    def check(self) -> None:
        """Raise Interrupted if a signal has come, or it was asked for."""
        if self._why is not None:
            raise Interrupted(f"stopped by {self._why}")

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[Interruption]:
        """Within it, signals interrupt; outside the main thread they cannot be caught."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._why is None:
            self._why = signal.Signals(number).name
            self.check()


def iterate_in_thread(items: Iterable[T], interruption: Interruption) -> Iterator[T | None]:
    """Iterate in a thread of its own, so that a signal is answered while Ray keeps it waiting.

    Yields None every fifth of a second without an item.
    """
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def consume() -> None:
        try:
            for item in items:
                ready.put((item, None))
                if stop.is_set():
                    return
            ready.put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001  it is raised again where it is awaited
            ready.put((None, error))

    thread = threading.Thread(target=bind_settings(consume), name="consume", daemon=True)
    register_ray_thread(thread)
    thread.start()
    try:
        while True:
            interruption.check()
            try:
                item, error = ready.get(timeout=0.2)
            except queue.Empty:
                yield None
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join(timeout=1)  # it has come to its end, or is within Ray and cannot be called back
