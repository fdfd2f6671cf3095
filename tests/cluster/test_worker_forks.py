"""Workers of a private session are forks of one process, and otherwise as Ray starts them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from imgcls.cluster.worker_forks import (
    FIRST_JOB,
    ROTATION,
    SETUP,
    WORKER,
    WorkerForks,
    fork_workers,
    read_setup,
)
from tests.processes import REPOSITORY, wait_for

DESCRIBE = """
import json, os, random, signal, sys
import numpy as np
about = {
    "words": sys.argv, "name": __name__, "folder": os.getcwd(), "environment": dict(os.environ),
    "niceness": os.getpriority(os.PRIO_PROCESS, 0), "group": os.getpgid(0) == os.getpid(),
    "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
    "torch": "torch" in sys.modules, "ray": "ray" in sys.modules, "parent": os.getppid(),
    "drawn": [random.random(), np.random.random()],
}
if about["ray"]:
    import ray
    about["drawn"].append(ray.UniqueID.from_random().hex())
print(json.dumps(about), flush=True)
"""

JOB = {"RAY_JOB_ID": FIRST_JOB, "RAY_RAYLET_PID": "7", "PATH": os.environ["PATH"]}
"""Environment of the workers of a job."""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerForks, str]]:
    """What has forked a worker without a job, and the program that Ray would start others by."""
    python = sys.executable
    with fork_workers() as forks:
        assert forks is not None
        program = sys.executable
    assert sys.executable == python != program
    try:
        first = describe(
            program, tmp_path_factory.mktemp("first"), env=JOB | {"RAY_JOB_ID": "f" * 8}
        )
        assert (first["parent"], first["ray"]) == (forks.process.pid, False)
        yield forks, program
    finally:
        forks.end()
    assert not Path(forks.folder).exists()


def run_worker(
    program: str, folder: Path, source: str, *words: str, script: str = WORKER, **options: Any
) -> str:
    """The output of a worker that is started by a program, which is read until it ends."""
    (folder / WORKER).write_text(source)
    command = [program, str(folder / script), *words]
    options = {"cwd": folder.parent, **options}
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, **options).stdout


def describe(program: str, folder: Path, *words: str, script: str = WORKER, **options: Any) -> Any:
    """What a worker sees that is started by a program."""
    return json.loads(run_worker(program, folder, DESCRIBE, *words, script=script, **options))


def test_a_worker_is_a_fork_with_arguments_environment_and_signals_of_its_own(
    started: tuple[WorkerForks, str], tmp_path: Path
) -> None:
    forks, program = started
    about = describe(
        program,
        tmp_path,
        "--worker-id=1",
        env=JOB,
        preexec_fn=lambda: (os.nice(3), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})),
    )
    assert psutil.Process(about["parent"]).ppid() == forks.process.pid
    assert about["torch"]
    assert about["words"] == [str(tmp_path / WORKER), "--worker-id=1"]
    assert about["name"] == "__main__"
    assert about["folder"] == str(tmp_path.parent)
    assert about["environment"].items() >= {"RAY_RAYLET_PID": "7"}.items()
    assert "RAY_AUTH_MODE" not in about["environment"]
    assert about["niceness"] == os.getpriority(os.PRIO_PROCESS, 0) + 3
    assert about["blocked"] == [signal.SIGINT]
    assert about["group"], "Ray kills the process group of a worker that has ended"
    others = [describe(program, tmp_path, env=JOB) for _ in range(2)]
    assert {other["parent"] for other in others} == {about["parent"]}
    drawn = [*about["drawn"], *(draw for other in others for draw in other["drawn"])]
    assert len({*drawn, random.random(), np.random.random()}) == 11


def test_a_worker_ends_with_its_output_and_exit_handlers_but_frees_nothing(
    started: tuple[WorkerForks, str], tmp_path: Path
) -> None:
    """To free what it shares with other forks, it would copy that first."""
    source = (
        "import atexit, weakref\n"
        "class Kept:\n"
        "    def __del__(self): print('freed', flush=True)\n"
        "kept = Kept()\n"
        "weakref.finalize(kept, print, 'finalized')\n"
        "atexit.register(lambda: print('handled'))\n"
        "print('done')\n"
    )
    _, program = started
    out = run_worker(program, tmp_path, source, env=JOB)
    assert out.split() == ["done", "handled", "finalized"]
    out = run_worker(program, tmp_path, source, env=JOB | {ROTATION: "1000"})
    assert out.split()[:3] == ["done", "handled", "finalized"]
    assert out.split()[3:] == ["freed"], "Ray needs the usual end"


def test_a_process_that_a_worker_forks_ends_as_usual(
    started: tuple[WorkerForks, str], tmp_path: Path
) -> None:
    source = (
        "import os, sys\n"
        "child = os.fork()\n"
        "if child == 0: sys.exit(3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert run_worker(started[1], tmp_path, source, env=JOB) == "3\n"


def test_ray_is_imported_in_the_environment_of_the_job(
    started: tuple[WorkerForks, str], tmp_path: Path
) -> None:
    """Its native code would keep what it has read in another environment."""
    forks, program = started
    alike = describe(program, tmp_path, env=JOB | {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"})
    assert alike["ray"]
    assert alike["environment"]["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] == "0"
    for environment in (
        JOB | {"RAY_JOB_ID": "02000000"},
        JOB | {"RAY_JOB_ID": "ffffffff"},
        JOB | {"RAY_object_timeout_milliseconds": "3"},
    ):
        other = describe(program, tmp_path, env=environment)
        assert other["parent"] == forks.process.pid
        assert other["torch"]
        assert not other["ray"]
        assert len(other["drawn"]) == 2


def test_a_process_of_which_forks_would_draw_the_same_ids_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "drawing.py").write_text("import ray; ray.UniqueID.from_random()")
    (tmp_path / "defining.py").write_text("import ray\n@ray.remote\nclass Actor: pass")
    script = (
        "from imgcls.cluster.ray_internals import import_for_forks\n"
        "print(import_for_forks(['defining', 'defining']), import_for_forks(['drawing']))\n"
        "import defining\n"
        "print(len(defining.Actor.__ray_metadata__.class_id.binary()))"
    )
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout.split() == ["True", "False", "28"]


def test_variables_of_a_runtime_environment_are_set(
    started: tuple[WorkerForks, str], tmp_path: Path
) -> None:
    forks, program = started
    (tmp_path / SETUP).write_text("raise SystemExit('not to be run')")
    settings = json.dumps({"env_vars": {"A": "1"}, "py_executable": sys.executable})
    words = [str(tmp_path / WORKER), "--language=PYTHON", "--runtime-env-hash=5"]
    context = f"--serialized-runtime-env-context={settings}"
    about = describe(program, tmp_path, *words, context, script=SETUP, env=JOB)
    assert about["parent"] == forks.process.pid, "its environment is not that of the job"
    same = {name: value for name, value in JOB.items() if name != "RAY_RAYLET_PID"}
    context = context.replace('"A": "1"', '"RAY_RAYLET_PID": "7"')
    alike = describe(program, tmp_path, *words, context, script=SETUP, env=same)
    assert alike["ray"]
    assert psutil.Process(alike["parent"]).ppid() == forks.process.pid
    assert about["environment"]["A"] == "1"
    assert about["words"] == [str(tmp_path / WORKER), "--runtime-env-hash=5"]


def test_a_module_that_is_set_up_as_a_worker_is_started_by_ray(
    started: tuple[WorkerForks, str], tmp_path: Path
) -> None:
    """The server of Ray's clients: `setup_worker.py -m ray.util.client.server`."""
    _, program = started
    (tmp_path / SETUP).write_text(DESCRIBE)
    about = describe(program, tmp_path, "-m", "module", "--language=PYTHON", script=SETUP)
    assert about["words"] == [str(tmp_path / SETUP), "-m", "module", "--language=PYTHON"]
    assert not about["torch"]


@pytest.mark.parametrize(
    "settings",
    [
        {"command_prefix": ["nice"]},
        {"py_executable": "/usr/bin/other"},
        {"override_worker_entrypoint": "worker.py"},
        {"env_vars": {"PATH": "/bin:${PATH}"}},
    ],
)
def test_other_runtime_environments_are_left_to_ray(settings: dict[str, Any]) -> None:
    words = [WORKER, f"--serialized-runtime-env-context={json.dumps(settings)}"]
    assert read_setup(words) == (None, [WORKER])


def test_other_programs_run_as_by_python(started: tuple[WorkerForks, str], tmp_path: Path) -> None:
    _, program = started
    script = tmp_path / "agent.py"
    script.write_text("import sys; print(sys.executable, *sys.argv[1:])")
    done = subprocess.run([program, "-u", script, "x"], capture_output=True, check=True, text=True)
    assert done.stdout.split() == [sys.executable, "x"]


def test_workers_start_when_nothing_forks_them_any_more(tmp_path: Path) -> None:
    with fork_workers() as forks:
        assert forks is not None
        program = sys.executable
    forks.process.kill()
    forks.process.wait()
    try:
        about = describe(program, tmp_path)
        assert not about["torch"]
        assert about["parent"] == os.getpid()
    finally:
        forks.end()


@pytest.mark.parametrize("name", ["missing", "long" * 30])
def test_without_a_folder_for_a_socket_ray_starts_the_workers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    if name != "missing":
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    python = sys.executable
    with fork_workers() as forks:
        assert forks is None
        assert sys.executable == python
    assert not folder.exists() or not list(folder.iterdir())


def test_the_forking_process_ends_with_its_parent() -> None:
    script = (
        "import os; from imgcls.cluster.worker_forks import fork_workers\n"
        "with fork_workers() as forks: print(forks.process.pid, forks.folder, flush=True)\n"
        "os._exit(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        check=False,
        text=True,
        cwd=REPOSITORY,
    )
    pid, folder = done.stdout.split()
    wait_for(lambda: not psutil.pid_exists(int(pid)), 60)
    assert not Path(folder).exists()


SESSION = """
import os, sys, time
import psutil
from imgcls.cluster.worker_forks import READ_LATER, discard_forks, prepare_forks

def read_command(process):
    # empty for a moment while a process begins to execute its program
    while not (words := process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    return " ".join(words)

def list_forking():
    return [p.pid for p in psutil.Process().children() if "worker_forks" in read_command(p)]

os.environ["RAY_ADDRESS"] = "127.0.0.1:6379"
prepare_forks(training=True)
assert not list_forking(), "a session that is joined starts its workers itself"
os.environ["RAY_ADDRESS"] = "local"  # other tests may have a cluster on this machine
prepare_forks(training=True)
prepare_forks(training=True)
(unused,) = list_forking()
discard_forks()
assert not list_forking()
prepare_forks(training=True)
(prepared,) = list_forking()

import ray
from imgcls.cluster import session
session.connect()
discard_forks()  # it is used

@ray.remote
def describe():
    parent, this = psutil.Process(os.getppid()), psutil.Process()
    return parent.pid, this.cmdline()[0], "torch" in sys.modules

parent, title, torch = ray.get(describe.remote())
assert list_forking() == [prepared]
# the process with Ray forks a worker that Ray starts a little later than its first one
assert prepared in (parent, psutil.Process(parent).ppid())
assert title.startswith("ray::"), title
assert torch

@ray.remote(runtime_env={"env_vars": dict.fromkeys(READ_LATER, "1")})
class OfTraining:
    def describe(self):
        parent = psutil.Process(os.getppid())
        return parent.pid, parent.ppid(), [os.environ[name] for name in READ_LATER]

with_ray, first, values = ray.get(OfTraining.remote().describe.remote())
assert with_ray != first == prepared, "Ray is imported once for the workers of a training"
assert values == ["1"] * len(READ_LATER)
prepare_forks(training=True)
assert list_forking() == [prepared], "this process has a session"
session.end_session(0)
assert not list_forking()
print("as expected")
"""


def test_a_private_session_forks_its_workers() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        capture_output=True,
        check=False,
        text=True,
        env=environment,
    )
    assert done.stdout.strip() == "as expected", done.stderr
