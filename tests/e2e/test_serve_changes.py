"""A service that is left on a cluster, and what becomes of it when changes go wrong."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
import requests

from imgcls.config import build
from imgcls.models.bundle import read_description
from imgcls.serving import proxy_middleware
from imgcls.serving.api_keys import NewKeyConfig, create_key
from tests.processes import RayCluster, imgcls, service_port, started, wait_for
from tests.serving.app import recalibrate
from tests.serving.test_api import jpeg
from tests.serving.test_proxy_middleware import announced

pytestmark = [pytest.mark.timeout(600), pytest.mark.cluster]


def test_a_change_that_goes_wrong_takes_nothing_down(colour_bundle: Path, tmp_path: Path) -> None:
    port = service_port()
    url = f"http://127.0.0.1:{port}"
    bundle = tmp_path / "bundle"
    shutil.copytree(colour_bundle, bundle)
    key = create_key(
        build(
            NewKeyConfig,
            {"file": f"{tmp_path}/keys.yaml", "name": "me", "scopes": ["predict", "admin"]},
        )
    )
    headers = {"X-API-Key": key}
    # paths as they are typed: Ray's own processes have another working directory
    command = (
        *("serve", "--model", "bundle", "--keys", "keys.yaml", "--http.port", port),
        *("--replicas.min_replicas", 1, "--detach"),
    )

    def change() -> None:
        done = imgcls(*command, env=cluster.environment(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert model() == read_description(str(bundle)).sha256

    def model() -> str:
        response = requests.get(f"{url}/v1/model", headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        return str(response.json()["sha256"])

    gated = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": proxy_middleware.CALLBACK_PATH,
        **proxy_middleware.build_environment(1 << 20, 8 << 20),
    }
    with RayCluster.start(cpus=2, env=gated) as cluster:
        change()
        # the gate of a cluster is before its service: it asks for no key
        assert announced(port, 2 << 20).startswith("http/1.1 413 ")

        whole = (bundle / "model.safetensors").read_bytes()
        (bundle / "model.safetensors").write_bytes(b"damaged")
        before = model()
        requests.post(f"{url}/v1/model/reload", headers=headers, timeout=30).raise_for_status()
        time.sleep(3)
        assert model() == before
        # what went wrong with another bundle says nothing of this one, in the same place
        (bundle / "model.safetensors").write_bytes(whole)
        recalibrate(bundle)
        change()
        assert model() != before

        before = model()
        recalibrate(bundle)
        (replica,) = cluster.workers("ServeReplica:imgcls:endpoint")
        replica.suspend()
        try:
            with started(*command, env=cluster.environment(), cwd=tmp_path) as process:
                assert process.stdout is not None
                assert process.stdout.readline().startswith("layout")
                time.sleep(4)
                process.send_signal(signal.SIGINT)
                assert process.wait(60) != 0
        finally:
            replica.resume()
        wait_for(lambda: model() in (before, read_description(str(bundle)).sha256), 60)
        response = requests.post(f"{url}/v1/predict", jpeg(), headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        change()
        assert model() != before
