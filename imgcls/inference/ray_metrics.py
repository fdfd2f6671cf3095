"""What a labelling run shows to Prometheus, through Ray's own metrics: recorded by its driver.

Ray exports each under `ray_` and its name here, on every machine's metrics port. All have the tag
`run`, the run's id. `docs/grafana-dashboard.json` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from imgcls.execution.messages import ChunkResult

STAGE_BUCKETS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
"""Of the seconds that a chunk spends in a stage."""


class RayMetrics:
    """The metrics of one run."""

    def __init__(self, run_id: str) -> None:
        def made(kind: Any, name: str, what: str, *tags: str, **more: Any) -> Any:
            metric = kind(name, description=what, tag_keys=("run", *tags), **more)
            metric.set_default_tags({"run": run_id})
            return metric

        self._images = made(
            Counter, "imgcls_images", "Images labelled, by status and node", "status", "node"
        )
        self._bytes = made(Counter, "imgcls_image_bytes", "Bytes of images read, by node", "node")
        self._stage = made(
            Histogram,
            "imgcls_stage_seconds",
            "Seconds that a chunk spent in a stage",
            "stage",
            boundaries=STAGE_BUCKETS,
        )
        self._died = made(Counter, "imgcls_workers_died", "Workers that died or were lost at work")
        self._rows_left = made(Gauge, "imgcls_rows_left", "Rows of the manifest still to be done")
        self._rate = made(Gauge, "imgcls_images_per_second", "Images labelled a second, of late")
        self._workers = made(Gauge, "imgcls_workers", "Workers that have done a chunk of late")
        self._gpu_busy = made(
            Gauge, "imgcls_gpu_busy", "Share of late that the GPUs were at forward passes"
        )

    def record_chunk(self, done: ChunkResult) -> None:
        """A chunk is durable."""
        node = done.worker.partition("/")[0]
        for status, rows in done.status.items():
            self._images.inc(rows, tags={"status": status, "node": node})
        if done.timings.bytes:
            self._bytes.inc(done.timings.bytes, tags={"node": node})
        for stage, seconds in done.timings.seconds().items():
            if seconds > 0:
                self._stage.observe(seconds, tags={"stage": stage})
        if done.crashes:
            self._died.inc(done.crashes)

    def set_progress(self, fields: Mapping[str, Any]) -> None:
        """How far the run is, as `Progress.fields` has it."""
        self._rows_left.set(fields["rows"] - fields["rows_done"])
        self._rate.set(fields["images_per_second"])
        self._workers.set(fields["workers"])
        if fields["gpu_busy"] is not None:
            self._gpu_busy.set(fields["gpu_busy"])
