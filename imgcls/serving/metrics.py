"""Prometheus metrics of a service with many replicas, exposed as those of one process.

Each replica counts for itself and reports its counts regularly. `MetricTotals` adds them up and
keeps the counts of replicas that have ended, so that no counter ever decreases.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import chain

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric

MetricSample = tuple[str, str, str, str, tuple[tuple[str, str], ...], float]
"""Name, help and type of the family; name of the sample; sorted labels; value."""

_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ReplicaMetrics:
    """Metrics of one replica."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "imgcls_requests",
            "HTTP requests.",
            ["route", "status", "key"],
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "imgcls_request_seconds",
            "Time from a request's headers to the end of its response, in seconds.",
            ["route"],
            buckets=_SECONDS_BUCKETS,
            registry=self._registry,
        )
        self.images = Counter(
            "imgcls_images", "Processed images.", ["status"], registry=self._registry
        )
        self.batch_images = Histogram(
            "imgcls_batch_images",
            "Images per forward pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self._registry,
        )
        self._stage_seconds = Histogram(
            "imgcls_stage_seconds",
            "Time of one stage in seconds: decode per image, classify per batch.",
            ["stage"],
            buckets=_SECONDS_BUCKETS,
            registry=self._registry,
        )
        self.waiting_images = Gauge(
            "imgcls_waiting_images", "Images queued or being processed.", registry=self._registry
        )
        self._model_replicas = Gauge(
            "imgcls_model_replicas",
            "Replicas that use the bundle with this SHA-256.",
            ["sha256"],
            registry=self._registry,
        )

    def set_model(self, sha256: str) -> None:
        """Set the bundle in use."""
        self._model_replicas.clear()
        self._model_replicas.labels(sha256=sha256).set(1)

    @contextlib.contextmanager
    def time_stage(self, name: str) -> Iterator[None]:
        """Measure the time of the block as one stage."""
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self._stage_seconds.labels(stage=name).observe(time.perf_counter() - started_at)

    def collect_samples(self) -> list[MetricSample]:
        """All samples, counted since the replica started."""
        return [
            (
                family.name,
                family.documentation,
                family.type,
                sample.name,
                tuple(sorted(sample.labels.items())),
                sample.value,
            )
            for family in self._registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]


class MetricTotals:
    """Metrics summed over all replicas, in the collector interface of prometheus_client.

    silent_seconds: a replica without a report for this time counts as ended
    forget_seconds: after this time its counts are merged and its name is dropped; a replica that
                    reports again before is recognized, so nothing is counted twice
    """

    def __init__(
        self,
        silent_seconds: float = 10.0,
        forget_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._silent_seconds = silent_seconds
        self._forget_seconds = forget_seconds
        self._clock = clock
        self._reports: dict[str, tuple[float, list[MetricSample]]] = {}
        self._retired: list[MetricSample] = []

    def report(self, replica: str, samples: list[MetricSample]) -> None:
        """Store a replica's samples in place of its last ones."""
        self._reports[replica] = self._clock(), samples

    def find_active_replicas(self) -> set[str]:
        """Names of the replicas that have reported within `silent_seconds`."""
        now = self._clock()
        return {
            name
            for name, (reported_at, _) in self._reports.items()
            if now - reported_at <= self._silent_seconds
        }

    def collect(self) -> list[Metric]:
        """All families, summed over replicas; gauges over the active ones only."""
        self._retire_replicas()
        active = self.find_active_replicas()
        families: dict[str, Metric] = {}
        reported = (
            samples if name in active else _drop_gauges(samples)
            for name, (_, samples) in self._reports.items()
        )
        for name, text, kind, sample, labels, value in _sum_samples(self._retired, *reported):
            family = families.setdefault(name, Metric(name, text, kind))
            family.add_sample(sample, dict(labels), value)
        replicas = Metric("imgcls_replicas", "Running replicas.", "gauge")
        replicas.add_sample("imgcls_replicas", {}, len(active))
        return [*families.values(), replicas]

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def _retire_replicas(self) -> None:
        now = self._clock()
        for replica, (reported_at, samples) in list(self._reports.items()):
            if now - reported_at > self._forget_seconds:
                del self._reports[replica]
                self._retired = _sum_samples(self._retired, _drop_gauges(samples))


def _drop_gauges(samples: list[MetricSample]) -> list[MetricSample]:
    return [sample for sample in samples if sample[2] != "gauge"]


def _sum_samples(*lists: list[MetricSample]) -> list[MetricSample]:
    """Sum the values of samples with the same name and labels."""
    totals: dict[MetricSample, float] = {}
    for sample in chain.from_iterable(lists):
        identity = (*sample[:-1], 0.0)
        totals[identity] = totals.get(identity, 0.0) + sample[-1]
    return [(*identity[:-1], value) for identity, value in totals.items()]
