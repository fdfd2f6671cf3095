"""Services that keep running on a cluster: changes, failed changes, Serve config files."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ray.serve.schema import ServeDeploySchema

from imgcls.config import build
from imgcls.models.bundle import read_description
from imgcls.serving import proxy_middleware
from imgcls.serving.api_keys import NewKeyConfig, create_key
from imgcls.serving.config import ServeConfig
from tests.e2e.served import copy_recalibrated
from tests.e2e.test_jobs import start_job_cluster
from tests.processes import REPOSITORY, RayCluster, imgcls, service_port, started, wait_for
from tests.serving.app import announce_body, jpeg, recalibrate

pytestmark = pytest.mark.timeout(600)


def read_hash(bundle: Path) -> str:
    return read_description(str(bundle)).sha256


@pytest.mark.cluster
def test_a_detached_service_survives_changes_that_fail(color_bundle: Path, tmp_path: Path) -> None:
    port = service_port()
    url = f"http://127.0.0.1:{port}"
    bundle = tmp_path / "bundle"
    shutil.copytree(color_bundle, bundle)
    other = copy_recalibrated(tmp_path, bundle)
    damaged = tmp_path / "damaged"
    shutil.copytree(other, damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    key = create_key(
        build(
            NewKeyConfig,
            {"file": f"{tmp_path}/keys.yaml", "name": "me", "scopes": ["predict", "admin"]},
        )
    )
    headers = {"X-API-Key": key}

    def command(model: str = "bundle") -> list[object]:
        # relative paths: Ray's own processes have another working directory
        return [
            *("serve", "--model", model, "--keys", "keys.yaml", "--http.port", port),
            *("--replicas", 1, "--detach"),
        ]

    def change(model: str = "bundle") -> None:
        done = imgcls(*command(model), env=cluster.environment(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "ready" in done.stdout
        assert served_model() == read_hash(tmp_path / model)

    def served_model() -> str:
        response = requests.get(f"{url}/v1/model", headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        return str(response.json()["sha256"])

    def is_serving() -> bool:
        """Ray replaces a replica that was suspended for 30 s, so a slow machine may see a 503."""
        return requests.get(f"{url}/v1/model", headers=headers, timeout=60).status_code == 200

    environment = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": proxy_middleware.CALLBACK_PATH,
        **proxy_middleware.build_environment(1 << 20, 8 << 20),
    }
    with RayCluster.start(cpus=2, env=environment) as cluster:
        change("other")
        # the limits of the cluster's proxy hold for requests without a key
        assert announce_body(port, 2 << 20).startswith("http/1.1 413 ")

        options = ("--http.request-timeout-s", 60)
        done = imgcls(*command(), *options, env=cluster.environment(), cwd=tmp_path)
        assert done.returncode == 2
        assert "Ray Serve already runs with http.request_timeout_s 120.0 on this" in done.stderr

        done = imgcls(*command("damaged"), env=cluster.environment(), cwd=tmp_path)
        assert done.returncode == 2
        assert served_model() == read_hash(other)
        change()

        original = (bundle / "model.safetensors").read_bytes()
        (bundle / "model.safetensors").write_bytes(b"damaged")
        before = served_model()
        requests.post(f"{url}/v1/model/reload", headers=headers, timeout=30).raise_for_status()
        time.sleep(3)
        assert served_model() == before
        # an error of a previous bundle at the same path is not reported for the next one
        (bundle / "model.safetensors").write_bytes(original)
        recalibrate(bundle)
        change()
        assert served_model() != before

        before = served_model()
        recalibrate(bundle)
        (replica,) = cluster.workers("ServeReplica:imgcls:endpoint")
        replica.suspend()
        try:
            with started(*command(), env=cluster.environment(), cwd=tmp_path) as process:
                assert process.stdout is not None
                assert process.stdout.readline().startswith("layout")
                time.sleep(4)
                process.send_signal(signal.SIGINT)
                assert process.wait(60) != 0
        finally:
            replica.resume()
        wait_for(is_serving, 90)
        assert served_model() in (before, read_hash(bundle))
        response = requests.post(f"{url}/v1/predict", jpeg(), headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        change()
        assert served_model() != before


# ---------------------------------------------------------------------- Serve config files


def write_deploy_file(tmp_path: Path, port: int, **args: object) -> Path:
    """The shipped serve.yaml with another port and other args."""
    body: dict[str, Any] = yaml.safe_load((REPOSITORY / "serve.yaml").read_text())
    body["http_options"]["port"] = port
    body["applications"][0]["args"].update(args)
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(body))
    return file


def test_the_shipped_serve_file_is_valid() -> None:
    body = yaml.safe_load((REPOSITORY / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(body)
    (application,) = schema.applications
    build(ServeConfig, application.args)
    assert schema.http_options.host == "127.0.0.1"


@pytest.mark.cluster
def test_serve_deploy_starts_a_service_and_applies_a_change(
    color_bundle: Path, tmp_path: Path
) -> None:
    other = copy_recalibrated(tmp_path, color_bundle)
    port = service_port()
    url = f"http://127.0.0.1:{port}"

    def served_model() -> str | None:
        with contextlib.suppress(requests.RequestException, ValueError, KeyError):
            return str(requests.get(f"{url}/v1/model", timeout=5).json()["sha256"])
        return None

    def deploy(cluster: RayCluster, bundle: Path) -> None:
        file = write_deploy_file(tmp_path, port, model=str(bundle), replicas={"min_replicas": 1})
        env = {"RAY_DASHBOARD_ADDRESS": str(cluster.dashboard), "PYTHONPATH": str(REPOSITORY)}
        with started("deploy", file, command="serve", env=env) as process:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err

    with start_job_cluster() as cluster:
        deploy(cluster, color_bundle)
        wait_for(lambda: served_model() == read_hash(color_bundle), 180)
        deploy(cluster, other)
        wait_for(lambda: served_model() == read_hash(other), 120)
