"""Everything on an object store: images, manifests, checkpoints, bundle, predictions, report."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.processes import imgcls, started, wait_for
from tests.s3 import BUCKET, keys, url

pytestmark = pytest.mark.timeout(900)
LOCAL = {"RAY_ADDRESS": "local"}


def body(s3: Any, key: str) -> bytes:
    data: bytes = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return data


def test_a_model_is_trained_killed_resumed_and_put_to_work_with_nothing_on_disk(
    s3: Any, tmp_path: Path, colours: Callable[[int], Path]
) -> None:
    manifest = colours(60)
    for file in (manifest, *(tmp_path / "images").iterdir()):
        s3.upload_file(str(file), BUCKET, str(file.relative_to(tmp_path)))
    train = (
        *("train", "--data.train", url("manifest.csv"), "--output", url("bundle")),
        *("--model.name", "small_cnn", "--model.options", "{width: 8}", "--epochs", 16),
        *("--batch-size", 10, "--augment", "none"),
    )
    with started(*train, env=LOCAL) as process:
        wait_for(lambda: any("_train/state-000002." in key for key in keys(s3)), 240)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "bundle/bundle.json" not in keys(s3)
    done = imgcls(*train, env=LOCAL)
    assert done.returncode == 0, done.stderr
    assert "going on: epoch " in done.stdout
    assert {"bundle/bundle.json", "bundle/model.safetensors"} <= set(keys(s3))
    history = pq.read_table(io.BytesIO(body(s3, "bundle/history.parquet")))
    assert history["epoch"].to_pylist() == list(range(1, 17))

    done = imgcls(
        *("evaluate", "--manifest", url("manifest.csv"), "--model", url("bundle")),
        *("--output", url("out"), "--slice-by", "camera"),
        env=LOCAL,
    )
    assert done.returncode == 0, done.stderr
    written = set(keys(s3, "out/"))
    assert {"out/_SUCCESS", "out/summary.json", "out/report.html"} <= written
    table = pq.read_table(io.BytesIO(body(s3, "out/predictions/part-00000.parquet")))
    assert table["row"].to_pylist() == list(range(60))
    assert set(table["status"].to_pylist()) == {"ok"}
    told = json.loads(body(s3, "out/summary.json"))["metrics"]["accuracy"]["value"]
    assert told > 0.9
    assert b"data:image/jpeg;base64," in body(s3, "out/report.html")
