"""What a run tells of itself: JSON for log systems, numbers for Prometheus, its status."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import ray

from imgcls.runs import layout
from tests.processes import RayCluster, imgcls, started, wait_for


def predict(manifest: Path, bundle: Path, output: Path, *more: object) -> list[object]:
    return ["predict", "--manifest", manifest, "--model", bundle, "--output", output, *more]


def test_in_json_every_line_is_an_object_with_the_run_and_each_chunk_says_where_it_was_done(
    colours: Callable[..., Path], colour_bundle: Path, cluster: RayCluster, tmp_path: Path
) -> None:
    manifest, output = colours(50), tmp_path / "out"
    order = predict(manifest, colour_bundle, output, "--chunk-rows", 16, "--log", "json")
    done = imgcls(*order, env=cluster.environment())
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert all({"time", "event", "message"} <= set(line) for line in told)
    (plan,) = (line for line in told if line["event"] == "plan")
    after = told[told.index(plan) + 1 :]
    assert {line["run_id"] for line in after} == {plan["run_id"]}
    chunks = [line for line in told if line["event"] == "chunk"]
    assert sorted(line["chunk"] for line in chunks) == [0, 1, 2, 3]
    assert sum(line["status"]["ok"] for line in chunks) == 50
    assert all(line["worker"].startswith(f"{line['node']}/") for line in chunks)
    assert all(line["seconds"]["prepare"] > 0 for line in chunks)
    assert told[-1]["event"] == "committed"
    metrics = {line["metric"]: line["value"] for line in told if line["event"] == "metric"}
    assert metrics["rows"] == 50


def test_status_follows_a_run_while_it_goes_on_and_after_its_driver_died(
    colours: Callable[..., Path], colour_bundle: Path, cluster: RayCluster, tmp_path: Path
) -> None:
    manifest, output = colours(400), tmp_path / "out"
    order = predict(manifest, colour_bundle, output, "--chunk-rows", 2, "--lease-seconds", 5)

    def status() -> dict[str, object]:
        done = imgcls("status", output, "--json-lines")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    with started(*order, env=cluster.environment()) as driver:
        wait_for(lambda: len(list(output.glob("_staging/part-*/chunk-*"))) > 5)
        running = status()
        driver.kill()
        driver.wait()
    assert running["state"] == "running"
    assert 0 < running["rows_done"] <= 400  # type: ignore[operator]
    dead = status()
    assert dead["state"] == "waiting"
    assert "driver" in dead
    layout.write_progress(str(output), {"images_per_second": 123456.0})
    with started(*order, env=cluster.environment()) as driver:
        told = output / "_progress.json"
        wait_for(lambda: not told.exists() or "123456" not in told.read_text())
        assert not (output / "_SUCCESS").exists()
        assert status().get("images_per_second") != 123456.0
        driver.communicate(timeout=200)
        assert driver.returncode == 0
    ended = status()
    assert (ended["state"], ended["rows_done"]) == ("committed", 400)
    assert ended["status"] == {"ok": 400}


def test_prometheus_finds_the_numbers_of_a_run_where_ray_shows_them(
    colours: Callable[..., Path], colour_bundle: Path, tmp_path: Path
) -> None:
    manifest, output = colours(60), tmp_path / "out"
    with RayCluster.start(cpus=2, dashboard=True) as cluster:
        ray.init(cluster.address, log_to_driver=False)
        try:
            (port,) = (node["MetricsExportPort"] for node in ray.nodes())
            (address,) = (node["NodeManagerAddress"] for node in ray.nodes())
        finally:
            ray.shutdown()
        order = predict(manifest, colour_bundle, output, "--chunk-rows", 16)
        seen = ""
        with started(*order, env=cluster.environment()) as driver:
            deadline = time.monotonic() + 120
            while "ray_imgcls_images_total" not in seen and time.monotonic() < deadline:
                with urllib.request.urlopen(f"http://{address}:{port}/metrics") as response:
                    seen = response.read().decode()
                time.sleep(0.5)
            _, err = driver.communicate(timeout=120)
            assert driver.returncode == 0, err
    lines = [line for line in seen.splitlines() if line.startswith("ray_imgcls_")]
    counted = [line for line in lines if line.startswith("ray_imgcls_images_total")]
    assert all('status="ok"' in line and 'run="' in line for line in counted)
    assert sum(float(line.rpartition(" ")[2]) for line in counted) == 60
    assert any(line.startswith("ray_imgcls_stage_seconds_bucket") for line in lines)
