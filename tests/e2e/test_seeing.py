"""What a run shows: JSON lines for log systems, metrics for Prometheus, its status."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from imgcls.execution.plan import parse_plan
from imgcls.runs import layout
from tests.processes import ALONE, RayCluster, run_here, started, wait_for


def predict(manifest: Path, bundle: Path, output: Path, *more: object) -> list[object]:
    return ["predict", "--manifest", manifest, "--model", bundle, "--output", output, *ALONE, *more]


def test_a_run_logs_json_lines_and_exports_metrics_through_ray(
    colors: Callable[..., Path],
    color_bundle: Path,
    cluster: RayCluster,
    joined: None,
    tmp_path: Path,
) -> None:
    """The run has a process of its own: one that joins Ray again counts everything twice."""
    (node,) = ray.nodes()

    def export() -> list[str]:
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address) as response:
            lines = response.read().decode().splitlines()
        return [line for line in lines if line.startswith("ray_imgcls_")]

    output = tmp_path / "out"
    order = predict(colors(50), color_bundle, output, "--chunk-rows", 16, "--log", "json")
    exported: list[str] = []
    with started(*order, env=cluster.environment()) as driver:
        wait_for((output / "_run.json").exists)
        # what an earlier test's run has counted may be exported during this one
        stored = layout.load_run(str(output))
        assert stored is not None
        run = f'run="{parse_plan(stored).run_id}"'
        deadline = time.monotonic() + 120
        while count_images(exported) < 50:
            assert time.monotonic() < deadline
            exported = [line for line in export() if run in line]
            time.sleep(0.5)
        out, err = driver.communicate(timeout=120)
        assert driver.returncode == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    check_json_lines(lines)
    assert run == f'run="{lines[-1]["run_id"]}"'
    check_metrics(exported)


def count_images(lines: list[str]) -> float:
    counted = [line for line in lines if line.startswith("ray_imgcls_images_total")]
    return sum(float(line.rpartition(" ")[2]) for line in counted)


def check_metrics(lines: list[str]) -> None:
    """The metrics of 50 images of one run, by status."""
    counted = [line for line in lines if line.startswith("ray_imgcls_images_total")]
    assert all('status="ok"' in line for line in counted)
    assert count_images(lines) == 50
    assert any(line.startswith("ray_imgcls_stage_seconds_bucket") for line in lines)


def check_json_lines(lines: list[dict[str, Any]]) -> None:
    """Every line has the run, and each chunk its worker, rows and times."""
    assert all({"time", "event", "message"} <= set(line) for line in lines)
    (plan,) = (line for line in lines if line["event"] == "plan")
    after = lines[lines.index(plan) + 1 :]
    assert {line["run_id"] for line in after} == {plan["run_id"]}
    chunks = [line for line in lines if line["event"] == "chunk"]
    assert sorted(line["chunk"] for line in chunks) == [0, 1, 2, 3]
    assert sum(line["status"]["ok"] for line in chunks) == 50
    assert all(line["worker"].startswith(f"{line['node']}/") for line in chunks)
    assert all(line["seconds"]["prepare"] > 0 for line in chunks)
    assert lines[-1]["event"] == "committed"
    metrics = {line["metric"]: line["value"] for line in lines if line["event"] == "metric"}
    assert metrics["rows"] == 50


def test_status_follows_a_run_while_it_runs_and_after_its_driver_died(
    colors: Callable[..., Path], color_bundle: Path, cluster: RayCluster, tmp_path: Path
) -> None:
    manifest, output = colors(400), tmp_path / "out"
    order = predict(manifest, color_bundle, output, "--chunk-rows", 2, "--lease-seconds", 5)

    def status() -> dict[str, object]:
        done = run_here("status", output, "--json-lines")
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
        progress = output / "_progress.json"
        wait_for(lambda: not progress.exists() or "123456" not in progress.read_text())
        assert not (output / "_SUCCESS").exists()
        assert status().get("images_per_second") != 123456.0
        driver.communicate(timeout=200)
        assert driver.returncode == 0
    ended = status()
    assert (ended["state"], ended["rows_done"]) == ("committed", 400)
    assert ended["status"] == {"ok": 400}
