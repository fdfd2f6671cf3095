"""The HTTP application in this process, behind a real server on a local port."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import uvicorn

from imgcls import config as configuration
from imgcls.cluster.session import DeviceType
from imgcls.models.bundle import load_bundle, load_bundle_weights, save_bundle
from imgcls.serving.api import build_app
from imgcls.serving.api_keys import Keyring
from imgcls.serving.auth import AccessControl
from imgcls.serving.config import ServeConfig
from imgcls.serving.labeling.labeling import open_in_replica
from imgcls.serving.metrics import MetricTotals, ReplicaMetrics
from imgcls.serving.rate_limit import LocalAllowance, TokenBuckets
from imgcls.serving.service import ServedModel, Service
from tests.conftest import draw
from tests.processes import free_port, wait_for


@dataclass
class Running:
    """A running server: as Ray Serve runs it, but with one replica, in this process."""

    url: str
    port: int
    service: Service
    loop: asyncio.AbstractEventLoop
    reloads: int = 0

    async def request_reload(self) -> int:
        self.reloads += 1
        return self.reloads

    async def render_metrics(self) -> bytes:
        totals = MetricTotals()
        totals.report("this", self.service.metrics.collect_samples())
        return totals.render()


@contextlib.contextmanager
def serving(bundle: Path, device: DeviceType = "cpu", **settings: Any) -> Iterator[Running]:
    """Serve a bundle.

    settings: dotted keys of `imgcls serve`, with `__` in place of the dot
    """
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    config = configuration.build(ServeConfig, {"model": str(bundle), **dotted})
    buckets = TokenBuckets()

    async def take(
        name: str, per_second: float, needed: int, prefetch: float, held: float
    ) -> tuple[float, float]:
        return buckets.take(name, per_second, needed, prefetch, held)

    keyring = Keyring(config.keys.file) if config.keys.is_configured() else None
    is_multilabel = load_bundle(str(bundle)).spec.task == "multilabel"
    labeling = open_in_replica(config.labeling, several=is_multilabel)
    port = free_port()
    is_created = threading.Event()
    running: list[Running] = []
    servers: list[uvicorn.Server] = []

    async def run() -> None:
        service = Service(
            config, ServedModel.load(config, device), ReplicaMetrics(), decoders=1, device=device
        )
        access = AccessControl(keyring, LocalAllowance(take), config.http.cors_origins)
        this = Running(f"http://127.0.0.1:{port}", port, service, asyncio.get_running_loop())
        server = uvicorn.Server(
            uvicorn.Config(
                build_app(service, access, this, config, labeling),
                port=port,
                lifespan="off",
                log_level="warning",
                access_log=False,
            )
        )
        running.append(this)
        servers.append(server)
        is_created.set()
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert is_created.wait(60)
    wait_for(lambda: servers[0].started, 30, 0.02)
    try:
        yield running[0]
    finally:
        servers[0].should_exit = True
        thread.join(30)


def recalibrate(bundle: Path) -> None:
    """Change the temperature of a bundle, and with it its hash."""
    spec = load_bundle(str(bundle)).spec
    rewrite_bundle(bundle, temperature=spec.temperature * 2)


def rewrite_bundle(bundle: Path, **changes: object) -> None:
    """Change fields of a bundle's description, valid or not."""
    loaded = load_bundle(str(bundle))
    save_bundle(str(bundle), loaded.spec.model_copy(update=changes), load_bundle_weights(loaded))


def jpeg(name: str = "red", seed: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    """The bytes of a JPEG whose color is its class."""
    sink = io.BytesIO()
    draw(name, size, seed).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces its size, and is otherwise a kilobyte of nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed)


def post(running: Running, data: bytes, **options: Any) -> requests.Response:
    """Send the bytes of one image."""
    headers = {"Content-Type": "image/jpeg", **options.pop("headers", {})}
    url = f"{running.url}/v1/predict"
    return requests.post(url, data, headers=headers, timeout=60, **options)


def assert_problem(response: requests.Response, status: int, kind: str) -> dict[str, Any]:
    """Check that a response is a problem of this kind; returns its body."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["type"] == f"urn:imgcls:problem:{kind}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem


def announce_body(port: int, size: int) -> str:
    """Send the headers of a request with a body of `size` bytes; returns the response's headers."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size
        )
        return read_head(connection)


def read_head(connection: socket.socket) -> str:
    """The headers of a response, in lower case."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in received and (more := connection.recv(65536)):
            received += more
    return received.decode().lower()


if __name__ == "__main__":
    with serving(Path(sys.argv[1])) as served:
        print(served.url, flush=True)
        sys.stdin.read()
