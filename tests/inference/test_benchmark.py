"""The rates that a worker measures before a long run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import RunFailed
from imgcls.inference import autotune, benchmark
from imgcls.inference.autotune import TunedSettings
from imgcls.inference.benchmark import BenchmarkInput, BenchmarkSpec
from imgcls.models import classifier as classifiers
from imgcls.models import engines
from imgcls.models.bundle import Bundle
from imgcls.models.classifier import Classifier
from imgcls.models.openvino_engine import ConversionError
from tests.conftest import draw

LONG = 100_000_000


def test_a_worker_measures_its_network_and_its_decoding(color_bundle: Path, tmp_path: Path) -> None:
    good, broken = tmp_path / "good.jpg", tmp_path / "broken.jpg"
    draw("red").save(good)
    broken.write_bytes(b"no image")
    urls = (str(good), str(broken), str(tmp_path / "missing.jpg"))
    images = BenchmarkInput(str(color_bundle), "fast", "fp32", 1, urls, StorageConfig())
    result = benchmark.measure_rates(BenchmarkSpec((8, 16), True, True), images, 1, "cpu")
    assert set(result.forward) == {8, 16}
    assert min(result.forward.values()) > 0
    assert result.compiled is None  # one row is labeled sooner than a network is compiled
    assert result.device_decode is not None
    assert result.device_decode > 0
    decoding = benchmark.DecodeBenchmark(images)
    decoding.load()
    for step in benchmark.DECODE_STEPS:
        assert decoding.measure(step) > 0
    none = benchmark.measure_rates(
        BenchmarkSpec((8,), False, True), replace(images, urls=urls[1:]), 1, "cpu"
    )
    assert none.device_decode is None
    draw("red").save(tmp_path / "missing.jpg", "PNG")  # readable, but not by the device
    png = benchmark.measure_rates(
        BenchmarkSpec((8,), False, True), replace(images, urls=urls[1:]), 1, "cpu"
    )
    assert png.device_decode is None


def test_a_network_that_cannot_be_compiled_runs_uncompiled(
    color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(network: object) -> object:
        raise RuntimeError("No working C++ compiler found\nadvice")

    monkeypatch.setattr(torch, "compile", refuse)
    images = BenchmarkInput(str(color_bundle), "fast", "fp32", LONG, (), StorageConfig())
    result = benchmark.measure_rates(BenchmarkSpec((8,), True, False), images, 1, "cpu")
    tuned, reasons = autotune.choose_settings(result, LONG)
    assert tuned == TunedSettings(8, False)
    assert reasons[1] == "not compiled: No working C++ compiler found"


def test_a_batch_that_is_still_computed_counts_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def submit() -> None:
        clock[0] += 0.25  # 4 batches within the second

    def finish() -> None:
        clock[0] += 1.0  # until the GPU has done them

    assert benchmark._measure_rate(submit, finish) == 2.0


def test_an_engine_is_measured_with_the_time_until_its_first_batch(
    color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_MEASURE_S", 0.05)
    images = BenchmarkInput(str(color_bundle), "fast", "fp32", LONG, (), StorageConfig())
    spec = BenchmarkSpec((8,), False, False, ("openvino",))
    found = benchmark.measure_rates(spec, images, 1, "cpu").engines["openvino"]
    assert found.failure is None
    assert found.rate is not None
    assert found.rate > 0
    assert found.seconds > 0


def test_an_engine_that_cannot_run_the_network_leaves_it_to_torch(
    color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> object:
        raise ConversionError("No conversion rule found for operations: aten::linalg_svd")

    monkeypatch.setattr(engines, "OpenVinoEngine", refuse)
    monkeypatch.setattr(benchmark, "_MEASURE_S", 0.0)
    images = BenchmarkInput(str(color_bundle), "fast", "fp32", LONG, (), StorageConfig())
    spec = BenchmarkSpec((8,), False, False, ("openvino",))
    result = benchmark.measure_rates(spec, images, 1, "cpu")
    tuned, reasons = autotune.choose_settings(result, LONG)
    assert tuned == TunedSettings(8, False, engine="torch")
    assert reasons[1] == (
        f"engine torch: bundle {color_bundle}: OpenVINO cannot run its network: No conversion rule "
        "found for operations: aten::linalg_svd; use --engine torch"
    )


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
    monkeypatch.setattr(benchmark, "_MEASURE_S", 0.0)


def test_a_batch_size_that_a_gpu_has_no_memory_for_is_not_chosen(
    small_gpu: None, color_bundle: Path
) -> None:
    images = BenchmarkInput(str(color_bundle), "fast", "fp32", 1, (), StorageConfig())
    spec = BenchmarkSpec(autotune.GPU_BATCH_SIZES, False, False)
    result = benchmark.measure_rates(spec, images, 1, "cuda")
    assert (set(result.forward), result.too_large) == ({64}, 128)
    tuned, reasons = autotune.choose_settings(result, LONG)
    assert tuned == TunedSettings(64, False)
    assert reasons[0].endswith(", 128: out of memory")
    with pytest.raises(RunFailed, match=r"batches of 128: .*Set a smaller --scale\.batch-size"):
        benchmark.measure_rates(replace(spec, batch_sizes=(128,)), images, 1, "cuda")


@pytest.mark.gpu
def test_a_gpu_is_benchmarked_with_graphs_and_nvjpeg(color_bundle: Path, tmp_path: Path) -> None:
    for i in range(4):
        draw("red", (320, 240), seed=i).save(tmp_path / f"{i}.jpg")
    urls = tuple(str(tmp_path / f"{i}.jpg") for i in range(4))
    images = BenchmarkInput(str(color_bundle), "fast", "auto", 1, urls, StorageConfig())
    spec = BenchmarkSpec(autotune.GPU_BATCH_SIZES, False, True)
    result = benchmark.measure_rates(spec, images, 1, "cuda")
    assert set(result.forward) == set(autotune.GPU_BATCH_SIZES)
    assert min(result.forward.values()) > 0
    assert result.device_decode is not None
    assert result.device_decode > 0
