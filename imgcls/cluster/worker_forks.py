"""Workers of Ray as forks of a process that has imported torch, and for a training Ray, too.

A worker imports pandas, torch, Ray and this package before its first task: nearly all of its CPU
time until its first prediction, in every worker of every job. Here a process imports them once, and
the workers of the session are forks of it.

Ray's native code reads the environment when it is imported, the job of the worker among it. So a
first process imports all but Ray, during the start of Ray. The workers of a training import most,
so a fork of that process imports Ray for them, in the environment of the session's job. A worker
whose environment differs is a fork of the first process and imports Ray itself.

Ray starts a worker by `sys.executable`. Within `fork_workers` that is a script: it sends its
arguments, environment and open files to a process that forks, and ends; Ray knows a worker by the
id among the arguments. Where no process answers, the script starts the worker itself, as without
this module.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMPORTED = (
    "aiohttp",
    "grpc",
    "imgcls.models.classifier",
    "imgcls.training.config",
    "imgcls.training.train_step",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pydantic",
    "s3fs",
    "yaml",
)
"""What does not read the environment of a job."""
RAY_INTERNALS = "imgcls.cluster.ray_internals"
IMPORTED_WITH_RAY = ("imgcls.training.ray_trainer", "torch._dynamo")
"""Every optimizer imports torch's compiler."""
FIRST_JOB = "01000000"
"""RAY_JOB_ID of a session's first job, which is the only one of a private session."""
READ_LATER = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC")
"""Variables of the workers of a training that are read when they are needed, not imported."""
WORKER, SETUP = "default_worker.py", "setup_worker.py"
SCRIPT = """import json, os, signal, socket, sys
words = sys.argv[1:]
is_worker = os.path.basename(words[0]) in ({worker!r}, {setup!r})
for name in [os.environ.get("RAY_JOB_ID", ""), {first!r}] if is_worker else []:
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect({folder!r} + "/" + name)
            socket.send_fds(server, [b"files"], [0, 1, 2])
            request = {{
                "words": words,
                "environment": dict(os.environ),
                "folder": os.getcwd(),
                "niceness": os.getpriority(os.PRIO_PROCESS, 0),
                "blocked": list(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
            }}
            server.sendall(json.dumps(request).encode())
            server.shutdown(socket.SHUT_WR)
            if server.recv(1):
                sys.exit()
    except OSError:
        pass
os.execv({python!r}, [{python!r}, *words])
"""
"""What asks for a fork, in 20 ms: the process with Ray, if the job has one, and then the first."""
FIRST = "first"
"""Name of the socket of the first process; that of the process with Ray is the id of the job."""
MAX_ADDRESS = 107
"""Maximum length of a socket's path in Linux."""
MALLOC_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
}
"""Environment of glibc's allocator: the number of arenas, and two thresholds in bytes."""
DEFAULTS = {"OMP_NUM_THREADS": "1"} | MALLOC_SETTINGS
"""Variables that are read when a process starts. Ray sets the first for a worker with one CPU."""
ROTATION = "RAY_ROTATION_MAX_BYTES"
"""Variable that makes Ray rotate the logs of workers."""
BACKLOG = 512
"""Requests that may wait while the modules are imported."""


@dataclass(frozen=True)
class WorkerForks:
    """The processes that fork the workers of a session, and a folder of their own.

    process: the first of them; the one with Ray is its child, in its process group
    program: what Ray is to start instead of Python
    """

    process: subprocess.Popen[bytes]
    folder: str
    program: str

    def end(self) -> None:
        """End the processes; workers are not affected, and later ones are started by Ray."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_prepared: list[WorkerForks] = []
"""At most one, that no session uses yet."""
_worker: list[int] = []
"""Id of this process, once it is a worker."""


def prepare_forks(*, training: bool) -> None:
    """Start what will fork workers, for the private session that this process may start.

    So the modules are imported while the driver plans. To be ended by `discard_forks` if unused.

    training: whether workers will train
    """
    ray = sys.modules.get("ray")
    is_joined = ray is not None and ray.is_initialized()
    if not is_joined and os.environ.get("RAY_ADDRESS") in (None, "", "local") and not _prepared:
        forks = start_forks(training=training)
        if forks is not None:
            _prepared.append(forks)


def is_prepared() -> bool:
    """Whether `prepare_forks` has started what no session uses yet."""
    return bool(_prepared)


def discard_forks() -> None:
    """End what was prepared and no session uses."""
    while _prepared:
        _prepared.pop().end()


@contextlib.contextmanager
def fork_workers(modules: Sequence[str] = IMPORTED) -> Iterator[WorkerForks | None]:
    """Within the block, a session of Ray that this process starts will fork its workers.

    Yields what forks them, or None as `start_forks` does. It is the one that was prepared or, if
    there is none, one for any work.
    """
    forks = _prepared.pop() if _prepared else start_forks(training=True, modules=modules)
    if forks is None:
        yield None
        return
    importlib.import_module("multiprocessing.spawn")  # keeps the `sys.executable` of its import
    python, sys.executable = sys.executable, forks.program
    try:
        yield forks
    except BaseException:
        forks.end()
        raise
    finally:
        sys.executable = python


def start_forks(*, training: bool, modules: Sequence[str] = IMPORTED) -> WorkerForks | None:
    """Start the processes that fork workers; they end with this process at the latest.

    training: whether workers will train
    modules: what the first process imports; none of them imports Ray

    None where workers are not forked: on other systems than Linux, with GPUs, where it has not been
    tried, and where temporary files cannot be written or run, or have long paths.
    """
    if sys.platform != "linux" or os.path.exists("/dev/nvidiactl"):
        return None
    folder = ""
    try:
        folder = tempfile.mkdtemp(prefix="imgcls-forks-")
        forks = _start_in(folder, training, modules)
    except OSError:  # Ray reports what it cannot do without
        forks = None
    if forks is None:
        shutil.rmtree(folder, ignore_errors=True)
    return forks


def _start_in(folder: str, training: bool, modules: Sequence[str]) -> WorkerForks | None:
    """Start the processes with their files in a folder; None if that cannot be used."""
    python, program, script = sys.executable, Path(folder, "python"), Path(folder, "request.py")
    script.write_text(
        SCRIPT.format(python=python, worker=WORKER, setup=SETUP, folder=folder, first=FIRST),
        encoding="utf-8",
    )
    program.write_text(
        f'#!/bin/sh\nexec {shlex.quote(python)} -ISs {shlex.quote(str(script))} "$@"\n',
        encoding="utf-8",
    )
    program.chmod(0o700)
    # no program may be run from some folders
    if len(f"{folder}/{FIRST_JOB}") > MAX_ADDRESS or not os.access(program, os.X_OK):
        return None
    with listen(folder, FIRST) as listener:
        start = {
            "listener": listener.fileno(),
            "parent": os.getpid(),
            "folder": folder,
            "training": training,
            "modules": list(modules),
            "path": sys.path,
        }
        process = subprocess.Popen(
            [python, __file__, json.dumps(start)],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the driver
            env=DEFAULTS | os.environ,
        )
    return WorkerForks(process, folder, str(program))


def listen(folder: str, name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/{name}")
    listener.listen(BACKLOG)
    return listener


# -------------------------------------------------------------------- in the processes that fork


def run_fork_server(
    listener: socket.socket, parent: int, folder: str, modules: Sequence[str], *, training: bool
) -> None:
    """Import modules, and fork a worker per request until the parent process has ended.

    training: with the first request of a worker, start the process that imports Ray
    """
    atexit.register(leave)  # before all others, so that it runs after them
    gc.disable()
    for name in modules:
        importlib.import_module(name)
    freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    process = os.getpid()
    for connection, request, files in iter_requests(listener, parent):
        fork_worker(listener, connection, request, files)
        environment = read_environment(request)
        if training and environment is not None and Path(request["words"][0]).name == WORKER:
            training = False
            with listen(folder, FIRST_JOB) as with_ray:
                if os.fork() == 0:
                    for file in (listener.detach(), connection.detach(), *files):
                        os.close(file)
                    fork_with_ray(with_ray, process, environment | {"RAY_JOB_ID": FIRST_JOB})
                    sys.exit()
    shutil.rmtree(folder, ignore_errors=True)


def fork_with_ray(listener: socket.socket, parent: int, environment: dict[str, str]) -> None:
    """Import Ray in an environment, and fork a worker per request that has the same."""
    set_environment(environment)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.disable()
    if not importlib.import_module(RAY_INTERNALS).import_for_forks(IMPORTED_WITH_RAY):
        return
    freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for connection, request, files in iter_requests(listener, parent):
        if read_environment(request) == environment:
            fork_worker(listener, connection, request, files)


def freeze() -> None:
    """Leave all objects out of later collections, which would copy the pages that they are on."""
    gc.enable()
    gc.collect()
    gc.freeze()


def iter_requests(
    listener: socket.socket, parent: int
) -> Iterator[tuple[socket.socket, dict[str, Any], list[int]]]:
    """Connections, requests and their open files, until the parent process has ended."""
    while os.getppid() == parent:
        if not select.select([listener], [], [], 1)[0]:
            continue
        connection, _ = listener.accept()
        with connection:
            try:
                _, files, _, _ = socket.recv_fds(connection, len(b"files"), 3)
                with connection.makefile() as stream:
                    request = json.load(stream)
            except (OSError, ValueError):  # the program that asked has ended
                continue
            yield connection, request, files
            for file in files:
                os.close(file)


def fork_worker(
    listener: socket.socket, connection: socket.socket, request: dict[str, Any], files: list[int]
) -> None:
    """Fork a worker and confirm it."""
    worker = os.fork()
    if worker == 0:
        listener.close()
        connection.close()
        become_worker(request, files)
        sys.exit()
    with contextlib.suppress(OSError):
        os.setpgid(worker, worker)  # before the group of this process can be killed
    with contextlib.suppress(OSError):
        connection.sendall(b"1")


def read_environment(request: dict[str, Any]) -> dict[str, str] | None:
    """The environment that a worker imports Ray in; None if Ray itself is to prepare it."""
    environment, words = request["environment"], request["words"]
    if Path(words[0]).name == SETUP:
        try:
            variables, (script, *_) = read_setup(words[1:])
        except (AttributeError, TypeError, ValueError):  # the worker reports it
            return None
        if variables is None or Path(script).name != WORKER:
            return None
        environment = environment | variables
    return {name: value for name, value in environment.items() if name not in READ_LATER}


def set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def become_worker(request: dict[str, Any], files: list[int]) -> None:
    """Run the script that Ray had started, as it would run in a process of its own."""
    _worker.append(os.getpid())
    os.setpgid(0, 0)  # Ray kills the group of a worker that has ended
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.chdir(request["folder"])
    set_environment(request["environment"])
    os.setpriority(os.PRIO_PROCESS, 0, request["niceness"])
    random.seed()
    importlib.import_module("numpy").random.seed()
    sys.argv = request["words"]
    if Path(sys.argv[0]).name == SETUP:
        environment, command = read_setup(sys.argv[1:])
        if environment is None or Path(command[0]).name != WORKER:
            os.execv(sys.executable, [sys.executable, *sys.argv])
        os.environ.update(environment)
        sys.argv = command
    runpy.run_path(sys.argv[0], run_name="__main__")


def leave() -> None:
    """The last exit handler of a worker: free nothing of what it shares with other forks.

    Freeing would copy it first: a third of the CPU time of a short training's workers. The exit
    status, which Ray does not read, is 0.
    """
    # where Ray rotates logs, a thread of this process writes them until it ends as usual
    if _worker != [os.getpid()] or ROTATION in os.environ:
        return
    for stream in filter(None, (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    ctypes.CDLL(None).fflush(None)
    os._exit(0)


def read_setup(words: list[str]) -> tuple[dict[str, str] | None, list[str]]:
    """The environment that `setup_worker.py` is to set, and the worker's command.

    None in place of an environment that sets more than variables: Ray itself prepares that one.
    """
    settings: dict[str, Any] = {}
    command = []
    for word in words:
        name, _, value = word.partition("=")
        if name == "--serialized-runtime-env-context":
            settings = json.loads(value)
        elif name != "--language":
            command.append(word)
    environment: dict[str, str] = settings.pop("env_vars", {})
    others = {name for name, value in settings.items() if value} - {"py_executable"}
    is_simple = (
        not others
        and settings.get("py_executable") in (None, sys.executable)
        and not any("$" in value for value in environment.values())
    )
    return (environment if is_simple else None), command


if __name__ == "__main__":
    start = json.loads(sys.argv[1])
    sys.path[:] = start["path"]
    run_fork_server(
        socket.socket(fileno=start["listener"]),
        start["parent"],
        start["folder"],
        start["modules"],
        training=start["training"],
    )
