"""The benchmark before a long run, and the choice that follows from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import Node
from imgcls.data.storage_settings import StorageConfig
from imgcls.errors import RunFailed
from imgcls.execution.config import ScaleConfig
from imgcls.execution.placement import Placement, plan_placement
from imgcls.execution.worker import is_cpu_chunk
from imgcls.formatting import format_share
from imgcls.inference import autotune
from imgcls.inference.autotune import BenchmarkInput, BenchmarkResult, BenchmarkSpec, TunedSettings
from imgcls.models import classifier as classifiers
from imgcls.models.bundle import Bundle
from imgcls.models.classifier import Classifier
from tests.conftest import draw

CPUS = plan_placement([Node(cpus=2, gpus=0)], ScaleConfig())
GPUS = plan_placement([Node(cpus=16, gpus=2, accelerator="H200")], ScaleConfig())
LONG = 100_000_000


# ------------------------------------------------------------------ what to measure


@pytest.mark.parametrize(("placement", "rows"), [(CPUS, 39_999), (GPUS, 399_999)])
def test_a_short_run_is_not_benchmarked(placement: Placement, rows: int) -> None:
    assert autotune.plan_benchmark(ScaleConfig(), "auto", placement, rows) is None
    assert autotune.plan_benchmark(ScaleConfig(), "auto", placement, rows + 1) is not None


def test_only_automatic_settings_are_benchmarked() -> None:
    scale = ScaleConfig(batch_size=96, cpu_decode_fraction=0.5)
    assert autotune.plan_benchmark(ScaleConfig(), "auto", CPUS, LONG) == BenchmarkSpec(
        (32,), True, False
    )
    assert autotune.plan_benchmark(ScaleConfig(), "never", CPUS, LONG) is None
    assert autotune.plan_benchmark(ScaleConfig(), "always", GPUS, LONG) == BenchmarkSpec(
        autotune.GPU_BATCH_SIZES, False, True
    )
    placement = plan_placement([Node(cpus=16, gpus=2, accelerator="H200")], scale)
    assert autotune.plan_benchmark(scale, "auto", placement, LONG) == BenchmarkSpec(
        (96,), True, False
    )
    assert autotune.plan_benchmark(scale, "never", placement, LONG) is None


def test_a_resumed_run_keeps_what_changes_its_results() -> None:
    def build_input(rows: int) -> BenchmarkInput:
        raise AssertionError("a resumed run is not benchmarked")

    stored = {"batch_size": 64, "compile": True, "host_share": None}
    for placement in (CPUS, GPUS):
        kept = autotune.tune_settings(
            stored, ScaleConfig(), "auto", placement, LONG, build_input, Interruption()
        )
        assert kept == TunedSettings(64, True)
        assert kept.apply_to(placement) == placement
    split = TunedSettings(64, True, 0.3).apply_to(GPUS)
    assert (split.name, split.cpu_decode_fraction) == ("gpu_decode", 0.3)
    assert TunedSettings(64, True, 0.3).apply_to(CPUS) == CPUS


def test_the_stored_choice_has_the_keys_of_earlier_versions() -> None:
    stored = {"batch_size": 64, "compile": True, "host_share": 0.25}
    assert TunedSettings.from_json(stored).to_json() == stored
    del stored["host_share"]  # of a version without GPU decoding
    assert TunedSettings.from_json(stored).cpu_decode_fraction is None


# ------------------------------------------------------------------ the choice


def test_the_smallest_batch_size_close_to_the_best_rate_is_chosen() -> None:
    tuned, reasons = autotune.choose_settings(BenchmarkResult({64: 900, 128: 980, 256: 1000}), LONG)
    assert tuned == TunedSettings(128, False)
    assert reasons == (
        "forward pass by batch size, images/s of one worker: 64: 900, 128: 980, 256: 1,000",
    )


@pytest.mark.parametrize(
    ("rows", "compiled", "end"),
    [
        (100_000, 125, "saves 140 s; compiled"),
        (60_000, 125, "saves 60 s; not compiled"),  # saves less than the compile time
        (20_000, 125, "loses 20 s; not compiled"),
        (100_000, 100, "loses 60 s; not compiled"),
    ],
)
def test_a_network_is_compiled_where_that_saves_twice_its_cost(
    rows: int, compiled: float, end: str
) -> None:
    result = BenchmarkResult({32: 100}, compiled=compiled, compile_seconds=60)
    tuned, reasons = autotune.choose_settings(result, rows)
    assert tuned.compile == end.endswith("; compiled")
    assert reasons[1].endswith(f"over {rows:,} rows per worker {end}")


def test_a_network_that_cannot_be_compiled_runs_uncompiled(
    color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(network: object) -> object:
        raise RuntimeError("No working C++ compiler found\nadvice")

    monkeypatch.setattr(torch, "compile", refuse)
    images = BenchmarkInput(str(color_bundle), "fast", "fp32", LONG, (), StorageConfig())
    result = autotune.measure_rates(BenchmarkSpec((8,), True, False), images, 1, "cpu")
    tuned, reasons = autotune.choose_settings(result, LONG)
    assert tuned == TunedSettings(8, False)
    assert reasons[1] == "not compiled: No working C++ compiler found"


@pytest.mark.parametrize(
    "error", [ray.exceptions.WorkerCrashedError(), ray.exceptions.ActorDiedError()]
)
def test_an_image_that_crashes_the_benchmark_does_not_end_the_run(
    error: ray.exceptions.RayError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> BenchmarkResult:
        raise error

    monkeypatch.setattr(autotune, "run_benchmark", crash)
    images = BenchmarkInput("bundle", "fast", "fp32", LONG, (), StorageConfig())
    tuned = autotune.tune_settings(
        None, ScaleConfig(), "always", GPUS, LONG, lambda _: images, Interruption()
    )
    assert tuned == TunedSettings(128, True)
    assert tuned.apply_to(GPUS) == GPUS


def test_decoding_is_split_so_that_neither_cpus_nor_gpus_wait() -> None:
    result = BenchmarkResult({128: 4000}, cpu_decode=100, cpu_verify=300, device_decode=2000)
    tuned, reason = autotune.balance_decoding(result, GPUS, TunedSettings(128, False))
    placement = tuned.apply_to(GPUS)
    share = placement.cpu_decode_fraction
    by_cpus = placement.prepare_tasks / (share / 100 + (1 - share) / 300)
    by_gpus = placement.workers / ((1 - share) / 2000 + 1 / 4000)
    assert 0 < share < 1
    assert by_cpus == pytest.approx(by_gpus, rel=0.03)
    assert placement.name == "gpu_decode"
    assert reason.endswith(f"{format_share(share)} on CPUs")


@pytest.mark.parametrize(
    ("host", "verify", "name", "share"),
    [
        (1e5, 2e5, "gpu", 1.0),
        (1, 1e4, "gpu_decode", 0.0),
        (50, 100, "gpu_decode", 0.0),  # the CPUs are too slow even to verify for the GPUs
        (100, 100, "gpu", 1.0),  # to verify costs a CPU as much as to decode
        (100, 90, "gpu", 1.0),
    ],
)
def test_a_side_that_is_too_slow_decodes_nothing(
    host: float, verify: float, name: str, share: float
) -> None:
    result = BenchmarkResult({128: 4000}, cpu_decode=host, cpu_verify=verify, device_decode=2000)
    tuned, _ = autotune.balance_decoding(result, GPUS, TunedSettings(128, False))
    placement = tuned.apply_to(GPUS)
    assert (placement.name, placement.cpu_decode_fraction) == (name, share)


def test_without_an_image_for_gpus_the_placement_is_unchanged() -> None:
    tuned, reason = autotune.balance_decoding(
        BenchmarkResult({128: 4000}), GPUS, TunedSettings(128, False)
    )
    assert tuned.apply_to(GPUS) == GPUS
    assert reason == "decoding: on CPUs, none of the first images is one for GPUs to decode"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 1.0])
def test_chunks_are_spread_evenly_over_cpus_and_gpus(share: float) -> None:
    on_cpus = [is_cpu_chunk(chunk, share) for chunk in range(1000)]
    assert sum(on_cpus) == pytest.approx(1000 * share, abs=1)
    for start in range(0, 1000, 100):
        assert sum(on_cpus[start : start + 100]) == pytest.approx(100 * share, abs=1)


# ------------------------------------------------------------------ the benchmark


def test_a_worker_measures_its_network_and_its_decoding(color_bundle: Path, tmp_path: Path) -> None:
    good, broken = tmp_path / "good.jpg", tmp_path / "broken.jpg"
    draw("red").save(good)
    broken.write_bytes(b"no image")
    urls = (str(good), str(broken), str(tmp_path / "missing.jpg"))
    images = BenchmarkInput(str(color_bundle), "fast", "fp32", 1, urls, StorageConfig())
    result = autotune.measure_rates(BenchmarkSpec((8, 16), True, True), images, 1, "cpu")
    assert set(result.forward) == {8, 16}
    assert min(result.forward.values()) > 0
    assert result.compiled is None  # one row is labeled sooner than a network is compiled
    assert result.device_decode is not None
    assert result.device_decode > 0
    decoding = autotune.DecodeBenchmark(images)
    decoding.load()
    for step in autotune.DECODE_STEPS:
        assert decoding.measure(step) > 0
    none = autotune.measure_rates(
        BenchmarkSpec((8,), False, True), replace(images, urls=urls[1:]), 1, "cpu"
    )
    assert none.device_decode is None
    draw("red").save(tmp_path / "missing.jpg", "PNG")  # readable, but not by the device
    png = autotune.measure_rates(
        BenchmarkSpec((8,), False, True), replace(images, urls=urls[1:]), 1, "cpu"
    )
    assert png.device_decode is None


def test_all_cores_of_a_gpu_decode_at_once_when_they_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    class Actor:
        """A core that decodes 400 and verifies 800 images/s while 16 others do."""

        def __init__(self) -> None:
            self.load = SimpleNamespace(remote=lambda: calls.append("load"))
            self.measure = SimpleNamespace(remote=self._measure)

        def _measure(self, step: str) -> float:
            calls.append(step)
            return {"decode": 400.0, "verify": 800.0}[step]

    task = SimpleNamespace(remote=lambda *_: BenchmarkResult({64: 9000}, device_decode=3000))
    actors = SimpleNamespace(remote=lambda *_: Actor())
    fake = SimpleNamespace(
        remote=lambda **_: lambda work: actors if work is autotune.DecodeBenchmark else task,
        wait=lambda references, **_: (references, []),
        get=lambda references: references,
        kill=lambda actor: calls.append("kill"),
    )
    monkeypatch.setattr(autotune, "ray", fake)
    placement = plan_placement([Node(cpus=16, gpus=1, accelerator="H100")], ScaleConfig())
    images = BenchmarkInput("", "fast", "fp32", LONG, (), StorageConfig())
    result = autotune.run_benchmark(
        BenchmarkSpec((64,), False, True), images, placement, Interruption(), lambda waited: None
    )
    assert result == BenchmarkResult(
        {64: 9000}, cpu_decode=400.0, cpu_verify=800.0, device_decode=3000
    )
    assert calls == ["load"] * 17 + ["decode"] * 17 + ["verify"] * 17 + ["kill"] * 17


def test_a_batch_that_is_still_computed_counts_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock[0])

    def submit() -> None:
        clock[0] += 0.25  # 4 batches within the second

    def finish() -> None:
        clock[0] += 1.0  # until the GPU has done them

    assert autotune._measure_rate(submit, finish) == 2.0


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A "GPU", in truth the CPU, with memory for batches of up to 100."""

    class SmallClassifier(Classifier):
        def __init__(self, bundle: Bundle, **options: Any) -> None:
            assert options.pop("device").type == "cuda"
            if (options.pop("batch_size", None) or 1) > 100:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(bundle, device="cpu", **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(classifiers, "Classifier", SmallClassifier)
    monkeypatch.setattr(autotune, "_MEASURE_S", 0.0)


def test_a_batch_size_that_a_gpu_has_no_memory_for_is_not_chosen(
    small_gpu: None, color_bundle: Path
) -> None:
    images = BenchmarkInput(str(color_bundle), "fast", "fp32", 1, (), StorageConfig())
    spec = BenchmarkSpec(autotune.GPU_BATCH_SIZES, False, False)
    result = autotune.measure_rates(spec, images, 1, "cuda")
    assert (set(result.forward), result.too_large) == ({64}, 128)
    tuned, reasons = autotune.choose_settings(result, LONG)
    assert tuned == TunedSettings(64, False)
    assert reasons[0].endswith(", 128: out of memory")
    with pytest.raises(RunFailed, match=r"batches of 128: .*Set a smaller --scale\.batch-size"):
        autotune.measure_rates(replace(spec, batch_sizes=(128,)), images, 1, "cuda")


@pytest.mark.gpu
def test_a_gpu_is_benchmarked_with_graphs_and_nvjpeg(color_bundle: Path, tmp_path: Path) -> None:
    for i in range(4):
        draw("red", (320, 240), seed=i).save(tmp_path / f"{i}.jpg")
    urls = tuple(str(tmp_path / f"{i}.jpg") for i in range(4))
    images = BenchmarkInput(str(color_bundle), "fast", "auto", 1, urls, StorageConfig())
    spec = BenchmarkSpec(autotune.GPU_BATCH_SIZES, False, True)
    result = autotune.measure_rates(spec, images, 1, "cuda")
    assert set(result.forward) == set(autotune.GPU_BATCH_SIZES)
    assert min(result.forward.values()) > 0
    assert result.device_decode is not None
    assert result.device_decode > 0
