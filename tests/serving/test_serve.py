"""Checks before Ray starts, and the detection of missing replicas."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import HTTPOptions
from ray.serve.schema import DeploymentStatus

from imgcls.cluster import autoscaler, session
from imgcls.cluster.session import Node
from imgcls.config import build
from imgcls.errors import RequestError, ResourcesError
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
    monkeypatch.setattr(serving.ray_internals, "find_serve_options", lambda: None)
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


# ---------------------------------------------------------------------- TLS


def write_certificate(folder: Path, name: str, password: str | None = None) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    files = folder / f"{name}.crt", folder / f"{name}.key"
    protection = ["-nodes"] if password is None else ["-passout", f"pass:{password}"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "1", "-subj", "/CN=localhost",
         *protection, "-out", str(files[0]), "-keyout", str(files[1])],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


def test_a_certificate_that_the_proxies_cannot_load_is_refused_before_ray_starts(
    color_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "connect", fail)
    good, key = write_certificate(tmp_path, "good")
    _, other_key = write_certificate(tmp_path, "other")
    locked, locked_key = write_certificate(tmp_path, "locked", password="secret")
    damaged = tmp_path / "damaged.crt"
    damaged.write_text("no PEM\n")
    for certificate, private_key, message in (
        (damaged, key, f"^http.certificate {damaged}: .* is not a valid PEM file"),
        (good, damaged, f"^http.certificate {good}: .* is not a valid PEM file"),
        (good, other_key, f"http.private_key {other_key} is the key of another certificate"),
        (locked, locked_key, f"^http.private_key {locked_key}: is encrypted with a password"),
        (good, key, "something was started"),
    ):
        tls = {"certificate": str(certificate), "private_key": str(private_key)}
        config = build(ServeConfig, {"model": str(color_bundle), "http": tls})
        with pytest.raises((RequestError, AssertionError), match=message):
            serve(config)


# ---------------------------------------------------------------------- on a running Ray Serve


@pytest.mark.parametrize(
    ("running", "wanted", "message"),
    [
        (
            {},
            {"certificate": "/c.pem", "private_key": "/k.pem"},
            "http.certificate /c.pem: Ray Serve already runs without http.certificate on this "
            "cluster. Omit http.certificate, or stop it with `serve shutdown`",
        ),
        (
            {"ssl_certfile": "/c.pem", "ssl_keyfile": "/k.pem"},
            {},
            "http.certificate none: Ray Serve already runs with http.certificate /c.pem on this "
            "cluster. Pass --http.certificate /c.pem, or stop it with `serve shutdown`",
        ),
        (
            {"ssl_certfile": "/c.pem", "ssl_keyfile": "/k.pem"},
            {"certificate": "/c.pem", "private_key": "/other.pem"},
            "http.private_key /other.pem: Ray Serve already runs with http.private_key /k.pem on "
            "this cluster. Pass --http.private-key /k.pem, or stop it with `serve shutdown`",
        ),
        (
            {},
            {"request_timeout_s": 5},
            "http.request_timeout_s 5.0: Ray Serve already runs with http.request_timeout_s 120.0 "
            "on this cluster. Pass --http.request-timeout-s 120.0, or stop it with `serve "
            "shutdown`",
        ),
        (
            {"port": 8001},
            {},
            "http: Ray Serve already listens on 127.0.0.1:8001 on this cluster. Pass --http.host "
            "127.0.0.1 --http.port 8001, or stop it with `serve shutdown`",
        ),
    ],
)
def test_settings_that_running_proxies_do_not_have_are_refused(
    running: dict[str, Any],
    wanted: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = HTTPOptions(**{"request_timeout_s": 120.0, **running})
    monkeypatch.setattr(serving.ray_internals, "find_serve_options", lambda: options)
    monkeypatch.setattr(serving.ray_serve, "start", fail)
    with pytest.raises(RequestError) as caught:
        serving._start_proxies(build(ServeConfig, {"model": "b", "http": wanted}))
    assert str(caught.value) == message


def test_proxies_without_a_timeout_are_used_and_the_difference_is_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[HTTPOptions] = []
    monkeypatch.setattr(serving.ray_internals, "find_serve_options", HTTPOptions)
    monkeypatch.setattr(
        serving.ray_serve, "start", lambda http_options, **_: started.append(http_options)
    )
    serving._start_proxies(build(ServeConfig, {"model": "b"}))
    assert len(started) == 1
    assert "http.request_timeout_s 120 has no effect" in capsys.readouterr().out


@pytest.mark.parametrize("was_running", [False, True])
def test_a_first_start_that_times_out_leaves_no_application_on_the_cluster(
    was_running: bool, color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_out(*_: object) -> None:
        raise ResourcesError("not all replicas have loaded the model within 300 s")

    deleted: list[str] = []
    applications = {serving.APPLICATION: None} if was_running else {}
    monkeypatch.setattr(session, "connect", lambda: None)
    monkeypatch.setattr(session, "is_private_session", lambda: False)
    monkeypatch.setattr(session, "list_nodes", lambda: [Node(2, 0)])
    monkeypatch.setattr(autoscaler, "find_max_nodes", lambda: None)
    monkeypatch.setattr(serving, "_set_environment", lambda config: None)
    monkeypatch.setattr(serving, "_start_proxies", lambda config: None)
    monkeypatch.setattr(serving, "build_application", lambda *_: None)
    monkeypatch.setattr(serving, "_wait_for_replicas", time_out)
    monkeypatch.setattr(serving.ray_serve, "run", lambda *_, **__: None)
    monkeypatch.setattr(
        serving.ray_serve, "status", lambda: SimpleNamespace(applications=applications)
    )
    monkeypatch.setattr(serving.ray_serve, "delete", deleted.append)
    with pytest.raises(ResourcesError, match="within 300 s"):
        serve(build(ServeConfig, {"model": str(color_bundle), "detach": True}))
    assert deleted == ([] if was_running else [serving.APPLICATION])
