"""`imgcls serve` as it is meant to be run: Ray Serve, HTTP, a browser, real signals."""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import requests
import yaml
from ray.serve.schema import ServeDeploySchema

from imgcls.client import Client, ServiceError
from imgcls.config import build
from imgcls.models.bundle import load_bundle, read_description
from imgcls.serving.api_keys import NewKeyConfig, create_key
from imgcls.serving.config import ServeConfig
from tests.browser import opened
from tests.conftest import draw, write_manifest
from tests.e2e.test_jobs import takes_jobs
from tests.processes import (
    REPOSITORY,
    RayCluster,
    family,
    imgcls,
    service_port,
    started,
    title,
    wait_for,
)
from tests.serving.app import recalibrate, rewrite_bundle
from tests.serving.test_api import jpeg
from tests.serving.test_proxy_middleware import announced

pytestmark = pytest.mark.timeout(600)

COLUMNS = [
    *("predicted_label", "confidence", "accepted", "topk_labels", "topk_scores"),
    *("width", "height", "status", "error"),
]


@dataclass
class Served:
    """A service in processes of its own, and the keys to it."""

    url: str
    process: subprocess.Popen[str]
    bundle: Path
    keys: Path
    predict: str
    admin: str
    told: Path

    def replicas(self) -> list[psutil.Process]:
        return [p for p in family(self.process.pid) if "ServeReplica:imgcls:endpoint" in title(p)]

    def others(self, name: str) -> psutil.Process:
        """The one process of Ray Serve, beside replicas, that has `name` in its title."""
        (found,) = (p for p in family(self.process.pid) if name in title(p))
        return found

    def client(self, key: str | None = None) -> Client:
        return Client(self.url, key or self.predict)


@contextlib.contextmanager
def served(tmp_path: Path, bundle: Path, *options: object, replicas: int = 1) -> Iterator[Served]:
    """`imgcls serve` on a copy of a bundle; its replicas share two logical CPUs."""
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
        *("--keys", keys, "--http.port", port, "--replicas.min_replicas", replicas),
        *("--replicas.cpus", 1, "--keys.refresh-interval-s", 0.3, "--replicas.drain-period-s", 1),
        *options,
    ]
    told = tmp_path / "told.txt"
    with started(*command) as process:
        assert process.stdout is not None
        lines: list[str] = []

        def listen() -> None:
            for line in process.stdout or ():
                lines.append(line)
                told.write_text("".join(lines))

        threading.Thread(target=listen, daemon=True).start()
        wait_for(
            lambda: any(line.startswith("ready") for line in lines) or process.poll() is not None,
            180,
        )
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        yield Served(f"http://127.0.0.1:{port}", process, copy, keys, predict, admin, told)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, colour_bundle: Path) -> Iterator[Served]:
    folder, bounds = tmp_path_factory.mktemp("serve"), ("--limits.body-bytes", 16 << 20)
    with served(folder, colour_bundle, *bounds, replicas=2) as running:
        yield running


def rows_of_a_job(tmp_path: Path, bundle: Path, manifest: Path) -> list[dict[str, Any]]:
    """What a labelling run writes of a manifest."""
    output = tmp_path / "labels"
    done = imgcls(
        *("predict", "--manifest", manifest, "--model", bundle, "--output", output),
        *("--max-error-rate", 1),
    )
    assert done.returncode == 0, done.stderr
    table = pq.read_table(output / "predictions")
    rows: list[dict[str, Any]] = table.sort_by("row").select(["path", *COLUMNS]).to_pylist()
    return rows


def assert_same_as_the_job(client: Client, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Row by row, each image sent alone: the same words, and the same bits."""
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


def test_the_endpoint_and_the_nightly_table_agree_bit_for_bit(
    service: Served, tmp_path: Path
) -> None:
    rows = []
    for i in range(20):
        draw(("red", "green", "blue")[i % 3], (80 + i, 60), i).save(tmp_path / f"{i}.jpg")
        rows.append((f"{i}.jpg",))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:700])
    (tmp_path / "text.jpg").write_text("no image")
    manifest = write_manifest(tmp_path / "m.csv", [*rows, ("cut.jpg",), ("text.jpg",)], ("path",))
    written = rows_of_a_job(tmp_path, service.bundle, manifest)
    with service.client() as client:
        assert_same_as_the_job(client, tmp_path, written)


@pytest.mark.slow
def test_real_photographs_get_the_labels_of_the_job(shared: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "squeezenet"
    done = imgcls(
        *("model", "import", "--arch", "squeezenet1_0", "--output", bundle),
        *("--weights", shared / "weights" / "squeezenet1_0-imagenet.pth"),
        *("--classes", shared / "weights" / "imagenet-classes.txt"),
    )
    assert done.returncode == 0, done.stderr
    folder = shared / "data" / "imagenet-sample"
    rows = rows_of_a_job(tmp_path, bundle, folder / "manifest.csv")
    assert len(rows) == 334
    with served(tmp_path, bundle) as running, running.client() as client:
        assert_same_as_the_job(client, folder, rows)


def test_many_at_once_are_answered_and_counted(service: Served) -> None:
    answers: list[str] = []

    def ask(seed: int) -> None:
        with service.client() as client:
            for i in range(10):
                (row,) = client.predict(jpeg("green", seed * 10 + i))
                answers.append(row["status"])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["ok"] * 80
    headers = {"Authorization": f"Bearer {service.admin}"}

    def counted() -> dict[str, float]:
        text = requests.get(f"{service.url}/metrics", headers=headers, timeout=30).text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    wait_for(lambda: counted().get('imgcls_images_total{status="ok"}', 0) >= 80, 30)
    found = counted()
    assert found["imgcls_replicas"] == 2
    assert found["imgcls_batch_images_sum"] >= 80


def test_keys_are_made_and_taken_back_without_a_restart(service: Served) -> None:
    secret = create_key(build(NewKeyConfig, {"file": str(service.keys), "name": "visitor"}))

    def enters(key: str) -> bool:
        answers = {
            requests.get(
                f"{service.url}/v1/model", headers={"X-API-Key": key}, timeout=30
            ).status_code
            for _ in range(6)
        }
        return answers == {200}

    wait_for(lambda: enters(secret), 20)
    text = service.keys.read_text()
    service.keys.write_text(text[: text.index("- name: visitor")])
    wait_for(lambda: not enters(secret), 20)
    assert enters(service.predict)
    for wrong in ("- name: [", "- name: x\n  expires: 2027-02-30"):
        service.keys.write_text(wrong)  # an edit that went wrong locks nobody out
        time.sleep(1)
        assert enters(service.predict)
    service.keys.write_text("[]")  # and does not keep the last keys from being taken back
    wait_for(lambda: not enters(service.predict), 20)
    service.keys.write_text(text)
    wait_for(lambda: enters(service.predict), 20)


def test_the_page_labels_what_is_dropped_on_it(service: Served, tmp_path: Path) -> None:
    for name in ("red", "green"):
        draw(name, (320, 240)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "red.jpg").read_bytes()[:900])
    with opened(service.url) as page:
        cards = page.page.locator("#results > li")

        def settled(count: int) -> None:
            cards.nth(count - 1).wait_for()
            page.page.wait_for_function(
                "() => ![...document.querySelectorAll('.label')].some(e => e.textContent === '…')"
            )

        drop(page.page, [tmp_path / "red.jpg", tmp_path / "green.jpg"])
        settled(2)
        assert cards.nth(0).locator(".badge").inner_text() == "key missing"
        assert "send an API key" in page.page.locator("#message").inner_text()
        page.screenshot("serve-no-key")

        page.page.fill("#key", service.predict + "x")
        page.page.locator("#files").set_input_files(str(tmp_path / "red.jpg"))
        settled(3)
        assert cards.nth(0).locator(".badge").inner_text() == "key unknown"

        page.page.click("#clear")
        page.page.fill("#key", service.predict)
        page.page.locator("#key").blur()
        page.page.wait_for_function(
            "() => document.querySelector('#about').textContent.includes('3 classes')"
        )
        drop(page.page, [tmp_path / "red.jpg", tmp_path / "green.jpg"])
        settled(2)
        for place in (0, 1):
            card = cards.nth(place)
            assert card.locator(".label").inner_text() in ("red", "green", "blue")
            assert card.locator(".badge").inner_text() == "accepted"
            assert card.locator("progress").count() == 3
            assert card.locator(".took").inner_text().endswith(" ms")
            assert "accepted" in str(card.locator("img").get_attribute("alt"))
        page.page.fill("#threshold", "1")
        page.page.locator("#files").set_input_files(
            [str(tmp_path / "broken.jpg"), str(tmp_path / "green.jpg")]
        )
        settled(4)
        badges = [cards.nth(place).locator(".badge").inner_text() for place in (0, 1)]
        assert sorted(badges) == ["abstained", "truncated"]
        assert "3 images labelled, 1 not" in page.page.locator("#message").inner_text()
        page.screenshot("serve")
        assert page.page.evaluate("() => localStorage.length") == 0
        assert page.page.evaluate("() => document.cookie") == ""
        assert {url.split("?")[0] for url in page.requests if not url.startswith("blob:")} <= {
            f"{service.url}/", f"{service.url}/v1/model", f"{service.url}/v1/predict", "data:,",
        }  # fmt: skip
        wrong = [text for text in page.errors if "401" not in text and "422" not in text]
        assert wrong == []


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "dark")])
def test_the_page_fits_a_phone_and_a_dark_room(
    service: Served, tmp_path: Path, width: int, scheme: str
) -> None:
    draw("blue", (640, 480)).save(tmp_path / "blue.jpg")
    with opened(service.url, width=width, height=844, scheme=scheme) as page:
        page.page.fill("#key", service.predict)
        page.page.locator("#files").set_input_files(str(tmp_path / "blue.jpg"))
        page.page.locator("#results .badge").wait_for()
        page.screenshot(f"serve-{width}-{scheme}")
        assert page.page.evaluate("() => document.documentElement.scrollWidth") <= width
        # everything can be reached with the keyboard alone
        page.page.focus("#key")
        reached = []
        for _ in range(5):
            page.page.keyboard.press("Tab")
            reached.append(page.page.evaluate("() => document.activeElement.id"))
        assert reached == ["top_k", "threshold", "files", "camera", "clear"]


def test_what_is_cleared_on_the_page_is_not_sent_and_not_counted(
    service: Served, tmp_path: Path
) -> None:
    files = [tmp_path / f"{i}.jpg" for i in range(12)]
    for file in files:
        draw("red").save(file)
    with opened(service.url) as page:
        page.page.fill("#key", service.predict)
        page.page.locator("#key").blur()
        page.page.wait_for_function(
            "() => document.getElementById('about').textContent.includes('classes')"
        )
        replicas = service.replicas()
        for replica in replicas:
            replica.suspend()
        try:
            page.page.locator("#files").set_input_files([str(file) for file in files])
            page.page.locator("#results > li").nth(11).wait_for()
            page.page.click("#clear")
        finally:
            for replica in replicas:
                replica.resume()
        page.page.locator("#files").set_input_files(str(files[0]))
        page.page.locator("#results .badge").wait_for()
        assert page.page.locator("#message").inner_text() == "1 image labelled"
        asked = [url for url in page.requests if "/v1/predict" in url]
        assert len(asked) == 4 + 1


def test_the_page_says_that_a_key_is_none(service: Served, tmp_path: Path) -> None:
    draw("red").save(tmp_path / "red.jpg")
    with opened(service.url) as page:
        page.page.fill("#key", service.predict + " → ops")
        page.page.locator("#files").set_input_files(str(tmp_path / "red.jpg"))
        badge = page.page.locator("#results .badge")
        badge.wait_for()
        assert badge.inner_text() == "key malformed"
        assert "copy it again" in page.page.locator("#message").inner_text()
        assert not any("/v1/predict" in url for url in page.requests)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_where_to_fill_in_something_can_be_seen(service: Served, scheme: str) -> None:
    """At a contrast of 3 to 1. Source: WCAG 2.2, 1.4.11 and its definition of contrast."""
    colours = """(id) => [[document.getElementById(id), "borderTopColor"],
        [document.getElementById(id), "backgroundColor"], [document.body, "backgroundColor"]]
        .map(([element, name]) => getComputedStyle(element)[name].match(/\\d+/g).map(Number))"""

    def luminance(colour: list[int]) -> float:
        parts = [value / 255 for value in colour]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    with opened(service.url, scheme=scheme) as page:
        for name in ("key", "top_k", "threshold", "drop"):
            edge, *grounds = (luminance(each) for each in page.page.evaluate(colours, name))
            for ground in grounds:
                darker, lighter = sorted((edge, ground))
                assert (lighter + 0.05) / (darker + 0.05) >= 3, name


def drop(page: Any, files: list[Path]) -> None:
    """Drop files on a page, as a person does with a mouse."""
    contents = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
    transfer = page.evaluate_handle(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, data] of files) {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
            }
            return transfer;
        }""",
        contents,
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


class Asking:
    """People who ask again and again, each alone, and note what went wrong.

    failed: when it was asked, when it went wrong, and what was said
    """

    def __init__(self, service: Served, people: int = 1) -> None:
        self._service = service
        self._stop = threading.Event()
        self.models: list[str] = []
        self.failed: list[tuple[float, float, str]] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(people)]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        headers = {"X-API-Key": self._service.predict, "Content-Type": "image/jpeg"}
        data = jpeg()
        while not self._stop.is_set():
            began, said = time.monotonic(), ""
            try:
                response = requests.post(
                    f"{self._service.url}/v1/predict", data, headers=headers, timeout=60
                )
                if response.ok:
                    self.models.append(response.json()["model"])
                else:
                    kind = response.headers["Content-Type"]
                    said = f"{response.status_code} {kind} {response.text}"
            except requests.RequestException as error:
                said = str(error)
            if said:
                self.failed.append((began, time.monotonic(), said))


def all_answer_with(service: Served, sha256: str) -> bool:
    """Whether both replicas have a bundle, as they tell of themselves."""
    headers = {"Authorization": f"Bearer {service.admin}"}
    text = requests.get(f"{service.url}/metrics", headers=headers, timeout=60).text
    told = re.findall(r'imgcls_model_replicas\{sha256="(\w+)"\} (\S+)', text)
    return {name: float(count) for name, count in told} == {sha256: 2}


@contextlib.contextmanager
def given_back(service: Served) -> Iterator[str]:
    """Within it the bundle may be changed; yields the hash that it has before and afterwards."""
    before, old = read_description(str(service.bundle)).sha256, service.bundle.with_name("old")
    shutil.copytree(service.bundle, old)
    try:
        yield before
    finally:
        shutil.rmtree(service.bundle)
        old.rename(service.bundle)
        service.client(service.admin).reload()
        wait_for(lambda: all_answer_with(service, before), 60)


def test_another_bundle_is_taken_up_and_nobody_notices(service: Served) -> None:
    processes = {process.pid for process in service.replicas()}
    with given_back(service) as before, Asking(service) as asking:
        wait_for(lambda: len(asking.models) > 5, 60)
        recalibrate(service.bundle)
        after = read_description(str(service.bundle)).sha256
        service.client(service.admin).reload()
        wait_for(lambda: all_answer_with(service, after), 60)
        there = len(asking.models)
        # what cannot be loaded changes nothing, nor does what there is no memory for
        huge = load_bundle(str(service.bundle)).spec.preprocess
        huge = huge.model_copy(update={"resize": 10_000_000, "crop": 10_000_000})
        rewrite_bundle(service.bundle, preprocess=huge)
        service.client(service.admin).reload()
        time.sleep(3)
        (service.bundle / "model.safetensors").write_bytes(b"damaged")
        service.client(service.admin).reload()
        time.sleep(3)
        wait_for(lambda: len(asking.models) > there + 20, 60)
        # the one under way when the last replica changed may have begun before
        assert set(asking.models[there + 1 :]) == {after}
        assert all_answer_with(service, after)
        models = set(asking.models)
    assert asking.failed == []
    assert models == {before, after}
    assert {process.pid for process in service.replicas()} == processes


def another(tmp_path: Path, bundle: Path) -> Path:
    """A copy of a bundle that has another hash."""
    copy = tmp_path / "other"
    shutil.copytree(bundle, copy)
    recalibrate(copy)
    return copy


def test_a_replica_that_is_killed_is_replaced_and_the_other_goes_on(service: Served) -> None:
    wait_for(lambda: len(service.replicas()) == 2, 60)
    victim = service.replicas()[0]
    with Asking(service, people=6) as asking:
        wait_for(lambda: len(asking.models) > 30, 60)
        killed = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        before = len(asking.models)
        wait_for(lambda: len(asking.models) > before + 30, 60)  # of the other one
        wait_for(lambda: len(service.replicas()) == 2 and victim not in service.replicas(), 90)
        sha256 = asking.models[-1]
        wait_for(lambda: all_answer_with(service, sha256), 60)
        before = len(asking.models)
        wait_for(lambda: len(asking.models) > before + 60, 60)
    # what was under way, one of each at most, and it is told so at once
    assert len(asking.failed) <= 6, asking.failed
    for began, ended, said in asking.failed:
        assert began <= killed, said
        assert ended <= killed + 20, said
        assert said.startswith("500 application/problem+json"), said


@pytest.mark.slow
def test_without_a_replica_that_can_start_it_answers_503_and_logs_why(
    tmp_path: Path, colour_bundle: Path
) -> None:
    with served(tmp_path, colour_bundle) as running:
        weights = running.bundle / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        for replica in running.replicas():
            replica.kill()
        for path in ("/healthz", "/readyz", "/v1/model"):
            response = requests.get(running.url + path, timeout=60)
            assert (response.status_code, response.headers["Retry-After"]) == (503, "2"), path
        wait_for(lambda: "unhealthy" in running.told.read_text(), 30)
        assert "model.safetensors has SHA-256" in running.told.read_text()
        weights.write_bytes(whole)
        wait_for(
            lambda: requests.get(f"{running.url}/readyz", timeout=60).status_code == 200, 180, 1
        )
        wait_for(lambda: "all replicas run again" in running.told.read_text(), 60)


def test_what_the_replicas_share_is_started_anew_and_nobody_is_told_of_a_defect(
    service: Served,
) -> None:
    headers = {"Authorization": f"Bearer {service.admin}"}
    service.others("ServeReplica:imgcls:hub").send_signal(signal.SIGKILL)
    refused = []

    def counted() -> bool:
        response = requests.get(f"{service.url}/metrics", headers=headers, timeout=60)
        if response.status_code != 200:
            refused.append((response.status_code, response.headers.get("Retry-After")))
        # both report again, and what they have counted since they began
        return "imgcls_replicas 2.0" in response.text

    wait_for(counted, 60)
    assert set(refused) <= {(503, "2")}
    # and both hear what is asked for now
    with given_back(service):
        recalibrate(service.bundle)
        sha256 = read_description(str(service.bundle)).sha256
        service.client(service.admin).reload()
        wait_for(lambda: all_answer_with(service, sha256), 60)


def test_an_endless_body_of_anybody_is_in_nobodys_memory(service: Served) -> None:
    """Not even while no replica is there to refuse it."""
    port = int(service.url.rpartition(":")[2])
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    block = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    sent, said = 0, b""
    door = service.others("ProxyActor")
    replicas = service.replicas()
    before = door.memory_info().rss
    for replica in replicas:
        replica.suspend()
    try:
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head)
                while sent < 1 << 30:
                    connection.sendall(block)
                    sent += 1 << 20
            with contextlib.suppress(ConnectionError):
                while more := connection.recv(65536):
                    said += more
    finally:
        for replica in replicas:
            replica.resume()
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in said
    assert door.memory_info().rss - before < 64 << 20
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
    for process in service.replicas():
        with contextlib.suppress(psutil.Error):
            for file in process.open_files():
                if "/session_" in file.path:
                    session = Path(file.path[: file.path.index("/logs/")])
    texts = {file: file.read_bytes() for file in (session / "logs").rglob("*") if file.is_file()}
    assert any(b"POST " in text for text in texts.values())
    for secret in (service.predict, service.admin, "imgcls_wrong_" + "w" * 20):
        assert [file for file, text in texts.items() if secret.encode() in text] == []
        assert secret not in service.told.read_text()


def test_who_is_told_to_stop_answers_what_is_under_way(colour_bundle: Path, tmp_path: Path) -> None:
    with served(tmp_path, colour_bundle, "--replicas.drain-period-s", 3) as running:
        body = jpeg()
        head = (
            f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {running.predict}\r\n"
            f"Content-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        port = int(running.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 60) as slow:
            slow.sendall(head.encode() + body[:100])
            time.sleep(1)
            running.process.send_signal(signal.SIGTERM)
            wait_for(
                lambda: requests.get(f"{running.url}/readyz", timeout=10).status_code == 503, 20
            )
            assert requests.get(f"{running.url}/healthz", timeout=10).status_code == 200
            time.sleep(3)
            slow.sendall(body[100:])
            assert slow.recv(100).startswith(b"HTTP/1.1 200 ")
        assert running.process.wait(60) == 0
        assert "every request was answered" in running.told.read_text()


def test_what_cannot_be_served_is_refused_before_anything_starts(
    colour_bundle: Path, tmp_path: Path
) -> None:
    def refused(*options: object) -> str:
        done = imgcls("serve", "--model", colour_bundle, *options)
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr

    assert "no such file" in refused("--model", tmp_path / "none")
    assert "anyone who reaches it could use it" in refused("--http.host", "0.0.0.0")
    assert "`imgcls key new --file" in refused("--keys", tmp_path / "keys.yaml")
    assert "give a PEM file" in refused(
        "--http.certificate", tmp_path / "c.pem", "--http.private-key", tmp_path / "k.pem"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"http.port {port}: Address already in use" in refused("--http.port", port)
    assert "replicas.min_replicas 9: each takes" in refused(
        "--replicas.min_replicas", 9, "--replicas.cpus", 4, "--http.port", service_port()
    )


@pytest.mark.slow
def test_tls_is_an_option(colour_bundle: Path, tmp_path: Path) -> None:
    files = tmp_path / "c.pem", tmp_path / "k.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-out", str(files[0]), "-keyout", str(files[1])],
        check=True, capture_output=True,
    )  # fmt: skip
    options = ("--http.certificate", files[0], "--http.private-key", files[1])
    with served(tmp_path, colour_bundle, *options) as running:
        response = requests.get(
            f"{running.url.replace('http:', 'https:')}/healthz", verify=str(files[0]), timeout=30
        )
        assert response.text == "ok"
        assert response.headers["Strict-Transport-Security"]


@pytest.mark.slow
def test_the_other_door_answers_as_the_first_one_does(colour_bundle: Path, tmp_path: Path) -> None:
    with served(tmp_path, colour_bundle, "--http.proxy", "haproxy") as running:
        with running.client() as client:
            (row,) = client.predict(jpeg())
            assert row["status"] == "ok"
            with pytest.raises(ServiceError, match="begin with"):
                client.predict(b"no image")
        response = requests.get(f"{running.url}/v1/model", timeout=30)
        assert response.status_code == 401
        port = int(running.url.rpartition(":")[2])
        assert announced(port, 65 << 20).startswith("http/1.1 413 ")  # of anybody, by the gate
        # what else it listens on is on free ports: two services are not in each other's way
        (door,) = (p for p in family(running.process.pid) if p.name() == "haproxy")
        ports = {each.laddr.port for each in door.net_connections() if each.status == "LISTEN"}
        assert len(ports) == 3
        assert not ports & {8404, 9101}


# ---------------------------------------------------------------------- on a cluster


def deployed_file(tmp_path: Path, **changes: object) -> Path:
    """serve.yaml as it is shipped, but for what it says to change."""
    body = yaml.safe_load((REPOSITORY / "serve.yaml").read_text())
    body["http_options"]["port"] = changes.pop("port")
    body["applications"][0]["args"].update(changes)
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(body))
    return file


def test_the_shipped_serve_file_is_one_that_ray_takes() -> None:
    body = yaml.safe_load((REPOSITORY / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(body)
    (application,) = schema.applications
    build(ServeConfig, application.args)
    assert schema.http_options.host == "127.0.0.1"


@pytest.mark.cluster
def test_a_deployed_file_serves_and_a_changed_one_is_taken_up(
    colour_bundle: Path, tmp_path: Path
) -> None:
    other = another(tmp_path, colour_bundle)
    port = service_port()
    url = f"http://127.0.0.1:{port}"

    def model() -> str | None:
        with contextlib.suppress(requests.RequestException, ValueError, KeyError):
            return str(requests.get(f"{url}/v1/model", timeout=5).json()["sha256"])
        return None

    def deploy(cluster: RayCluster, bundle: Path) -> None:
        file = deployed_file(tmp_path, port=port, model=str(bundle), replicas={"least": 1})
        env = {"RAY_DASHBOARD_ADDRESS": str(cluster.dashboard), "PYTHONPATH": str(REPOSITORY)}
        with started("deploy", file, command="serve", env=env) as process:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err

    with takes_jobs() as cluster:
        deploy(cluster, colour_bundle)
        wait_for(lambda: model() == read_description(str(colour_bundle)).sha256, 180)
        deploy(cluster, other)
        wait_for(lambda: model() == read_description(str(other)).sha256, 120)


@pytest.mark.cluster
def test_what_is_left_serving_is_changed_by_the_same_command(
    colour_bundle: Path, tmp_path: Path
) -> None:
    other = another(tmp_path, colour_bundle)
    port = service_port()

    def serve(bundle: Path) -> str:
        done = imgcls(
            *(
                "serve",
                "--model",
                bundle,
                "--http.port",
                port,
                "--replicas.min_replicas",
                1,
                "--detach",
            ),
            env=cluster.environment(),
        )
        assert done.returncode == 0, done.stderr
        assert "ready" in done.stdout
        said: dict[str, Any] = requests.get(f"http://127.0.0.1:{port}/v1/model", timeout=30).json()
        return str(said["sha256"])

    with RayCluster.start(cpus=2) as cluster:
        assert serve(colour_bundle) == read_description(str(colour_bundle)).sha256
        assert serve(other) == read_description(str(other)).sha256
        damaged = tmp_path / "damaged"
        shutil.copytree(other, damaged)
        (damaged / "model.safetensors").write_bytes(b"")
        done = imgcls("serve", "--model", damaged, "--detach", env=cluster.environment())
        assert done.returncode == 2
        said = requests.get(f"http://127.0.0.1:{port}/v1/model", timeout=30).json()
        assert said["sha256"] == read_description(str(other)).sha256
