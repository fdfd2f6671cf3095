"""Everything on an object store: images, manifests, checkpoints, bundle, predictions, report."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conftest import write_manifest
from tests.data.storage.test_object_store import MIX
from tests.e2e.outputs import assert_exactly_once
from tests.faults import KINDS, Proxy, refusal
from tests.processes import ALONE, RayCluster, imgcls, run_here, started, wait_for
from tests.s3 import BUCKET, keys, url

pytestmark = pytest.mark.timeout(900)


def body(s3: Any, key: str) -> bytes:
    data: bytes = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return data


@pytest.mark.slow  # its parts are tested elsewhere; this is the whole way in one bucket
def test_a_model_is_trained_killed_resumed_and_put_to_work_with_nothing_on_disk(
    cluster: RayCluster, s3: Any, tmp_path: Path, colors: Callable[..., Path]
) -> None:
    manifest, env = colors(60), cluster.environment()
    for file in (manifest, *(tmp_path / "images").iterdir()):
        s3.upload_file(str(file), BUCKET, str(file.relative_to(tmp_path)))
    train = (
        *("train", "--data.train", url("manifest.csv"), "--output", url("bundle")),
        *("--model.name", "small_cnn", "--model.options", "{width: 8}", "--epochs", 16),
        *("--batch-size", 10, "--augment", "none"),
    )
    with started(*train, env=env) as process:
        wait_for(
            lambda: any("_train/state-000002." in key for key in keys(s3, "bundle/")), 240, every=1
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "bundle/bundle.json" not in keys(s3)
    done = imgcls(*train, env=env)
    assert done.returncode == 0, done.stderr
    assert "resuming: epoch " in done.stdout
    assert {"bundle/bundle.json", "bundle/model.safetensors"} <= set(keys(s3))
    history = pq.read_table(io.BytesIO(body(s3, "bundle/history.parquet")))
    assert history["epoch"].to_pylist() == list(range(1, 17))

    done = imgcls(
        *("evaluate", "--manifest", url("manifest.csv"), "--model", url("bundle")),
        *("--output", url("out"), "--slice-by", "camera"),
        env=env,
    )
    assert done.returncode == 0, done.stderr
    written = set(keys(s3, "out/"))
    assert {"out/_SUCCESS", "out/summary.json", "out/report.html"} <= written
    table = pq.read_table(io.BytesIO(body(s3, "out/predictions/part-00000.parquet")))
    assert table["row"].to_pylist() == list(range(60))
    assert set(table["status"].to_pylist()) == {"ok"}
    accuracy = json.loads(body(s3, "out/summary.json"))["metrics"]["accuracy"]["value"]
    assert accuracy > 0.9
    assert b"data:image/jpeg;base64," in body(s3, "out/report.html")


def fetched(s3: Any, prefix: str, folder: Path) -> Path:
    """All objects below a prefix, as files."""
    for key in keys(s3, f"{prefix}/"):
        place = folder / key
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(body(s3, key))
    return folder / prefix


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_credentials_that_expire_break_a_run_off_that_fresh_ones_resume(
    endpoint: str,
    cluster: RayCluster,
    joined: None,
    place: Path,
    colors: Callable[..., Path],
    placed_bundle: Path,
) -> None:
    """No row is lost for it: the row whose turn it was is labeled by the resumed run."""
    manifest = colors(60, place)
    given = iter(range(10_000))

    def expired(head: str) -> bytes | None:
        if not re.match(r"GET \S+/images/", head) or next(given) < 20:
            return None
        return refusal(400, "ExpiredToken", "The provided token has expired.")

    with Proxy(endpoint).running() as proxy:
        words = (
            *("predict", "--manifest", manifest, "--model", placed_bundle, "--chunk-rows", 5),
            *("--output", place / "out", *ALONE),
        )
        proxy.respond = expired
        first = imgcls(*words, "--storage.endpoint-url", proxy.url, env=cluster.environment())
        assert first.returncode == 1, first.stderr
        assert "access is refused (ExpiredToken); check the credentials" in first.stderr
        assert "rerun the same command to resume" in first.stderr
    again = run_here(*words)
    assert again.returncode == 0, again.stderr
    assert "of 60 rows are done" in again.stdout
    assert set(assert_exactly_once(place / "out", 60)["status"].to_pylist()) == {"ok"}


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_network_that_fails_changes_no_row(
    s3: Any,
    endpoint: str,
    cluster: RayCluster,
    joined: None,
    tmp_path: Path,
    colors: Callable[[int], Path],
    color_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Everything on S3 behind the fault proxy, against the same images labeled from disk."""
    manifest = colors(80)
    gone = [("images/gone-1.jpg", "red"), ("images/gone-2.jpg", "blue")]
    lines = [tuple(line.split(",")[:2]) for line in manifest.read_text().splitlines()[1:]]
    manifest = write_manifest(tmp_path / "manifest.csv", [*lines, *gone], ("path", "label"))
    files = [manifest, *(tmp_path / "images").iterdir(), *color_bundle.iterdir()]
    for file in files:
        folder = "bundle/" if file.parent == color_bundle else ""
        name = str(file.relative_to(tmp_path)) if not folder else file.name
        s3.upload_file(str(file), BUCKET, folder + name)
    settings = ("--max-error-rate", 0.05, "--chunk-rows", 8, "--precision", "fp32")
    quiet = run_here(
        *("predict", "--manifest", manifest, "--model", color_bundle),
        *("--output", tmp_path / "disk", *settings, *ALONE),
    )
    assert quiet.returncode == 0, quiet.stderr
    expected = assert_exactly_once(tmp_path / "disk", 82)

    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with Proxy(endpoint, MIX, seed=seed).running() as proxy:
        for _ in range(5):
            run = imgcls(
                *("predict", "--manifest", url("manifest.csv"), "--model", url("bundle")),
                *("--output", url("out"), *settings, "--storage.endpoint-url", proxy.url),
                *("--storage.attempt-timeout-s", 1, "--lease-seconds", 10),
                env=cluster.environment(),
            )
            assert run.returncode in (0, 1), run.stderr
            if run.returncode == 0:
                break
    assert run.returncode == 0, run.stderr
    assert set(proxy.met) == set(KINDS)
    found = assert_exactly_once(fetched(s3, "out", tmp_path), 82)
    assert found.drop_columns(["error"]).equals(expected.drop_columns(["error"]))
    stored = body(s3, "out/_run.json").decode()
    for hidden in (proxy.url, os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"]):
        assert hidden not in stored
