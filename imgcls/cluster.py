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
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar, TypeVar

import ray
import yaml
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from imgcls import errors
from imgcls.errors import ImgclsError, Interrupted, ResourcesError, RunFailed
from imgcls.log import tell

T = TypeVar("T")

IDLE_SECONDS = 30.0
"""After which waiting is said: workers take a while to start."""
LAUNCHED = "~/ray_bootstrap_config.yaml"
"""On the head of a cluster that `ray up` has started: what it may grow to."""
MANY = 1000
"""Machines of a kind of which there may be any number."""
SAY_SECONDS = 5.0
"""And so often then."""


@dataclass(frozen=True)
class Node:
    """One machine's logical resources and the accelerator it names, as Ray knows them.

    store_bytes: of its object store
    """

    cpus: float
    gpus: float
    accelerator: str | None = None
    id: str = ""
    store_bytes: float = math.inf


def connect() -> None:
    """Join the cluster this job was submitted to, or start a private one on this machine."""
    # Ray's core prints a false alarm for every actor pool; what matters reaches us as an exception
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = _address()
    private = address == "local"
    # Ray Data imports it next; Ray's own processes take two seconds to start in the meantime
    threading.Thread(target=importlib.import_module, args=("pandas",), daemon=True).start()
    with _hushed(), _keeping_memory() if private else contextlib.nullcontext():
        ray.init(
            address,
            logging_level=logging.WARNING,
            log_to_driver=False,
            include_dashboard=False,
        )
    _Session.private = private
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in its place


def hush_data() -> None:
    """Have Ray Data raise its errors without logging them too; once it is imported, not before."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def leave(exit_code: int) -> None:
    """End the private session that `connect` has started; a cluster that was joined stays.

    At the interpreter's exit Ray does so too, a second and a half later: it waits for messages that
    are shown nowhere here, and for its autoscaler, which in a private session has nothing to do and
    does not heed SIGTERM.
    Where a run was broken off, a thread may still be within Ray's native code, which does not
    survive a shutdown: the process then ends here, with `exit_code`, and the session ends with it.
    """
    if any(thread.is_alive() for thread in _Session.threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if _Session.private and ray.is_initialized():
        node: Any = ray._private.worker._global_node
        node.kill_monitor(check_alive=False)
        ray.shutdown()
    _Session.private = False


def calls_ray(thread: threading.Thread) -> None:
    """Note a thread that may be within Ray's native code when the process is to end."""
    _Session.threads.append(thread)


def keep_memory() -> dict[str, Any]:
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
    return {"env_vars": {name: os.environ.get(name, value) for name, value in _GLIBC.items()}}


class _Session:
    private = False
    asked: ClassVar[list[PlacementGroup]] = []
    threads: ClassVar[list[threading.Thread]] = []


@contextlib.contextmanager
def _keeping_memory() -> Iterator[None]:
    """Have the processes that are started within it keep what they free."""
    added = {name: value for name, value in _GLIBC.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


_GLIBC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
}
"""In bytes, but for the number of heaps."""


def _address() -> str | None:
    """None for a cluster that is there, and `local` for a session of our own.

    The last `ray start` on a machine leaves its address in a file, also when it was killed, and
    `ray.init` then tries that address for minutes.
    """
    named = os.environ.get("RAY_ADDRESS")
    if named:
        return "local" if named == "local" else None
    last: Any = ray._private.utils.read_ray_address()
    if last is None:
        return "local"
    host, _, port = last.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return None
    except (OSError, ValueError):
        return "local"


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
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


def nodes() -> list[Node]:
    """The live machines, those without resources (a head that takes no work) left out."""
    machines = [node for node in ray.nodes() if node.get("Alive")]
    found = [_node(machine.get("Resources", {}), machine["NodeID"]) for machine in machines]
    return [node for node in found if node.cpus or node.gpus]


def _node(resources: Mapping[str, float], id: str = "") -> Node:
    prefix = "accelerator_type:"
    names = [key[len(prefix) :] for key in resources if key.startswith(prefix)]
    return Node(
        float(resources.get("CPU", 0)),
        float(resources.get("GPU", 0)),
        names[0] if names else None,
        id,
        float(resources.get("object_store_memory", math.inf)),
    )


def is_private() -> bool:
    """Whether the session was started by `connect`: no machine will join it."""
    return _Session.private


def most_nodes() -> list[Node] | None:
    """The machines that an autoscaling cluster may grow to; None where it does not say."""
    told = ray._private.state.state.get_cluster_config()
    if told is not None and told.node_group_configs:
        return [
            _node(group.resources)
            for group in told.node_group_configs
            for _ in range(group.max_count if group.max_count >= 0 else MANY)
        ]
    try:
        with open(os.path.expanduser(LAUNCHED), encoding="utf-8") as file:
            return nodes_of(yaml.safe_load(file))
    except FileNotFoundError:
        return None


def nodes_of(config: Mapping[str, Any]) -> list[Node]:
    """All machines of a cluster launcher's configuration but the head, those with GPUs first.

    Groups of the same machine and different priority stand in for each other, as spot machines and
    those on demand do: the largest of them counts.
    """
    groups: dict[Node, dict[int, int]] = {}
    for name, group in config["available_node_types"].items():
        machine = _node(group.get("resources", {}))
        if name != config["head_node_type"] and machine.cpus + machine.gpus:
            counts = groups.setdefault(machine, {})
            priority = group.get("priority", 0)
            counts[priority] = counts.get(priority, 0) + group["max_workers"]
    found = [node for node, counts in groups.items() for _ in range(max(counts.values()))]
    return sorted(found, key=lambda node: -node.gpus)[: config["max_workers"]]


def ask_for(bundles: Iterable[Mapping[str, float]]) -> None:
    """Ask the autoscaler, where there is one, for machines that hold each of these.

    In place of what was asked for before, and until `give_back`. As reservations that wait: what
    `ray.autoscaler.sdk.request_resources` is told, Ray Data overwrites every 20 s, and it is kept
    when the driver is killed; and of what cannot all be had, none is brought.
    """
    give_back()
    _Session.asked = [placement_group([dict(bundle)]) for bundle in bundles]


def keep_asking(bundles: Sequence[Mapping[str, float]]) -> None:
    """To be called now and then with what is wanted and not there: what has come is let go."""
    waiting = []
    for group in _Session.asked:
        if placement_group_table(group).get("state") == "CREATED":
            remove_placement_group(group)
        else:
            waiting.append(group)
    _Session.asked = waiting
    if len(waiting) != len(bundles):
        ask_for(bundles)


def give_back() -> None:
    """Take back what was asked for, if anything."""
    if ray.is_initialized():
        for group in _Session.asked:
            remove_placement_group(group)
    _Session.asked = []


def fitting(
    fit: Callable[[Sequence[Node]], T],
    wanted: Callable[[Sequence[Node] | None], list[dict[str, float]]],
    seconds: float,
    interruption: Interruption,
    *,
    under_way: bool = False,
) -> Generator[None, None, T]:
    """What `fit` makes of the machines that are there, in steps of half a second.

    Where more may come they are asked for and waited for.

    fit:       of machines; raises ResourcesError where they do not hold what it is about
    wanted:    what to ask for, by the machines that may come; None where that is not known
    seconds:   to wait at most: `scale.wait_seconds`
    under_way: it has fitted before, so that what it lacks was lost, and may be replaced
    Raises ResourcesError when it does not fit and will not, or did not in so long.
    """
    started = said = time.monotonic()
    asked = False
    try:
        while True:
            there = nodes()
            try:
                return fit(there)
            except ResourcesError as error:
                most = None if is_private() else most_nodes()
                if is_private() or (most is None and there and not under_way):
                    raise
                if not asked:
                    if most is not None:
                        fit(most)
                    ask_for(wanted(most))
                    asked = True
                waited = time.monotonic() - started
                if waited > seconds:
                    raise ResourcesError(
                        f"{error} (waited {waited:.0f} s for machines, as scale.wait_seconds says)"
                    ) from None
                if waited < 1 or time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    tell(
                        "waiting",
                        f"for machines: {error} ({waited:.0f} of at most {seconds:.0f} s)",
                    )
            interruption.check()
            time.sleep(0.5)
            yield
    finally:
        if asked:
            give_back()


def fitted(
    fit: Callable[[Sequence[Node]], T],
    wanted: Callable[[Sequence[Node] | None], list[dict[str, float]]],
    seconds: float,
    interruption: Interruption,
) -> T:
    """As `fitting`, waited for."""
    steps = fitting(fit, wanted, seconds, interruption)
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            found: T = ended.value
            return found


def is_alive(actor: Any) -> bool:
    """Whether an actor's process is there, as far as Ray knows."""
    return bool(ray._private.state.actors(actor._actor_id.hex()).get("State") == "ALIVE")


class Patience:
    """How long to wait for what the cluster may have no room for; says that it waits."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._said = 0.0

    def spend(self, waited: float, what: str) -> None:
        """Called often while nothing comes; raises RunFailed when it has taken too long."""
        if waited > self._seconds:
            raise RunFailed(
                f"nothing has come for {waited:.0f} s (scale.wait_seconds) of {what}; {_has()}"
            )
        if waited > IDLE_SECONDS and time.monotonic() - self._said > SAY_SECONDS:
            self._said = time.monotonic()
            tell(
                "waiting",
                f"for {what}, {waited:.0f} of at most {self._seconds:.0f} s; {_has()}",
            )


def _has() -> str:
    there, free = nodes(), ray.available_resources()
    return (
        f"the cluster has {len(there)} machines with {sum(node.cpus for node in there):g} CPUs and "
        f"{sum(node.gpus for node in there):g} GPUs, of which {free.get('CPU', 0):g} and "
        f"{free.get('GPU', 0):g} are free"
    )


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Within it, an error of this package that a task raised comes out as itself."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = cause_of(error)
        if isinstance(cause, ImgclsError):
            words = (str(cause).strip() or "no message").splitlines()[0]
            raise type(cause)(words) from error
        raise


def cause_of(error: ray.exceptions.RayError) -> BaseException:
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

    def ask(self, why: str) -> None:
        """Have `check` raise, for a reason other than a signal."""
        self._why = why

    def check(self) -> None:
        """Raise Interrupted if a signal has come, or it was asked for."""
        if self._why is not None:
            raise Interrupted(f"stopped by {self._why}")

    @contextlib.contextmanager
    def watched(self) -> Iterator[Interruption]:
        """Within it, signals interrupt; outside the main thread they cannot be caught."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._why is None:
            self._why = signal.Signals(number).name
            self.check()


def in_background(items: Iterable[T], interruption: Interruption) -> Iterator[T | None]:
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

    thread = threading.Thread(target=consume, name="consume", daemon=True)
    calls_ray(thread)
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
