"""Commands as forks of a process that has imported what they import, which takes seconds.

A command is a process of its own as always: with its arguments, environment, folder, open files,
signals and exit. `ForkedCommand` is to a test what `subprocess.Popen` is.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from imgcls.cluster.worker_forks import IMPORTED, freeze, iter_requests

IMPORTED_WITH_RAY = ("imgcls.cli", "imgcls.inference.predict", "imgcls.execution.pipeline",
                     "imgcls.training.train")  # fmt: skip
READ_AT_START = ("LD_", "MALLOC_", "MKL_", "OMP_", "ONEDNN_", "PYTHON", "RAY_")
"""Beginnings of variables that are read when a process starts, or by imports."""
READ_LATER = {"PYTHONFAULTHANDLER", "PYTHONUNBUFFERED", "RAY_ADDRESS"}


class ForkedCommand:
    """A command under way, with its output as text."""

    def __init__(self, args: list[str], cwd: Path | None, env: dict[str, str], new_session: bool):
        request = {"args": args, "cwd": str(cwd or Path.cwd()), "env": env, "session": new_session}
        self.args = args
        self.returncode: int | None = None
        self._answers = socket.socket(socket.AF_UNIX)
        self._answers.connect(_start_server().address)
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        socket.send_fds(self._answers, [b"files"], [their_out, their_err])
        self._answers.sendall(json.dumps(request).encode())
        self._answers.shutdown(socket.SHUT_WR)
        os.close(their_out)
        os.close(their_err)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self._lines = self._answers.makefile()
        self.pid = int(self._lines.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self._lines.readline()))
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        read: dict[TextIO, str] = {}
        streams = (self.stdout, self.stderr)
        threads = [
            threading.Thread(target=lambda s=stream: read.update({s: s.read()}), daemon=True)
            for stream in streams
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return read[self.stdout], read[self.stderr]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def can_fork(env: dict[str, str]) -> bool:
    """Whether a fork can have this environment: all that was read before is as it was."""
    first = _start_server().environment
    names = {name for name in {*env, *first} if name.startswith(READ_AT_START)}
    return all(env.get(name) == first.get(name) for name in names - READ_LATER)


@dataclass(frozen=True)
class _Server:
    process: subprocess.Popen[bytes]
    address: str
    environment: dict[str, str]


@functools.cache
def _start_server() -> _Server:
    """Start the process that forks commands until this one ends."""
    address = f"{tempfile.mkdtemp(prefix='imgcls-commands-', dir='/tmp')}/socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno()), str(os.getpid())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # as those of the commands are
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    return _Server(process, address, dict(os.environ))


# -------------------------------------------------------------------- in the process that forks


def run_server(listener: socket.socket, parent: int) -> None:
    """Fork a command per request, and for each a process that waits for its end."""
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    ray_internals = importlib.import_module("imgcls.cluster.ray_internals")
    assert ray_internals.import_for_forks(IMPORTED_WITH_RAY)
    freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for connection, request, files in iter_requests(listener, parent):
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            command = os.fork()
            if command == 0:
                connection.close()
                run_command(request, files)
                sys.exit()
            for file in files:
                os.close(file)
            connection.sendall(f"{command}\n".encode())
            _, status = os.waitpid(command, 0)
            with contextlib.suppress(OSError):  # the test has ended
                connection.sendall(f"{status}\n".encode())
            os._exit(0)
    shutil.rmtree(Path(listener.getsockname()).parent)


def run_command(request: dict[str, Any], files: list[int]) -> None:
    if request["session"]:
        os.setsid()
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if "PYTHONFAULTHANDLER" in os.environ:
        faulthandler.enable()
    if "PYTHONUNBUFFERED" in os.environ:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.argv = request["args"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run_server(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
