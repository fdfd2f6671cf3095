"""Workers of Ray as forks of one process that has imported torch.

A worker imports pandas, torch and this package before its first task: 4 of the 5 CPU seconds until
its first prediction, in every worker of every job. Here one process imports them, during the start
of Ray, and each worker of the session is a fork of it, which imports what is left, Ray itself.

Ray starts a worker by `sys.executable`. Within `fork_workers` that is a script: it sends its
arguments, environment and open files to the process that forks, and ends; Ray knows a worker by the
id among the arguments. Where no process answers, the script starts the worker itself, as without
this module.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator
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
"""Not Ray: its native code reads the environment, which differs by worker, when it is imported."""
WORKER, SETUP = "default_worker.py", "setup_worker.py"
SCRIPT = """import json, os, signal, socket, sys
words = sys.argv[1:]
if os.path.basename(words[0]) in ({worker!r}, {setup!r}):
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect({address!r})
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
"""What asks for a fork, in 20 ms."""
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
BACKLOG = 512
"""Requests that may wait while the modules are imported."""


@dataclass(frozen=True)
class WorkerForks:
    """The process that forks the workers of a session, and a folder of its own.

    program: what Ray is to start instead of Python
    """

    process: subprocess.Popen[bytes]
    folder: str
    program: str

    def end(self) -> None:
        """End the process; its forks are not affected, and later workers are started by Ray."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_prepared: list[WorkerForks] = []
"""At most one, that no session uses yet."""


def prepare_forks() -> None:
    """Start what will fork workers, for the private session that this process may start.

    So the modules are imported while the driver plans. To be ended by `discard_forks` if unused.
    """
    ray = sys.modules.get("ray")
    is_joined = ray is not None and ray.is_initialized()
    if not is_joined and os.environ.get("RAY_ADDRESS") in (None, "", "local") and not _prepared:
        forks = start_forks()
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
def fork_workers() -> Iterator[WorkerForks | None]:
    """Within the block, a session of Ray that this process starts will fork its workers.

    Yields what forks them, or None as `start_forks` does.
    """
    forks = _prepared.pop() if _prepared else start_forks()
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


def start_forks() -> WorkerForks | None:
    """Start the process that forks workers; it ends with this process at the latest.

    None where workers are not forked: on other systems than Linux, with GPUs, where it has not been
    tried, and where temporary files cannot be written or run, or have long paths.
    """
    if sys.platform != "linux" or os.path.exists("/dev/nvidiactl"):
        return None
    folder = ""
    try:
        folder = tempfile.mkdtemp(prefix="imgcls-forks-")
        forks = _start_in(folder)
    except OSError:  # Ray reports what it cannot do without
        forks = None
    if forks is None:
        shutil.rmtree(folder, ignore_errors=True)
    return forks


def _start_in(folder: str) -> WorkerForks | None:
    """Start the process with its files in a folder; None if it could not be used from there."""
    python, address, program = sys.executable, f"{folder}/socket", Path(folder, "python")
    script = Path(folder, "request.py")
    script.write_text(
        SCRIPT.format(python=python, worker=WORKER, setup=SETUP, address=address), encoding="utf-8"
    )
    program.write_text(
        f'#!/bin/sh\nexec {shlex.quote(python)} -ISs {shlex.quote(str(script))} "$@"\n',
        encoding="utf-8",
    )
    program.chmod(0o700)
    # no program may be run from some folders
    if len(address) > MAX_ADDRESS or not os.access(program, os.X_OK):
        return None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(BACKLOG)
        words = map(str, (listener.fileno(), os.getpid(), folder, json.dumps(sys.path)))
        process = subprocess.Popen(
            [python, __file__, *words],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the driver
            env=DEFAULTS | os.environ,
        )
    return WorkerForks(process, folder, str(program))


# ---------------------------------------------------------------------- in the process that forks


def main(listener: socket.socket, parent: int, folder: str) -> None:
    """Import the modules and fork a worker per request, until the parent process has ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a worker would copy the pages of all that is imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
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
            if os.fork() == 0:
                break
            for file in files:
                os.close(file)
            with contextlib.suppress(OSError):
                connection.sendall(b"1")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return
    listener.close()
    become_worker(request, files)


def become_worker(request: dict[str, Any], files: list[int]) -> None:
    """Run the script that Ray had started, as it would run in a process of its own."""
    os.setpgid(0, 0)  # Ray kills the group of a worker that has ended
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
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
    sys.path[:] = json.loads(sys.argv[4])
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
