"""Prometheus metrics of a service with many replicas, as if it were one.

Each replica counts for itself and reports now and then; `Totals` adds up what all of them said,
those included that are gone: a counter never goes back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import chain

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric

MetricSample = tuple[str, str, str, str, tuple[tuple[str, str], ...], float]
"""Family, its help and type, sample, its labels, value."""

_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ReplicaMetrics:
    """What one replica counts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "imgcls_requests",
            "Requests answered.",
            ["route", "status", "key"],
            registry=self._registry,
        )
        self.request_timeout_s = Histogram(
            "imgcls_request_seconds",
            "From the headers of a request to its answer.",
            ["route"],
            buckets=_SECONDS_BUCKETS,
            registry=self._registry,
        )
        self.images = Counter(
            "imgcls_images", "Images answered.", ["status"], registry=self._registry
        )
        self.batch_images = Histogram(
            "imgcls_batch_images",
            "Images per forward pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self._registry,
        )
        self._stage_seconds = Histogram(
            "imgcls_stage_seconds",
            "Time of a thread, per image decoded and per batch classified.",
            ["stage"],
            buckets=_SECONDS_BUCKETS,
            registry=self._registry,
        )
        self.waiting_images = Gauge(
            "imgcls_waiting_images", "Images let in and not answered.", registry=self._registry
        )
        self._model_replicas = Gauge(
            "imgcls_model_replicas",
            "Replicas that answer with the bundle of this hash.",
            ["sha256"],
            registry=self._registry,
        )

    def set_model(self, sha256: str) -> None:
        """Tell of the bundle in use."""
        self._model_replicas.clear()
        self._model_replicas.labels(sha256=sha256).set(1)

    @contextlib.contextmanager
    def time_stage(self, name: str) -> Iterator[None]:
        """Count the time within it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._stage_seconds.labels(stage=name).observe(time.perf_counter() - began)

    def collect_samples(self) -> list[MetricSample]:
        """All counts since the replica began."""
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
    """What all replicas have counted.

    silent_seconds: a replica that was not heard of for so long is gone
    forget_seconds: and does not come back after so long; until then it would be known again
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
        """Take down what a replica has counted since it began."""
        self._reports[replica] = self._clock(), samples

    def find_active_replicas(self) -> set[str]:
        """The replicas that were heard of lately."""
        now = self._clock()
        return {
            name for name, (when, _) in self._reports.items() if now - when <= self._silent_seconds
        }

    def collect(self) -> list[Metric]:
        """The families of all, summed up; gauges of those only that are there."""
        self._retire_replicas()
        names = self.find_active_replicas()
        families: dict[str, Metric] = {}
        said = (
            samples if name in names else _drop_gauges(samples)
            for name, (_, samples) in self._reports.items()
        )
        for name, text, kind, sample, labels, value in _sum_samples(self._retired, *said):
            family = families.setdefault(name, Metric(name, text, kind))
            family.add_sample(sample, dict(labels), value)
        replicas = Metric("imgcls_replicas", "Replicas that are there.", "gauge")
        replicas.add_sample("imgcls_replicas", {}, len(names))
        return [*families.values(), replicas]

    def render(self) -> bytes:
        """In Prometheus' text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def _retire_replicas(self) -> None:
        now = self._clock()
        for replica, (when, samples) in list(self._reports.items()):
            if now - when > self._forget_seconds:
                del self._reports[replica]
                self._retired = _sum_samples(self._retired, _drop_gauges(samples))


def _drop_gauges(samples: list[MetricSample]) -> list[MetricSample]:
    return [sample for sample in samples if sample[2] != "gauge"]


def _sum_samples(*lists: list[MetricSample]) -> list[MetricSample]:
    """The samples of all lists, those of the same name and labels as one."""
    totals: dict[MetricSample, float] = {}
    for sample in chain.from_iterable(lists):
        place = (*sample[:-1], 0.0)
        totals[place] = totals.get(place, 0.0) + sample[-1]
    return [(*place[:-1], value) for place, value in totals.items()]
