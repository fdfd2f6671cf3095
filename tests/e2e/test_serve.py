"""`imgcls serve` on Ray Serve in processes of its own: HTTP, keys, reloads, crashes, signals."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import requests

from imgcls.client import Client, ServiceError
from imgcls.config import build
from imgcls.models.bundle import load_bundle, read_description
from imgcls.serving import page
from imgcls.serving.api_keys import NewKeyConfig, create_key
from tests.conftest import draw, write_manifest
from tests.e2e.served import Served, Traffic, served
from tests.processes import ALONE, family, run_here, wait_for
from tests.serving.app import announce_body, jpeg, recalibrate, rewrite_bundle
from tests.serving.labeling.queues import draw_queue, read_submissions, read_table

pytestmark = pytest.mark.timeout(600)

COLUMNS = [
    *("predicted_label", "confidence", "accepted", "topk_labels", "topk_scores"),
    *("width", "height", "status", "error"),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, color_bundle: Path) -> Iterator[Served]:
    """A service with two replicas, shared by the tests of this module; the last one stops it."""
    folder = tmp_path_factory.mktemp("serve")
    options = (
        *("--limits.body-bytes", 16 << 20, "--replicas.drain-period-s", 3),
        *("--labeling.manifest", draw_queue(folder / "queue", 20)),
        *("--labeling.output", folder / "labels"),
    )
    with served(folder, color_bundle, *options, replicas=2) as running:
        yield running


def predict_in_batch(
    tmp_path: Path, bundle: Path, manifest: Path, columns: Sequence[str] = COLUMNS
) -> list[dict[str, Any]]:
    """The rows of a batch job."""
    output = tmp_path / "labels"
    done = run_here(
        *("predict", "--manifest", manifest, "--model", bundle, "--output", output),
        *("--max-error-rate", 1, *ALONE),
    )
    assert done.returncode == 0, done.stderr
    table = pq.read_table(output / "predictions")
    rows: list[dict[str, Any]] = table.sort_by("row").select(["path", *columns]).to_pylist()
    return rows


def assert_same_rows(client: Client, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Send each image alone: the response has the same text and the same bits as the row."""
    for row in rows:
        data = (folder / row.pop("path")).read_bytes()
        if row["status"] == "ok":
            (found,) = client.predict(data)
            assert {name: found[name] for name in COLUMNS} == row
        else:
            with pytest.raises(ServiceError) as caught:
                client.predict(data)
            assert caught.value.kind == row["status"]
            assert row["error"] in str(caught.value)


def test_the_service_and_the_batch_job_agree_bit_for_bit(
    joined: None, service: Served, tmp_path: Path
) -> None:
    rows = []
    for i in range(20):
        draw(("red", "green", "blue")[i % 3], (80 + i, 60), i).save(tmp_path / f"{i}.jpg")
        rows.append((f"{i}.jpg",))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:700])
    (tmp_path / "text.jpg").write_text("no image")
    manifest = write_manifest(tmp_path / "m.csv", [*rows, ("cut.jpg",), ("text.jpg",)], ("path",))
    expected = predict_in_batch(tmp_path, service.bundle, manifest)
    with service.client() as client:
        assert_same_rows(client, tmp_path, expected)


@pytest.mark.slow
def test_real_photographs_get_the_rows_of_the_batch_job(
    joined: None, shared: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "squeezenet"
    done = run_here(
        *("model", "import", "--arch", "squeezenet1_0", "--output", bundle),
        *("--weights", shared / "weights" / "squeezenet1_0-imagenet.pth"),
        *("--classes", shared / "weights" / "imagenet-classes.txt"),
    )
    assert done.returncode == 0, done.stderr
    folder = shared / "data" / "imagenet-sample"
    rows = predict_in_batch(tmp_path, bundle, folder / "manifest.csv")
    assert len(rows) == 334
    with served(tmp_path, bundle) as running, running.client() as client:
        assert_same_rows(client, folder, rows)


def test_the_page_is_served_with_its_policy(service: Served) -> None:
    response = requests.get(service.url, timeout=30)
    assert response.text == page.DEMO_PAGE.html
    assert response.headers["Content-Security-Policy"] == page.DEMO_PAGE.policy


def test_replicas_store_each_decision_once(service: Served) -> None:
    """Requests of one annotator reach both replicas, each request twice."""
    key = create_key(
        build(NewKeyConfig, {"file": str(service.keys), "name": "ana", "scopes": ["label"]})
    )
    headers, url = {"X-API-Key": key}, f"{service.url}/v1/labeling"
    found: list[str] = []

    def read_queue() -> bool:
        """False while the replica that answers has not read the new key yet."""
        response = requests.get(f"{url}/queue", headers=headers, timeout=30)
        if response.ok:
            found.append(response.json()["queue"])
        return response.ok

    wait_for(read_queue, 30)
    (queue,) = found

    def decide(row: int) -> int:
        """Sent again only if a replica has not read the new key yet."""
        body = {"queue": queue, "row": row, "labels": ["red"], "submission": f"{row:032x}"}
        for _ in range(100):
            response = requests.post(f"{url}/decisions", json=body, headers=headers, timeout=60)
            if response.status_code != 401:
                break
            time.sleep(0.3)
        return response.status_code

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decide, [*range(20), *range(20)])) == [200] * 40
    folder = service.bundle.parent
    assert read_submissions(folder / "labels") == [f"{row:032x}" for row in range(20)]
    labels = read_table(folder / "labels").to_pylist()
    assert [row["label"] for row in labels] == ["red"] * 20
    assert {row["path"] for row in labels} == {f"{folder}/queue/{i}.jpg" for i in range(20)}


def test_concurrent_requests_are_answered_and_counted(service: Served) -> None:
    statuses: list[str] = []

    def send(seed: int) -> None:
        with service.client() as client:
            for i in range(10):
                (row,) = client.predict(jpeg("green", seed * 10 + i))
                statuses.append(row["status"])

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == ["ok"] * 80
    headers = {"Authorization": f"Bearer {service.admin}"}

    def read_metrics() -> dict[str, float]:
        text = requests.get(f"{service.url}/metrics", headers=headers, timeout=30).text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    wait_for(lambda: read_metrics().get('imgcls_images_total{status="ok"}', 0) >= 80, 30)
    found = read_metrics()
    assert found["imgcls_replicas"] == 2
    assert found["imgcls_batch_images_sum"] >= 80


def test_keys_are_created_and_revoked_without_a_restart(service: Served) -> None:
    secret = create_key(build(NewKeyConfig, {"file": str(service.keys), "name": "visitor"}))

    def is_accepted(key: str) -> bool:
        """By both replicas: six requests reach one of them only once in 32 times."""
        answers = {
            requests.get(
                f"{service.url}/v1/model", headers={"X-API-Key": key}, timeout=30
            ).status_code
            for _ in range(6)
        }
        return answers == {200}

    wait_for(lambda: is_accepted(secret), 20)
    text = service.keys.read_text()
    service.keys.write_text(text[: text.index("- name: visitor")])
    wait_for(lambda: not is_accepted(secret), 20)
    assert is_accepted(service.predict)
    for malformed in ("- name: [", "- name: x\n  expires: 2027-02-30"):
        service.keys.write_text(malformed)  # keeps the previous keys
        time.sleep(1)
        assert is_accepted(service.predict)
    service.keys.write_text("[]")  # revokes the last keys
    wait_for(lambda: not is_accepted(service.predict), 20)
    service.keys.write_text(text)
    wait_for(lambda: is_accepted(service.predict), 20)


def test_no_request_fails_while_the_bundle_is_reloaded(service: Served) -> None:
    processes = {process.pid for process in service.find_replicas()}
    with service.restored_bundle() as before, Traffic(service) as traffic:
        traffic.wait_for_more(5)
        recalibrate(service.bundle)
        after = read_description(str(service.bundle)).sha256
        service.client(service.admin).reload()
        wait_for(lambda: service.all_use(after), 60)
        reloaded = len(traffic.models)
        # a bundle that needs too much memory changes nothing, nor does a damaged one
        preprocess = load_bundle(str(service.bundle)).spec.preprocess
        huge = preprocess.model_copy(update={"resize": 10_000_000, "crop": 10_000_000})
        rewrite_bundle(service.bundle, preprocess=huge)
        service.client(service.admin).reload()
        time.sleep(3)
        (service.bundle / "model.safetensors").write_bytes(b"damaged")
        service.client(service.admin).reload()
        time.sleep(3)
        wait_for(lambda: len(traffic.models) > reloaded + 20, 60)
        # a request that was being answered when the last replica changed may have begun before
        assert set(traffic.models[reloaded + 1 :]) == {after}
        assert service.all_use(after)
        models = set(traffic.models)
    assert traffic.failed == []
    assert models == {before, after}
    assert {process.pid for process in service.find_replicas()} == processes


def test_a_multilabel_bundle_is_served_as_the_batch_job_labels(
    joined: None, service: Served, multilabel_bundle: Path, tmp_path: Path
) -> None:
    for i in range(4):
        draw(("red", "green", "blue")[i % 3], (80 + i, 60), i).save(tmp_path / f"{i}.jpg")
    rows = [(f"{i}.jpg",) for i in range(4)]
    manifest = write_manifest(tmp_path / "m.csv", rows, ("path",))
    columns = ["predicted_labels", "accepted", "topk_labels", "topk_scores", "status"]
    expected = predict_in_batch(tmp_path, multilabel_bundle, manifest, columns)
    with service.restored_bundle():
        shutil.rmtree(service.bundle)
        shutil.copytree(multilabel_bundle, service.bundle)
        service.client(service.admin).reload()
        wait_for(lambda: service.all_use(read_description(str(multilabel_bundle)).sha256), 60)
        with service.client() as client:
            for row in expected:
                (found,) = client.predict((tmp_path / row.pop("path")).read_bytes(), scores=True)
                assert {name: found[name] for name in columns} == row
                assert set(found["scores"]) == {"red", "green", "blue"}
                assert "predicted_label" not in found
    assert {tuple(row["predicted_labels"]) for row in expected} == {("red", "blue")}


def test_a_killed_replica_is_replaced_while_the_other_answers(service: Served) -> None:
    wait_for(lambda: len(service.find_replicas()) == 2, 60)
    victim = service.find_replicas()[0]
    with Traffic(service, clients=6) as traffic:
        traffic.wait_for_more(30)
        killed_at = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        traffic.wait_for_more(30)
        wait_for(
            lambda: len(service.find_replicas()) == 2 and victim not in service.find_replicas(), 90
        )
        sha256 = traffic.models[-1]
        wait_for(lambda: service.all_use(sha256), 60)
        traffic.wait_for_more(60)
    # at most one request per client was in the killed replica, and it fails at once
    assert len(traffic.failed) <= 6, traffic.failed
    for started_at, ended_at, text in traffic.failed:
        assert started_at <= killed_at, text
        assert ended_at <= killed_at + 20, text
        assert text.startswith("500 application/problem+json"), text


def test_a_killed_coordinator_is_restarted_and_no_request_sees_an_internal_error(
    service: Served,
) -> None:
    headers = {"Authorization": f"Bearer {service.admin}"}
    service.find_process("ServeReplica:imgcls:coordinator").send_signal(signal.SIGKILL)
    rejected = []

    def has_both_reports() -> bool:
        response = requests.get(f"{service.url}/metrics", headers=headers, timeout=60)
        if response.status_code != 200:
            rejected.append((response.status_code, response.headers.get("Retry-After")))
        return "imgcls_replicas 2.0" in response.text

    wait_for(has_both_reports, 60)
    assert set(rejected) <= {(503, "2")}
    # both replicas follow the commands of the new coordinator
    with service.restored_bundle():
        recalibrate(service.bundle)
        sha256 = read_description(str(service.bundle)).sha256
        service.client(service.admin).reload()
        wait_for(lambda: service.all_use(sha256), 60)


def test_an_endless_body_without_a_key_is_not_kept_in_memory(service: Served) -> None:
    """Not even while no replica can reject it."""
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    block = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    sent, received = 0, b""
    proxy = service.find_process("ProxyActor")
    replicas = service.find_replicas()
    before = proxy.memory_info().rss
    for replica in replicas:
        replica.suspend()
    try:
        with socket.create_connection(("127.0.0.1", service.port), 60) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head)
                while sent < 1 << 30:
                    connection.sendall(block)
                    sent += 1 << 20
            with contextlib.suppress(ConnectionError):
                while more := connection.recv(65536):
                    received += more
    finally:
        for replica in replicas:
            replica.resume()
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in received
    assert proxy.memory_info().rss - before < 64 << 20
    with service.client() as client:
        assert client.predict(jpeg())[0]["status"] == "ok"


def test_no_key_is_in_any_log(service: Served) -> None:
    with service.client() as client:
        client.predict(jpeg())
    requests.get(
        f"{service.url}/v1/model?key={service.predict[:10]}",
        headers={"X-API-Key": "imgcls_wrong_" + "w" * 20},
        timeout=30,
    )
    session = Path("/tmp/ray/session_latest").resolve()
    for process in service.find_replicas():
        with contextlib.suppress(psutil.Error):
            for file in process.open_files():
                if "/session_" in file.path:
                    session = Path(file.path[: file.path.index("/logs/")])
    texts = {file: file.read_bytes() for file in (session / "logs").rglob("*") if file.is_file()}
    assert any(b"POST " in text for text in texts.values())
    for secret in (service.predict, service.admin, "imgcls_wrong_" + "w" * 20):
        assert [file for file, text in texts.items() if secret.encode() in text] == []
        assert secret not in service.output


def test_a_port_in_use_is_rejected_with_exit_code_2(
    joined: None, service: Served, color_bundle: Path
) -> None:
    done = run_here("serve", "--model", color_bundle, "--http.port", service.port)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"http.port {service.port} on node " in done.stderr
    assert "Address already in use" in done.stderr


@pytest.mark.slow
def test_without_a_replica_the_service_answers_503_and_logs_why(
    tmp_path: Path, color_bundle: Path
) -> None:
    with served(tmp_path, color_bundle) as running:
        weights = running.bundle / "model.safetensors"
        original = weights.read_bytes()
        weights.write_bytes(original[: len(original) // 2])
        for replica in running.find_replicas():
            replica.kill()
        for path in ("/healthz", "/readyz", "/v1/model"):
            response = requests.get(running.url + path, timeout=60)
            assert (response.status_code, response.headers["Retry-After"]) == (503, "2"), path
        # the 503 comes from Ray's proxy and the line from the command: neither waits for the other
        wait_for(
            lambda: any(
                line.startswith("unhealthy") and "model.safetensors has SHA-256" in line
                for line in list(running.lines)
            ),
            60,
        )
        weights.write_bytes(original)
        wait_for(
            lambda: requests.get(f"{running.url}/readyz", timeout=60).status_code == 200, 180, 1
        )
        wait_for(lambda: "all replicas are running again" in running.output, 60)


@pytest.mark.slow
def test_tls_is_an_option(color_bundle: Path, tmp_path: Path) -> None:
    files = tmp_path / "c.pem", tmp_path / "k.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-out", str(files[0]), "-keyout", str(files[1])],
        check=True, capture_output=True,
    )  # fmt: skip
    options = ("--http.certificate", files[0], "--http.private-key", files[1])
    with served(tmp_path, color_bundle, *options) as running:
        response = requests.get(
            f"{running.url.replace('http:', 'https:')}/healthz", verify=str(files[0]), timeout=30
        )
        assert response.text == "ok"
        assert response.headers["Strict-Transport-Security"]


@pytest.mark.slow
def test_haproxy_answers_as_the_python_proxy_does(color_bundle: Path, tmp_path: Path) -> None:
    with served(tmp_path, color_bundle, "--http.proxy", "haproxy") as running:
        with running.client() as client:
            (row,) = client.predict(jpeg())
            assert row["status"] == "ok"
            with pytest.raises(ServiceError, match="begin with"):
                client.predict(b"no image")
        response = requests.get(f"{running.url}/v1/model", timeout=30)
        assert response.status_code == 401
        # without a key, so by the middleware in front of the replica
        assert announce_body(running.port, 65 << 20).startswith("http/1.1 413 ")
        # its other ports are free ones, so that two services do not collide
        (proxy,) = (p for p in family(running.process.pid) if p.name() == "haproxy")
        ports = {each.laddr.port for each in proxy.net_connections() if each.status == "LISTEN"}
        assert len(ports) == 3
        assert not ports & {8404, 9101}


def test_a_stopped_service_first_answers_what_it_has_received(service: Served) -> None:
    """The last test of this module: it stops the shared service."""
    body = jpeg()
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {service.predict}\r\n"
        f"Content-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), 60) as slow:
        slow.sendall(head.encode() + body[:100])
        time.sleep(1)
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: requests.get(f"{service.url}/readyz", timeout=10).status_code == 503, 20)
        assert requests.get(f"{service.url}/healthz", timeout=10).status_code == 200
        time.sleep(3)
        slow.sendall(body[100:])
        assert slow.recv(100).startswith(b"HTTP/1.1 200 ")
    assert service.process.wait(60) == 0
    wait_for(lambda: "all requests were answered" in service.output, 10)
    assert "ServeController" not in service.output, "its end is no failure"
