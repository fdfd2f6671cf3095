"""Checks before Ray starts, and the detection of missing replicas."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from ray.serve.schema import DeploymentStatus

from imgcls.cluster import autoscaler, session
from imgcls.cluster.session import Node
from imgcls.config import build
from imgcls.errors import RequestError
from imgcls.models import openvino_package
from imgcls.serving import serve as serving
from imgcls.serving.config import ServeConfig
from imgcls.serving.serve import has_missing_replicas, serve


@pytest.mark.parametrize(
    ("statuses", "missing"),
    [
        (["HEALTHY", "HEALTHY"], False),
        (["HEALTHY", "UNHEALTHY"], True),
        (["DEPLOY_FAILED", "HEALTHY"], True),
        (["UNHEALTHY", "UPDATING"], True),
        (["UPSCALING", "HEALTHY"], None),  # autoscaling under load
        (["DOWNSCALING", "HEALTHY"], None),
        (["UPDATING", "HEALTHY"], None),
    ],
)
def test_a_change_of_the_number_of_replicas_is_not_a_missing_replica(
    statuses: list[str], missing: bool | None
) -> None:
    assert has_missing_replicas(DeploymentStatus(status) for status in statuses) is missing


def fail(*_: object) -> None:
    raise AssertionError("something was started")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "none"}, "no such file"),
        ({"http": {"host": "0.0.0.0"}}, "accept requests from other machines"),
        ({"keys": "keys.yaml"}, "`imgcls key new --file"),
        (
            {"http": {"certificate": "c.pem", "private_key": "k.pem"}},
            "Pass a PEM file",
        ),
        ({"engine": "openvino"}, r"is not installed; run: pip install 'imgcls\[openvino\]'"),
    ],
)
def test_wrong_settings_are_rejected_before_ray_starts(
    settings: dict[str, object],
    message: str,
    color_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "connect", fail)
    monkeypatch.setattr(openvino_package, "is_openvino_installed", lambda: False)
    monkeypatch.chdir(tmp_path)
    config = build(ServeConfig, {"model": str(color_bundle), **settings})
    with pytest.raises(RequestError, match=message):
        serve(config)


def test_resources_and_the_port_are_checked_before_anything_is_deployed(
    color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "connect", lambda: None)
    monkeypatch.setattr(session, "is_private_session", lambda: True)
    monkeypatch.setattr(session, "list_nodes", lambda: [Node(2, 0)])
    monkeypatch.setattr(autoscaler, "find_max_nodes", lambda: None)
    monkeypatch.setattr(serving.ray_internals, "find_serve_address", lambda: None)
    monkeypatch.setattr(serving, "_set_environment", lambda config: None)
    monkeypatch.setattr(serving.ray_serve, "start", fail)
    settings = {"model": str(color_bundle), "replicas": {"min_replicas": 9, "cpus": 4}}
    with pytest.raises(RequestError, match=r"replicas\.min_replicas 9: each replica needs 4 CPUs"):
        serve(build(ServeConfig, settings))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        settings = {"model": str(color_bundle), "http": {"port": port}}
        with pytest.raises(RequestError, match=f"http.port {port}: Address already in use"):
            serve(build(ServeConfig, settings))
