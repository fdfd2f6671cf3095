"""The HTTP application in this process, behind a real server on a real port."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from imgcls import config as configuration
from imgcls.models.bundle import load_bundle, load_bundle_weights, save_bundle
from imgcls.serving.api import build_app
from imgcls.serving.api_keys import Keyring
from imgcls.serving.auth import AccessControl
from imgcls.serving.config import ServeConfig
from imgcls.serving.metrics import MetricTotals, ReplicaMetrics
from imgcls.serving.rate_limit import LocalAllowance, TokenBuckets
from imgcls.serving.service import ServedModel, Service
from tests.processes import free_port, wait_for


@dataclass
class Running:
    """A server under way. Beside Ray Serve, what it lacks is several replicas."""

    url: str
    port: int
    service: Service
    door: AccessControl
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
def serving(bundle: Path, **settings: Any) -> Iterator[Running]:
    """Serve a bundle; settings as dotted keys, `__` for the dot."""
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    config = configuration.build(ServeConfig, {"model": str(bundle), **dotted})
    purse = TokenBuckets()

    async def take(name: str, per_second: float, need: int, ahead: float) -> tuple[float, float]:
        return purse.take(name, per_second, need, ahead)

    ring = Keyring(config.keys.file) if config.keys.is_configured() else None
    port = free_port()
    began = threading.Event()
    running: list[Running] = []
    servers: list[uvicorn.Server] = []

    async def run() -> None:
        service = Service(config, ServedModel.load(config), ReplicaMetrics(), decoders=1)
        door = AccessControl(ring, LocalAllowance(take), None, config.http.cors_origins)  # type: ignore[arg-type]
        url, loop = f"http://127.0.0.1:{port}", asyncio.get_running_loop()
        mine = Running(url, port, service, door, loop)
        door.control = mine
        app = build_app(service, door, config)
        server = uvicorn.Server(
            uvicorn.Config(app, port=port, lifespan="off", log_level="warning", access_log=False)
        )
        running.append(mine)
        servers.append(server)
        began.set()
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert began.wait(60)
    wait_for(lambda: servers[0].started, 30)
    try:
        yield running[0]
    finally:
        servers[0].should_exit = True
        thread.join(30)


def recalibrate(bundle: Path) -> None:
    """Give a bundle another temperature, and with it another hash."""
    spec = load_bundle(str(bundle)).spec
    saved_anew(bundle, temperature=spec.temperature * 2)


def saved_anew(bundle: Path, **changes: object) -> None:
    """Change what a bundle says of its network, whether or not that can be."""
    loaded = load_bundle(str(bundle))
    save_bundle(str(bundle), loaded.spec.model_copy(update=changes), load_bundle_weights(loaded))


if __name__ == "__main__":
    with serving(Path(sys.argv[1])) as served:
        print(served.url, flush=True)
        sys.stdin.read()
