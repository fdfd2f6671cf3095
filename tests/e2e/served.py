"""`imgcls serve` in processes of its own, and clients that watch it."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from imgcls.client import Client
from imgcls.config import build
from imgcls.models.bundle import read_description
from imgcls.serving.api_keys import NewKeyConfig, create_key
from tests.processes import REPOSITORY, family, service_port, started, title, wait_for
from tests.serving.app import jpeg, recalibrate


@dataclass
class Served:
    """A running service, and the API keys to it."""

    url: str
    process: subprocess.Popen[str]
    bundle: Path
    keys: Path
    predict: str
    admin: str
    lines: list[str]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def output(self) -> str:
        """Everything that the command has written to stdout."""
        return "".join(self.lines)

    def find_replicas(self) -> list[psutil.Process]:
        return [p for p in family(self.process.pid) if "ServeReplica:imgcls:endpoint" in title(p)]

    def find_process(self, name: str) -> psutil.Process:
        """The only process of Ray Serve that has `name` in its title."""
        (found,) = (p for p in family(self.process.pid) if name in title(p))
        return found

    def client(self, key: str | None = None) -> Client:
        return Client(self.url, key or self.predict)

    def all_use(self, sha256: str) -> bool:
        """Whether both replicas report this bundle."""
        headers = {"Authorization": f"Bearer {self.admin}"}
        text = requests.get(f"{self.url}/metrics", headers=headers, timeout=60).text
        found = re.findall(r'imgcls_model_replicas\{sha256="(\w+)"\} (\S+)', text)
        return {name: float(count) for name, count in found} == {sha256: 2}

    @contextlib.contextmanager
    def restored_bundle(self) -> Iterator[str]:
        """Restore the bundle at the end; yields its hash."""
        before, backup = read_description(str(self.bundle)).sha256, self.bundle.with_name("backup")
        shutil.copytree(self.bundle, backup)
        try:
            yield before
        finally:
            shutil.rmtree(self.bundle)
            backup.rename(self.bundle)
            self.client(self.admin).reload()
            wait_for(lambda: self.all_use(before), 60)


@contextlib.contextmanager
def served(tmp_path: Path, bundle: Path, *options: object, replicas: int = 1) -> Iterator[Served]:
    """Serve a copy of a bundle, with replicas of one logical CPU."""
    copy = tmp_path / "served"
    shutil.copytree(bundle, copy)
    keys = tmp_path / "keys.yaml"
    predict, admin = (
        create_key(build(NewKeyConfig, {"file": str(keys), "name": name, "scopes": [name]}))
        for name in ("predict", "admin")
    )
    port = service_port()
    command = [
        *("serve", "--config", REPOSITORY / "jobs" / "serve.yaml", "--model", copy),
        *("--keys", keys, "--http.port", port, "--replicas", replicas, "--replicas.cpus", 1),
        *("--keys.refresh-interval-s", 0.3, "--replicas.drain-period-s", 0, *options),
    ]
    with started(*command) as process:
        lines: list[str] = []

        def read_lines() -> None:
            for line in process.stdout or ():
                lines.append(line)

        threading.Thread(target=read_lines, daemon=True).start()
        wait_for(
            lambda: any(line.startswith("ready") for line in lines) or process.poll() is not None,
            180,
        )
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        yield Served(f"http://127.0.0.1:{port}", process, copy, keys, predict, admin, lines)


class Traffic:
    """Clients that send one image after another while the block runs.

    models: hashes of the bundles in the responses
    failed: start, end and text of every request without a prediction
    """

    def __init__(self, service: Served, clients: int = 1) -> None:
        self._service = service
        self._stop = threading.Event()
        self.models: list[str] = []
        self.failed: list[tuple[float, float, str]] = []
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count: int, timeout: float = 60) -> None:
        """Wait until `count` more requests are answered."""
        before = len(self.models)
        wait_for(lambda: len(self.models) > before + count, timeout)

    def _send(self) -> None:
        headers = {"X-API-Key": self._service.predict, "Content-Type": "image/jpeg"}
        data = jpeg()
        while not self._stop.is_set():
            started_at, failure = time.monotonic(), ""
            try:
                response = requests.post(
                    f"{self._service.url}/v1/predict", data, headers=headers, timeout=60
                )
                if response.ok:
                    self.models.append(response.json()["model"])
                else:
                    kind = response.headers["Content-Type"]
                    failure = f"{response.status_code} {kind} {response.text}"
            except requests.RequestException as error:
                failure = str(error)
            if failure:
                self.failed.append((started_at, time.monotonic(), failure))


def copy_recalibrated(tmp_path: Path, bundle: Path) -> Path:
    """A copy of a bundle with another hash."""
    copy = tmp_path / "other"
    shutil.copytree(bundle, copy)
    recalibrate(copy)
    return copy
