"""Prometheus metrics of a predict run, exported through Ray's metrics by its driver.

Ray exports each under `ray_` and its name here, on the metrics port of every node. All have the tag
`run`, the run's id. `docs/grafana-dashboard.json` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from imgcls.execution.messages import ChunkResult

STAGE_BUCKETS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
"""Bucket boundaries of the seconds that a chunk spends in a stage."""


class RayMetrics:
    """The metrics of one run."""

    def __init__(self, run_id: str) -> None:
        def create(kind: Any, name: str, description: str, *tags: str, **options: Any) -> Any:
            metric = kind(name, description=description, tag_keys=("run", *tags), **options)
            metric.set_default_tags({"run": run_id})
            return metric

        self._images = create(
            Counter, "imgcls_images", "Labeled images, by status and node", "status", "node"
        )
        self._bytes = create(
            Counter, "imgcls_image_bytes", "Bytes of image files read, by node", "node"
        )
        self._stage_seconds = create(
            Histogram,
            "imgcls_stage_seconds",
            "Seconds that a chunk spent in a stage",
            "stage",
            boundaries=STAGE_BUCKETS,
        )
        self._crashes = create(
            Counter, "imgcls_workers_died", "Workers that crashed or were lost while working"
        )
        self._rows_left = create(
            Gauge, "imgcls_rows_left", "Rows of the manifest still to be processed"
        )
        self._rate = create(
            Gauge, "imgcls_images_per_second", "Labeled images per second in the last half minute"
        )
        self._workers = create(Gauge, "imgcls_workers", "Workers that finished a chunk recently")
        self._gpu_busy = create(
            Gauge, "imgcls_gpu_busy", "Fraction of the last half minute in forward passes on GPUs"
        )

    def record_chunk(self, result: ChunkResult) -> None:
        """Add a chunk that is written."""
        node = result.worker.partition("/")[0]
        for status, rows in result.status.items():
            self._images.inc(rows, tags={"status": status, "node": node})
        if result.timings.bytes:
            self._bytes.inc(result.timings.bytes, tags={"node": node})
        for stage, seconds in result.timings.seconds().items():
            if seconds > 0:
                self._stage_seconds.observe(seconds, tags={"stage": stage})
        if result.crashes:
            self._crashes.inc(result.crashes)

    def set_progress(self, snapshot: Mapping[str, Any]) -> None:
        """Set the gauges from `Progress.snapshot`."""
        self._rows_left.set(snapshot["rows"] - snapshot["rows_done"])
        self._rate.set(snapshot["images_per_second"])
        self._workers.set(snapshot["workers"])
        if snapshot["gpu_busy"] is not None:
            self._gpu_busy.set(snapshot["gpu_busy"])
