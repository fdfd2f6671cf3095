"""Real processes for end-to-end tests: a Ray cluster, imgcls commands, and their certain end.

Everything started here is remembered by process id and killed by it, so that a failed test leaves
no Ray session behind and touches no other.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import psutil

from imgcls import cli
from imgcls.cluster.worker_forks import MALLOC_SETTINGS
from tests.forked_commands import ForkedCommand, can_fork

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parent.parent
FORKING = """
import sys
from imgcls.cluster.worker_forks import IMPORTED, fork_workers
from ray.scripts.scripts import main
sys.argv[0] = "ray"
with fork_workers([*IMPORTED, "torch._dynamo"]):
    main()
"""
"""A program that is `ray` whose workers are forked, also those of later trainings."""
REPORTS = {"REPORTER_UPDATE_INTERVAL_MS": "60000"}
"""Ray's agent examines all processes of its node every 5 s by default: 2 % of a core."""
Command: TypeAlias = subprocess.Popen[str] | ForkedCommand
ALONE = ("--scale.workers", 1)
"""For runs that need no second worker: the number changes no row, and each costs 4 s of a core."""


@dataclass
class RayCluster:
    """A head node started by `ray start --block`, and all that it starts."""

    address: str
    process: subprocess.Popen[bytes]
    folder: str
    dashboard: str | None = None

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        cpus: int,
        gpus: int = 0,
        *,
        dashboard: bool = False,
        fork: bool = False,
        env: dict[str, str] | None = None,
    ) -> Iterator[RayCluster]:
        """Start a head node.

        fork: fork the workers, as in a private session of `imgcls`
        """
        # Ray's socket paths must stay below 107 characters, so not pytest's own folder
        folder = tempfile.mkdtemp(prefix="imgcls-ray-", dir="/tmp")
        port, dashboard_port = free_port(), free_port()
        program = [sys.executable, "-c", FORKING] if fork else [str(BIN / "ray")]
        command = [
            *program, "start", "--head", "--block", "--disable-usage-stats",
            f"--port={port}", f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--temp-dir={folder}",
            f"--include-dashboard={'true' if dashboard else 'false'}", "--no-monitor",
            "--include-log-monitor=false",
            f"--dashboard-port={dashboard_port}", "--object-store-memory=500000000",
        ]  # fmt: skip
        # so that the workers of labeling have the environment of all others
        settings = MALLOC_SETTINGS if fork else {}
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **REPORTS, **settings, **(env or {})},
        )
        running = cls(f"127.0.0.1:{port}", process, folder)
        running.dashboard = f"http://127.0.0.1:{dashboard_port}" if dashboard else None
        try:
            running._wait(port)
            yield running
        finally:
            running.kill()
            shutil.rmtree(folder, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        return {"RAY_ADDRESS": self.address}

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Within the block, this process is a driver of the cluster; `run_here` works on it.

        Its workers serve all jobs of the block: they import torch once, not once per command. A
        cluster that the process had joined before is left meanwhile.
        """
        import ray

        earlier = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
        ray.shutdown()
        ray.init(self.address, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
            if earlier is not None:
                ray.init(earlier, log_to_driver=False)

    def workers(self, name: str) -> list[psutil.Process]:
        """Processes of this cluster whose title has `name` in it."""
        return [p for p in family(self.process.pid) if name in title(p)]

    def kill(self) -> None:
        """SIGKILL to every process of the cluster, once: its process id may be another's later."""
        if self.process.returncode is not None:
            return
        kill_family(self.process.pid)
        self.process.wait()

    def _wait(self, port: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.2)
        raise TimeoutError("the Ray head did not start")


@contextlib.contextmanager
def machine(
    cluster: RayCluster, cpus: int, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """One more node of a cluster, that it knows of; killed in the end, if it was not before."""
    command = [
        *(str(BIN / "ray"), "start", "--block", "--disable-usage-stats"),
        *(f"--address={cluster.address}", f"--num-cpus={cpus}"),
        *("--object-store-memory=200000000", "--include-log-monitor=false"),
    ]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
        try:
            wait_for(lambda: b"Ray runtime started" in os.pread(output.fileno(), 1 << 16, 0), 60)
            yield process
        finally:
            kill_family(process.pid)
            process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def service_port() -> int:
    """A free port that no connection is given: else Ray's processes may take it meanwhile."""
    while True:
        port = random.randint(15_000, 29_000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    return []


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def kill_family(pid: int) -> None:
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def imgcls(
    *arguments: object,
    env: dict[str, str] | None = None,
    timeout: float = 240,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the `imgcls` command to its end; its whole family is gone afterwards."""
    with started(*arguments, env=env, cwd=cwd) as process:
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an `imgcls` command in this process to its end.

    Not for a run that is to fail midway: it ends its process if a thread is still inside Ray.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def started(
    *arguments: object,
    env: dict[str, str] | None = None,
    command: str = "imgcls",
    cwd: Path | None = None,
    start_new_session: bool = False,
) -> Iterator[Command]:
    """An `imgcls` command under way.

    start_new_session: in a process group of its own, which can then be signaled as a whole
    """
    words = [str(BIN / command), *map(str, arguments)]
    env = {**os.environ, "RAY_ADDRESS": "local", "PYTHONFAULTHANDLER": "1", **(env or {})}
    if command == "imgcls" and can_fork(env):
        process: Command = ForkedCommand(words, cwd, env, start_new_session)
    else:
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            start_new_session=start_new_session,
            env=env,
        )
    children: list[psutil.Process] = []
    try:
        yield process
    finally:
        children = family(process.pid)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], timeout: float = 60, every: float = 0.2) -> None:
    """Poll until the condition holds; TimeoutError when it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come to hold")
        time.sleep(every)
