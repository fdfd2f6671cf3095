"""Metrics of many replicas, summed up."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from imgcls.serving.metrics import MetricTotals, ReplicaMetrics


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def values(totals: MetricTotals) -> dict[str, float]:
    return {
        sample.name + "".join(sorted(f" {k}={v}" for k, v in sample.labels.items())): sample.value
        for family in text_string_to_metric_families(totals.render().decode())
        for sample in family.samples
    }


def test_replicas_are_summed_and_ended_ones_still_count() -> None:
    clock = Clock()
    totals = MetricTotals(silent_seconds=10, clock=clock)
    one, other = ReplicaMetrics(), ReplicaMetrics()
    one.images.labels(status="ok").inc(3)
    one.batch_images.observe(3)
    one.waiting_images.set(5)
    other.images.labels(status="ok").inc(4)
    other.images.labels(status="truncated").inc()
    other.waiting_images.set(1)
    one.set_model("old")
    for sha256 in ("old", "new"):
        other.set_model(sha256)
    totals.report("one", one.collect_samples())
    totals.report("other", other.collect_samples())
    totals.report(
        "one", one.collect_samples()
    )  # samples count from the start, not from the last report
    found = values(totals)
    assert found["imgcls_images_total status=ok"] == 7
    assert found["imgcls_images_total status=truncated"] == 1
    assert found["imgcls_batch_images_count"] == 1
    assert found["imgcls_waiting_images"] == 6
    assert found["imgcls_replicas"] == 2
    assert found["imgcls_model_replicas sha256=old"] == 1
    assert found["imgcls_model_replicas sha256=new"] == 1

    clock.now = 8
    totals.report("other", other.collect_samples())
    clock.now = 12
    found = values(totals)
    assert found["imgcls_images_total status=ok"] == 7
    assert found["imgcls_batch_images_count"] == 1
    assert found["imgcls_waiting_images"] == 1
    assert found["imgcls_replicas"] == 1
    assert "imgcls_model_replicas sha256=old" not in found
    assert totals.find_active_replicas() == {"other"}


def test_a_replica_that_reports_again_after_a_pause_counts_once() -> None:
    clock = Clock()
    totals = MetricTotals(silent_seconds=10, forget_seconds=100, clock=clock)
    one = ReplicaMetrics()
    one.images.labels(status="ok").inc(5)
    for now in (0, 30, 60):
        clock.now = now
        totals.report("one", one.collect_samples())
        clock.now = now + 15
        assert totals.find_active_replicas() == set()
        assert values(totals)["imgcls_images_total status=ok"] == 5
    clock.now = 1000
    for _ in range(2):
        assert values(totals)["imgcls_images_total status=ok"] == 5
    assert "imgcls_waiting_images" not in values(totals)
