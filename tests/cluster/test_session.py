"""The Ray session of a job: joined, started, ended, and its errors."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.data

from imgcls.cluster import ray_internals, session
from imgcls.cluster.ray_data import own_data_settings
from imgcls.cluster.session import (
    _Session,
    build_malloc_env,
    check_reachable,
    is_private_session,
    unwrap_ray_errors,
)
from imgcls.errors import RequestError, RunFailed, StorageCredentials
from tests.conftest import draw
from tests.processes import RayCluster
from tests.processes import imgcls as run_imgcls


def faults_of_a_batch() -> int:
    """Page faults while a thread uses 256 MB again and again, as a network does.

    The fewest of four times: the kernel may take pages back in between.
    """
    import resource
    import threading

    import numpy as np

    counted: list[int] = []

    def use() -> None:
        np.ones(1 << 28, np.uint8)
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            np.ones(1 << 28, np.uint8)
            counted.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return min(counted)


class AddOne:
    """A worker of a dataset."""

    def __call__(self, batch: Any) -> Any:
        return {"id": batch["id"] + 1}


def add_one() -> list[int]:
    """The rows of a dataset that an actor has processed."""
    with own_data_settings():
        pool = ray.data.ActorPoolStrategy(size=1)
        dataset = ray.data.range(3).map_batches(AddOne, compute=pool, num_cpus=0.5)
    return sorted(row["id"] for row in dataset.take_all())


def refuse(batch: Any) -> Any:
    raise StorageCredentials("s3://b/x: access is refused") from KeyError("x")


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_gone_is_named(scheme: str, closed_port: int) -> None:
    address = f"{scheme}127.0.0.1:{closed_port}"
    message = rf"^RAY_ADDRESS={address}: no Ray cluster answers at .* \(Connection refused\)"
    with pytest.raises(RunFailed, match=message) as caught:
        check_reachable(address)
    assert caught.value.exit_code == 1  # it may be back later


def test_a_port_that_does_not_answer_is_no_cluster(
    silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_CONNECT_TIMEOUT_S", 1)
    with pytest.raises(RunFailed, match="the port is open, but no Ray server answered in 1 s"):
        check_reachable(f"127.0.0.1:{silent_port}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("head", "is not an address"),
        ("head:port", "is not an address"),
        ("http://head:8265", "is the address of a dashboard"),
    ],
)
def test_what_cannot_be_an_address_is_a_wrong_request(address: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"^RAY_ADDRESS={address}: {message}") as caught:
        check_reachable(address)
    assert caught.value.exit_code == 2


def test_a_name_without_an_address_is_no_cluster() -> None:
    with pytest.raises(RunFailed, match=r"no Ray cluster answers at no-such-host\.invalid:6379"):
        check_reachable("no-such-host.invalid:6379")


def test_a_cluster_that_is_there_is_reached(joined: None) -> None:
    check_reachable(ray.get_runtime_context().gcs_address)


def test_a_command_ends_when_its_cluster_is_gone(
    closed_port: int, color_bundle: Path, tmp_path: Path
) -> None:
    draw("red").save(tmp_path / "red.png")
    done = run_imgcls(
        "predict", "--manifest", tmp_path, "--model", color_bundle, "--output", tmp_path / "out",
        env={"RAY_ADDRESS": f"127.0.0.1:{closed_port}"},
    )  # fmt: skip
    assert done.returncode == 1
    assert f"no Ray cluster answers at 127.0.0.1:{closed_port}" in done.stderr
    assert not (tmp_path / "out" / "_run.json").exists()


def test_an_error_of_ours_comes_through_what_ray_wraps_around_it(joined: None) -> None:
    task: Any = ray.remote(max_retries=0)(refuse)
    with (
        pytest.raises(StorageCredentials, match=r"^s3://b/x: access is refused$"),
        unwrap_ray_errors(),
    ):
        ray.get(task.remote(None))
    with own_data_settings():
        dataset = ray.data.range(1).map_batches(refuse)
    with (
        pytest.raises(StorageCredentials, match=r"^s3://b/x: access is refused$"),
        unwrap_ray_errors(),
    ):
        dataset.materialize()


class Failing:
    """An actor whose creation fails after another error, which is in the traceback, too."""

    def __init__(self, error: Exception) -> None:
        try:
            raise RunFailed("the first one")
        except RunFailed as first:
            raise error from first

    def answer(self) -> None: ...


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RequestError("no bfloat16 here; use fp32"), RequestError, "no bfloat16 here; use fp32"),
        (StorageCredentials("gone\nand more"), StorageCredentials, "gone\nand more"),
        (ValueError("odd"), RunFailed, "a worker failed while it started: ValueError: odd"),
    ],
)
def test_an_error_in_the_creation_of_a_worker_comes_through(
    joined: None, error: Exception, kind: type[Exception], text: str
) -> None:
    actor: Any = ray.remote(Failing).remote(error)
    with pytest.raises(ray.exceptions.ActorDiedError) as caught:
        ray.get(actor.answer.remote())
    cause = session.find_cause(caught.value)
    assert (type(cause), str(cause)) == (kind, text)


def test_a_killed_worker_has_no_error_of_ours(joined: None) -> None:
    actor: Any = ray.remote(Killed).remote()
    with pytest.raises(ray.exceptions.RayActorError) as caught:
        ray.get(actor.end.remote())
    assert session.find_cause(caught.value) is caught.value


class Killed:
    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_session_that_does_not_start_in_time_is_a_failure_with_a_remedy() -> None:
    assert ray_internals.SLOW_START in inspect.getsource(ray._private.node)
    with (
        pytest.raises(RunFailed, match=r"did not start .* Rerun the same command"),
        ray_internals.report_slow_start(),
    ):
        raise Exception(f"{ray_internals.SLOW_START}. This could happen")
    with pytest.raises(ValueError, match="other"), ray_internals.report_slow_start():
        raise ValueError("other")


def test_only_the_session_that_was_started_as_a_private_one_is_private(
    joined: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Session, "private_address", None)
    assert not is_private_session()
    monkeypatch.setattr(_Session, "private_address", "127.0.0.1:1")  # one that was shut down
    assert not is_private_session()
    monkeypatch.setattr(_Session, "private_address", ray.get_runtime_context().gcs_address)
    assert is_private_session()


def test_the_settings_of_workers_keep_what_a_batch_frees_for_the_next(
    cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = build_malloc_env()["env_vars"]
    script = f"{inspect.getsource(faults_of_a_batch)}\nprint(faults_of_a_batch())"
    kept, others = (
        int(subprocess.check_output([sys.executable, "-c", script], env=os.environ | each))
        for each in (settings, {})
    )
    assert kept < 100 < others
    with cluster.joined():
        task: Any = ray.remote(lambda: dict(os.environ))
        given = ray.get(task.options(runtime_env=build_malloc_env()).remote())
    assert given.items() >= settings.items()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert build_malloc_env()["env_vars"]["MALLOC_ARENA_MAX"] == "8"


@pytest.mark.slow
def test_a_worker_keeps_what_a_batch_frees_for_the_next() -> None:
    task: Any = ray.remote(faults_of_a_batch)
    with RayCluster.start(cpus=1) as cluster, cluster.joined():  # forks have the settings anyway
        kept = ray.get(task.options(runtime_env=build_malloc_env()).remote())
        assert kept < 100 < ray.get(task.remote())


PRIVATE = """
import os, psutil, ray
from imgcls.cluster import session
from tests.cluster.test_session import add_one, faults_of_a_batch
before = dict(os.environ)
session.connect()
assert dict(os.environ).items() >= before.items() and "MALLOC_ARENA_MAX" not in os.environ
assert session.build_malloc_env() == {}
assert ray.get(ray.remote(faults_of_a_batch).remote()) < 100
assert add_one() == add_one() == [1, 2, 3]
assert ray.util.list_named_actors(all_namespaces=True) == []
started = psutil.Process().children(recursive=True)
assert len(started) > 3
commands = [" ".join(process.cmdline()) for process in started]
assert not [each for each in commands if "dashboard.py" in each or "monitor.py" in each]
(raylet,) = [each for each in commands if each.split()[0].endswith("/raylet")]
assert "--listen-port=0 " in raylet and "--minimal" not in raylet
session.end_session(0)
assert not ray.is_initialized()
_, left = psutil.wait_procs(started, timeout=60)
assert not left
session.end_session(0)
"""


JOINED = """
import ray
from imgcls.cluster import session
from tests.cluster.test_session import add_one
ray.init()
session.connect()
assert add_one() == [1, 2, 3]
names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
assert {"AutoscalingCoordinator", "ActorLocationTracker"} < names
session.end_session(0)
assert ray.is_initialized()
"""


BROKEN_OFF = """
import time, psutil, ray
from imgcls.cluster import interrupts, session
session.connect()
started = [p.pid for p in psutil.Process().children() if p.name() in ("raylet", "gcs_server")]
def results():
    yield "first"
    ray.get(ray.remote(lambda: time.sleep(600)).remote())
interruption = interrupts.Interruption()
for _ in interrupts.iterate_in_thread(results(), interruption):
    break
print(*started, flush=True)
session.end_session(7)
print("not reached")
"""


def test_a_run_that_is_broken_off_ends_with_a_thread_of_its_own_still_in_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_OFF],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RAY_ADDRESS": "local"},
    )
    assert done.returncode == 7, done.stderr
    (servers,) = done.stdout.splitlines()
    left = [psutil.Process(int(pid)) for pid in servers.split() if psutil.pid_exists(int(pid))]
    assert psutil.wait_procs(left, timeout=30)[1] == []


@pytest.mark.parametrize("script", [PRIVATE, JOINED])
def test_a_private_session_is_our_own_to_set_up_and_to_end(
    script: str, cluster: RayCluster
) -> None:
    address = "local" if script == PRIVATE else cluster.address
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
