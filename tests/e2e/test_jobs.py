"""The scripts in jobs/, run with `ray job submit` on a real cluster."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from imgcls import demo
from imgcls.models.bundle import load_bundle
from tests.conftest import draw, write_manifest
from tests.e2e.outputs import assert_exactly_once, committed
from tests.processes import ALONE, BIN, REPOSITORY, RayCluster, free_port, started, wait_for

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def head() -> Iterator[RayCluster]:
    with start_job_cluster() as cluster:
        yield cluster


@contextlib.contextmanager
def start_job_cluster() -> Iterator[RayCluster]:
    """A cluster for `ray job submit`, with the `python` of this virtual environment."""
    # Ray's agent, which starts jobs, has one port by default: two clusters would conflict
    port, dashboard, agent, client = (free_port() for _ in range(4))
    folder = tempfile.mkdtemp(prefix="imgcls-ray-", dir="/tmp")
    process = subprocess.Popen(
        [
            str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
            f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}",
            "--include-dashboard=true", "--include-log-monitor=false",
            "--object-store-memory=500000000",
        ],
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    running = RayCluster(f"127.0.0.1:{port}", process, folder, f"http://127.0.0.1:{dashboard}")
    try:
        wait_for(lambda: answers(running) and listens(running, agent))
        yield running
    finally:
        running.kill()
        shutil.rmtree(folder, ignore_errors=True)


def answers(cluster: RayCluster) -> bool:
    try:
        with urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def listens(cluster: RayCluster, port: int) -> bool:
    for process in cluster.workers("DashboardAgent"):
        with contextlib.suppress(psutil.Error):
            if any(found.laddr.port == port for found in process.net_connections()):
                return True
    return False


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the files that runs and installations leave in it.

    Its code prints where it is imported from, because the installed package would work as well.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("jobs", "imgcls", "manifests"):
        shutil.copytree(
            REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", ".gitignore", ".rayignore"):
        shutil.copy(REPOSITORY / name, folder)
    with (folder / "imgcls" / "cli.py").open("a") as module:
        module.write('\nprint("imgcls comes from", __file__, flush=True)\n')
    for place in (".venv/lib", "demo/digits", ".git/objects", "bench-results", "tests"):
        (folder / place).mkdir(parents=True)
        with (folder / place / "large.bin").open("wb") as file:
            file.truncate(600_000_000)  # Ray refuses a working directory above 512 MiB
    return folder


def ray_job(
    cluster: RayCluster, command: str, *arguments: object, folder: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run `ray job COMMAND` in a folder; its log and messages together as stdout."""
    words = ("job", command, "--address", cluster.dashboard, *arguments)
    env = {"RAY_ADDRESS": str(cluster.dashboard)}  # Ray lets it win over --address
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with started(*words, command="ray", env=env) as process:
            out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out + err, "")


def job_info(cluster: RayCluster, submission: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/{submission}") as response:
        found: dict[str, Any] = json.load(response)
        return found


def status(cluster: RayCluster, submission: str) -> str:
    return str(job_info(cluster, submission)["status"])


def submit(
    cluster: RayCluster, checkout: Path, name: str, *entrypoint: object, wait: bool = True
) -> subprocess.CompletedProcess[str]:
    return ray_job(
        cluster,
        "submit",
        *("--working-dir", ".", "--submission-id", name, *(() if wait else ("--no-wait",))),
        *("--", *entrypoint),
        folder=checkout,
    )


@contextlib.contextmanager
def serve_blocked_image() -> Iterator[tuple[str, threading.Event]]:
    """URL of an image that the server sends only after the event is set."""
    release = threading.Event()
    sink = io.BytesIO()
    draw("red").save(sink, "JPEG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            release.wait()
            with contextlib.suppress(OSError):  # the first client was stopped in the meantime
                self.send_response(200)
                self.send_header("Content-Length", str(len(sink.getvalue())))
                self.end_headers()
                self.wfile.write(sink.getvalue())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/held.jpg", release
        finally:
            release.set()
            server.shutdown()


@contextlib.contextmanager
def start_blocked_run(
    folder: Path, bundle: Path, output: Path
) -> Iterator[tuple[tuple[object, ...], threading.Event]]:
    """A predict command for 65 rows; its last chunk is blocked until the event is set."""
    with serve_blocked_image() as (url, release):
        rows = []
        for i in range(64):
            draw("red", seed=i).save(folder / f"{i}.jpg")
            rows.append((f"{i}.jpg", "red"))
        manifest = write_manifest(folder / "m.csv", [*rows, (url, "red")], ("path", "label"))
        command = (
            *("python", "jobs/predict.py", "--config", "jobs/predict.yaml", "--chunk-rows", 8),
            *("--manifest", manifest, "--model", bundle, "--output", output, *ALONE),
        )
        yield command, release


def all_but_the_last(output: Path) -> bool:
    return len(list(output.glob("_staging/part-*/chunk-*"))) == 8


def test_a_wrong_request_fails_the_job_with_the_reason(
    head: RayCluster, checkout: Path, color_bundle: Path, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.csv", [("a.jpg", "red")], ("file", "label"))
    output = tmp_path / "out"
    done = submit(
        *(head, checkout, "wrong", "python", "jobs/predict.py", "--config", "jobs/predict.yaml"),
        *("--manifest", manifest, "--model", color_bundle, "--output", output),
    )
    assert done.returncode == 1, done.stdout
    assert "imgcls predict: manifest" in done.stdout
    assert (
        "no column 'path' (found: file, label); name it with --manifest.path-column" in done.stdout
    )
    assert f"imgcls comes from {head.folder}/" in done.stdout
    assert status(head, "wrong") == "FAILED"
    assert job_info(head, "wrong")["driver_exit_code"] == 2
    assert not output.exists()


def test_a_stopped_job_is_resumed_by_submitting_it_again(
    head: RayCluster, checkout: Path, color_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with start_blocked_run(tmp_path, color_bundle, output) as (command, release):
        first = submit(head, checkout, "first", *command, wait=False)
        assert first.returncode == 0, first.stdout
        wait_for(lambda: all_but_the_last(output), timeout=120)
        stopped = ray_job(head, "stop", "first")
        assert stopped.returncode == 0, stopped.stdout
        assert status(head, "first") == "STOPPED"
        assert not committed(output)
        release.set()
        again = submit(head, checkout, "again", *command)
    assert again.returncode == 0, again.stdout
    assert "64 of 65 rows are done" in again.stdout
    assert f"committed  65 rows: {output}" in again.stdout
    assert status(head, "again") == "SUCCEEDED"
    assert set(assert_exactly_once(output, 65)["status"].to_pylist()) == {"ok"}
    assert not (output / "_lease").exists()


@pytest.mark.cluster
def test_a_job_whose_head_node_is_lost_resumes_on_another_cluster(
    checkout: Path, color_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with start_blocked_run(tmp_path, color_bundle, output) as (command, release):
        with start_job_cluster() as lost:
            first = submit(lost, checkout, "nightly", *command, wait=False)
            assert first.returncode == 0, first.stdout
            wait_for(lambda: all_but_the_last(output), timeout=120)
            lost.kill()
        assert not committed(output)
        release.set()
        with start_job_cluster() as following:
            again = submit(following, checkout, "nightly", *command)
    assert again.returncode == 0, again.stdout
    assert "64 of 65 rows are done" in again.stdout
    assert set(assert_exactly_once(output, 65)["status"].to_pylist()) == {"ok"}


@pytest.mark.cluster
def test_the_search_job_keeps_the_best_bundle(
    head: RayCluster, checkout: Path, tmp_path: Path
) -> None:
    train, _ = demo.write_digits(tmp_path)
    done = submit(
        *(head, checkout, "search", "python", "jobs/tune.py", "--config", "jobs/tune.yaml"),
        *("--data.train", train, "--output", tmp_path / "out", "--epochs", 1),
        *("--model.options.width", 4, "--tune.trials", 2),
    )
    assert done.returncode == 0, done.stdout
    assert status(head, "search") == "SUCCEEDED"
    assert load_bundle(str(tmp_path / "out" / "best")).spec.classes == list("0123456789")


def test_the_training_job_writes_a_bundle(head: RayCluster, checkout: Path, tmp_path: Path) -> None:
    train, _ = demo.write_digits(tmp_path)
    with train.open(newline="") as stream:
        rows = [(row["path"], row["label"]) for row in csv.DictReader(stream)][:100]
    manifest = write_manifest(tmp_path / "few.csv", rows, ("path", "label"))
    done = submit(
        *(head, checkout, "train", "python", "jobs/train.py", "--config", "jobs/train.yaml"),
        *("--data.train", manifest, "--output", tmp_path / "bundle", "--epochs", 1),
        *("--model.options.width", 4, "--scale.num-workers", 1, "--data.cache", "false"),
    )
    assert done.returncode == 0, done.stdout
    assert status(head, "train") == "SUCCEEDED"
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert bundle.spec.classes == [str(digit) for digit in range(10)]
    assert bundle.spec.architecture.options == {"width": 4}
