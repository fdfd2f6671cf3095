"""Throughput of `imgcls serve`, compared with the classifier alone and with a plain endpoint.

    python -m benchmarks.serving [--clients 64] [--seconds 60] [--model resnet18] [--repeats 3]

Clients in a separate process send photographs, each the next one when it has its response. Measures
in turn: `Classifier.predict` in one process over batches of 16, `imgcls serve` with either HTTP
proxy, and a plain FastAPI application with torch, one forward pass per request in FastAPI's thread
pool. Prints images per second, the ratio to the classifier alone, latencies, statuses, batch sizes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import read_cpu
from benchmarks.processes import run_alone
from benchmarks.workloads import SAMPLE, make_bundle, photographs

CLIENTS, SECONDS = 64, 60
WARM_S = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        serve_plain(options.plain, options.port)
        return
    print(f"CPU: {read_cpu()}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        bundle = make_bundle(Path(name), options.model)
        files = [str(file) for file in photographs(SAMPLE)]
        rates: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            alone = measure_classifier(str(bundle), files, options.seconds)
            add_rate(rates, "Classifier alone, batches of 16, one process", alone)
            for proxy in ("python", "haproxy"):
                with imgcls(bundle, proxy) as port:
                    measured = measure_clients(port, files, options)
                    add_rate(rates, f"imgcls serve, proxy {proxy}", measured["rate"])
                    print_latencies(measured, read_batch_sizes(port))
            with run_plain(options.model) as port:
                measured = measure_clients(port, files, options)
                add_rate(rates, "FastAPI + torch, one pass per request", measured["rate"])
                print_latencies(measured, None)
        first = statistics.median(rates["Classifier alone, batches of 16, one process"])
        print(f"\nmedians of {options.repeats}, {options.clients} clients, {options.model}")
        for name, values in rates.items():
            median = statistics.median(values)
            print(f"  {name:<46} {median:7.1f} images/s  {median / first:5.0%}")


def add_rate(rates: dict[str, list[float]], name: str, rate: float) -> None:
    rates.setdefault(name, []).append(rate)
    print(f"{name:<46} {rate:7.1f} images/s", flush=True)


def print_latencies(measured: dict[str, Any], batch: str | None) -> None:
    print(
        f"    p50 {measured['p50']:.0f} ms  p99 {measured['p99']:.0f} ms  "
        f"statuses {measured['statuses']}"
        + (f"  images per forward pass {batch}" if batch else ""),
        flush=True,
    )


# ---------------------------------------------------------------------- measured systems


def measure_classifier(bundle: str, files: list[str], seconds: float) -> float:
    """Throughput of the classifier alone, in one process that may use all cores."""
    return run_alone(_measure_classifier, bundle, files, seconds)


def _measure_classifier(bundle: str, files: list[str], seconds: float) -> float:
    from imgcls.models.classifier import Classifier

    classifier = Classifier.load(bundle)
    blobs = [Path(file).read_bytes() for file in files]
    classifier.predict(blobs[:16])
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = done % (len(blobs) - 16)
        done += len(classifier.predict(blobs[start : start + 16]))
    return done / (time.perf_counter() - began)


@contextlib.contextmanager
def imgcls(bundle: Path, proxy: str) -> Iterator[int]:
    port = free_port()
    command = [
        *(sys.executable, "-m", "imgcls.cli", "serve", "--model", str(bundle)),
        *("--http.port", str(port), "--http.proxy", proxy, "--replicas.drain-period-s", "0"),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until_ready(f"http://127.0.0.1:{port}/readyz")
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


@contextlib.contextmanager
def run_plain(model: str) -> Iterator[int]:
    port = free_port()
    command = [
        *(sys.executable, "-m", "benchmarks.serving"),
        *("--plain", model, "--port", str(port)),
    ]
    with subprocess.Popen(command) as process:
        try:
            until_ready(f"http://127.0.0.1:{port}/readyz")
            yield port
        finally:
            process.terminate()
            process.wait(30)


def serve_plain(model: str, port: int) -> None:
    """An endpoint as in tutorials: one request, one Pillow image, one forward pass."""
    import io

    import torch
    import torchvision
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from PIL import Image
    from torchvision import transforms

    network = torchvision.models.get_model(model, weights=None, num_classes=1000).eval()
    prepare = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    app = FastAPI()

    def label(data: bytes) -> dict[str, Any]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        with torch.inference_mode():
            scores = network(prepare(image)[None]).softmax(1)[0]
        values, places = scores.topk(5)
        return {"labels": places.tolist(), "scores": values.tolist()}

    async def predict(request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(label, await request.body())

    # FastAPI cannot resolve a name that is local to this function
    predict.__annotations__["request"] = Request
    app.post("/v1/predict")(predict)

    @app.get("/readyz")
    async def readyz() -> Response:
        return Response("ok")

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


# ---------------------------------------------------------------------- the clients


def measure_clients(port: int, files: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure for `options.seconds`, after a warm-up, with clients in another process."""
    return run_alone(_measure_clients, port, files, options.clients, options.seconds)


def _measure_clients(port: int, files: list[str], clients: int, seconds: float) -> dict[str, Any]:
    requests = []
    for file in files:
        data = Path(file).read_bytes()
        head = (
            "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        requests.append(head.encode() + data)
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    begun = time.perf_counter() + WARM_S
    end = begun + seconds

    class Client(asyncio.Protocol):
        """Sends a photograph, waits for the response, sends the next."""

        def __init__(self, number: int) -> None:
            self.place = number
            self.gone = asyncio.get_running_loop().create_future()

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport
            self.send()

        def send(self) -> None:
            self.sent, self.answer = time.perf_counter(), b""
            if self.sent >= end:
                self.transport.close()
                return
            self.transport.write(requests[self.place % len(requests)])
            self.place += clients

        def data_received(self, data: bytes) -> None:
            self.answer += data
            head, found, body = self.answer.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            if not found or len(body) < int(length[1] if length else 0):
                return
            self.count(head[9:12].decode())
            self.send()

        def count(self, status: str) -> None:
            got = time.perf_counter()
            if self.sent >= begun and got < end:
                latencies.append(got - self.sent)
                statuses[status] += 1

        def connection_lost(self, error: Exception | None) -> None:
            if self.sent < end:
                self.count("closed")
            self.gone.set_result(None)

    async def run() -> None:
        loop = asyncio.get_running_loop()

        async def client(number: int) -> None:
            while time.perf_counter() < end:
                _, one = await loop.create_connection(lambda: Client(number), "127.0.0.1", port)
                await one.gone

        await asyncio.gather(*(client(number) for number in range(clients)))

    asyncio.run(run())
    latencies.sort()
    return {
        "rate": statuses["200"] / seconds,
        "p50": 1000 * latencies[len(latencies) // 2],
        "p99": 1000 * latencies[int(len(latencies) * 0.99)],
        "statuses": dict(statuses),
    }


def read_batch_sizes(port: int) -> str:
    """Number of forward passes by batch size, from the metrics of the service."""
    time.sleep(2)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    found = re.findall(r'imgcls_batch_images_bucket\{le="([\d.]+)"\} ([\d.e+]+)', text)
    sizes, before = {}, 0.0
    for size, count in found:
        if float(count) > before:
            sizes[f"<={float(size):g}"] = int(float(count) - before)
        before = float(count)
    return json.dumps(sizes)


def until_ready(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise TimeoutError(f"{url} does not answer")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
