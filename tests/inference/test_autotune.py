"""The benchmark before a long run, and the choice that follows from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import Node
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.execution.config import ScaleConfig
from imgcls.execution.placement import Placement, plan_placement
from imgcls.execution.worker import is_cpu_chunk
from imgcls.formatting import format_share
from imgcls.inference import autotune
from imgcls.inference.autotune import TunedSettings
from imgcls.inference.benchmark import BenchmarkInput, BenchmarkResult, BenchmarkSpec, OptionRate
from imgcls.models.bundle import EngineName

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


@pytest.mark.parametrize(
    ("engine", "placement", "compile", "installed", "measured"),
    [
        ("auto", CPUS, "auto", True, ("openvino",)),
        ("auto", CPUS, "never", True, ("openvino",)),
        ("auto", CPUS, "always", True, None),  # OpenVINO takes no compiled network
        ("auto", CPUS, "never", False, None),
        ("auto", GPUS, "auto", True, ()),
        ("torch", CPUS, "auto", True, ()),
        ("openvino", CPUS, "auto", True, None),
    ],
)
def test_openvino_is_measured_on_cpus_where_it_is_installed(
    engine: EngineName, placement: Placement, compile: autotune.CompileMode, installed: bool,
    measured: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(autotune, "is_openvino_installed", lambda: installed)
    spec = autotune.plan_benchmark(ScaleConfig(), compile, placement, LONG, engine)
    assert (None if spec is None else spec.engines) == measured
    assert autotune.plan_benchmark(ScaleConfig(), compile, CPUS, 39_999, engine) is None


@pytest.mark.parametrize(
    ("engine", "used"), [("auto", "torch"), ("torch", "torch"), ("openvino", "openvino")]
)
def test_a_run_that_is_not_benchmarked_takes_torch_unless_another_is_set(
    engine: EngineName, used: str
) -> None:
    def build_input(rows: int) -> BenchmarkInput:
        raise AssertionError("a short run is not benchmarked")

    tuned = autotune.tune_settings(
        None, ScaleConfig(), "auto", CPUS, 100, build_input, Interruption(), engine=engine
    )
    assert tuned == TunedSettings(32, False, engine=used)


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, "openvino"),
        ({"precision": "fp32"}, "openvino"),
        ({"precision": "bf16"}, "torch"),  # a CPU without it has no bf16 in OpenVINO
        ({"precision": "bf16", "bf16": "AMX"}, "openvino"),
        ({"engine": "torch"}, "torch"),
        ({"rows": 1_999}, "torch"),
        ({"compile": "always"}, "torch"),
        ({"placement": GPUS}, "torch"),
        ({"installed": False}, "torch"),
        ({"private": False}, "torch"),
        ({"faster": False}, "torch"),
    ],
)
def test_a_run_of_thousands_of_rows_takes_openvino_where_it_is_known_to_be_faster(
    changes: dict[str, Any], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "engine": "auto", "precision": "auto", "rows": 2_000, "compile": "auto",
        "placement": CPUS, "installed": True, "private": True, "faster": True,
        "bf16": None,
    } | changes  # fmt: skip
    monkeypatch.setattr(autotune, "is_openvino_installed", lambda: given["installed"])
    monkeypatch.setattr(autotune, "is_private_session", lambda: given["private"])
    monkeypatch.setattr(autotune, "is_openvino_faster", lambda: given["faster"])
    monkeypatch.setattr(autotune, "find_bf16_instructions", lambda: given["bf16"])
    tuned = autotune.tune_settings(
        None, ScaleConfig(), given["compile"], given["placement"], given["rows"],
        lambda rows: BenchmarkInput("bundle", "exact", "fp32", rows, (), StorageConfig()),
        Interruption(), engine=given["engine"], precision=given["precision"],
    )  # fmt: skip
    assert tuned.engine == used


def test_a_resumed_run_keeps_what_changes_its_results() -> None:
    def build_input(rows: int) -> BenchmarkInput:
        raise AssertionError("a resumed run is not benchmarked")

    stored = {"batch_size": 64, "compile": True, "host_share": None, "engine": "openvino"}
    for placement in (CPUS, GPUS):
        kept = autotune.tune_settings(
            stored, ScaleConfig(), "auto", placement, LONG, build_input, Interruption(),
            engine="auto",
        )  # fmt: skip
        assert kept == TunedSettings(64, True, engine="openvino")
        assert kept.apply_to(placement) == placement
    split = TunedSettings(64, True, 0.3).apply_to(GPUS)
    assert (split.name, split.cpu_decode_fraction) == ("gpu_decode", 0.3)
    assert TunedSettings(64, True, 0.3).apply_to(CPUS) == CPUS


def test_the_stored_choice_has_the_keys_of_earlier_versions() -> None:
    stored = {"batch_size": 64, "compile": True, "host_share": 0.25, "engine": "openvino"}
    assert TunedSettings.from_json(stored).to_json() == stored
    del stored["host_share"]  # of a version without GPU decoding
    del stored["engine"]  # of a version that ran torch only
    assert TunedSettings.from_json(stored) == TunedSettings(64, True, None, "torch")


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
    result = BenchmarkResult({32: 100}, compiled=OptionRate(compiled, 60))
    tuned, reasons = autotune.choose_settings(result, rows)
    assert tuned.compile == end.endswith("; compiled")
    assert reasons[1].endswith(f"over {rows:,} rows per worker {end}")


@pytest.mark.parametrize(
    ("rate", "seconds", "engine", "end"),
    [
        (125, 4, "openvino", "saves 16 s; engine openvino"),
        (125, 12, "torch", "saves 8 s; engine torch"),  # saves less than the time to convert it
        (103, 0, "torch", "saves 3 s; engine torch"),  # within what a benchmark varies by
        (90, 0, "torch", "loses 11 s; engine torch"),
    ],
)
def test_an_engine_is_chosen_where_it_saves_twice_its_cost(
    rate: float, seconds: float, engine: str, end: str
) -> None:
    result = BenchmarkResult({32: 100}, engines={"openvino": OptionRate(rate, seconds)})
    tuned, reasons = autotune.choose_settings(result, 10_000)
    assert tuned == TunedSettings(32, False, engine=engine)
    assert reasons[1] == (
        f"openvino {rate} images/s instead of 100, after {seconds} s: over 10,000 rows per worker "
        f"{end}"
    )


def test_a_compiled_network_and_an_engine_compete_with_each_other() -> None:
    def choose(engine_rate: float) -> TunedSettings:
        result = BenchmarkResult(
            {32: 100}, compiled=OptionRate(150, 60),
            engines={"openvino": OptionRate(engine_rate, 5)},
        )  # fmt: skip
        return autotune.choose_settings(result, LONG)[0]

    assert choose(149) == TunedSettings(32, True)
    assert choose(200) == TunedSettings(32, False, engine="openvino")


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
