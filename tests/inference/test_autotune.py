"""What is measured before a long run, and what is decided by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imgcls.cluster.session import Node
from imgcls.data.storage_settings import StorageConfig
from imgcls.execution.pipeline import is_decoded_on_cpu
from imgcls.execution.placement import Placement, ScaleConfig, plan_placement
from imgcls.inference import autotune
from imgcls.inference.autotune import BenchmarkInput, BenchmarkResult, BenchmarkSpec, TunedSettings
from tests.conftest import draw

CPUS = plan_placement([Node(cpus=2, gpus=0)], ScaleConfig())
GPUS = plan_placement([Node(cpus=16, gpus=2, accelerator="H200")], ScaleConfig())
LONG = 100_000_000


# ------------------------------------------------------------------ whether to try


@pytest.mark.parametrize(("layout", "rows"), [(CPUS, 39_999), (GPUS, 399_999)])
def test_a_short_run_tries_nothing(layout: Placement, rows: int) -> None:
    assert autotune.plan_benchmark(ScaleConfig(), "auto", layout, rows, None) is None
    assert autotune.plan_benchmark(ScaleConfig(), "auto", layout, rows + 1, None) is not None


def test_what_is_tried_is_what_nobody_has_said() -> None:
    said = ScaleConfig(batch_size=96, cpu_decode_fraction=0.5)
    assert autotune.plan_benchmark(ScaleConfig(), "auto", CPUS, LONG, None) == BenchmarkSpec(
        (32,), True, False
    )
    assert autotune.plan_benchmark(ScaleConfig(), "never", CPUS, LONG, None) is None
    assert autotune.plan_benchmark(ScaleConfig(), "always", GPUS, LONG, None) == BenchmarkSpec(
        autotune.GPU_BATCH_SIZES, False, True
    )
    given = plan_placement([Node(cpus=16, gpus=2, accelerator="H200")], said)
    assert autotune.plan_benchmark(said, "auto", given, LONG, None) == BenchmarkSpec(
        (96,), True, False
    )
    assert autotune.plan_benchmark(said, "never", given, LONG, None) is None


def test_a_run_that_goes_on_keeps_what_changes_its_results() -> None:
    kept = TunedSettings(64, True)
    assert autotune.plan_benchmark(ScaleConfig(), "auto", CPUS, LONG, kept) is None
    assert autotune.plan_benchmark(ScaleConfig(), "auto", GPUS, LONG, kept) is None
    assert autotune.apply_decode_split(GPUS, kept) == GPUS
    shared = autotune.apply_decode_split(GPUS, TunedSettings(64, True, 0.3))
    assert (shared.name, shared.cpu_decode_fraction) == ("gpu_decode", 0.3)
    assert autotune.apply_decode_split(CPUS, TunedSettings(64, True, 0.3)) == CPUS


# ------------------------------------------------------------------ what follows


def test_the_smallest_batch_that_is_nearly_the_fastest_is_taken() -> None:
    choice, reasons = autotune.choose_settings(
        BenchmarkResult({64: 900, 128: 980, 256: 1000}), LONG
    )
    assert choice == TunedSettings(128, False)
    assert reasons == (
        "forward pass by batch size, images/s of one worker: 64: 900, 128: 980, 256: 1,000",
    )


@pytest.mark.parametrize(
    ("rows", "compiled", "end"),
    [
        (100_000, 125, "saves 140 s; compiled"),
        (60_000, 125, "saves 60 s; not compiled"),  # less than the same again, if it is misjudged
        (20_000, 125, "loses 20 s; not compiled"),
        (100_000, 100, "loses 60 s; not compiled"),
    ],
)
def test_a_network_is_compiled_where_that_pays_back_twice(
    rows: int, compiled: float, end: str
) -> None:
    answer = BenchmarkResult({32: 100}, compiled=compiled, compile_seconds=60)
    choice, reasons = autotune.choose_settings(answer, rows)
    assert choice.compile == end.endswith("; compiled")
    assert reasons[1].endswith(f"over {rows:,} rows a worker {end}")


def test_a_network_that_cannot_be_compiled_is_run_as_it_is(
    colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(network: object) -> object:
        raise RuntimeError("No working C++ compiler found\nadvice")

    monkeypatch.setattr(torch, "compile", refuse)
    case = BenchmarkInput(str(colour_bundle), "fast", "fp32", LONG, (), StorageConfig())
    answer = autotune.measure_rates(BenchmarkSpec((8,), True, False), case, 1)
    choice, reasons = autotune.choose_settings(answer, LONG)
    assert choice == TunedSettings(8, False)
    assert reasons[1] == "not compiled: No working C++ compiler found"


def test_cpus_and_gpus_share_the_decoding_so_that_neither_waits() -> None:
    answer = BenchmarkResult({128: 4000}, cpu_decode=100, device_decode=2000)
    choice, why = autotune.balance_decoding(answer, GPUS, TunedSettings(128, False))
    layout = autotune.apply_decode_split(GPUS, choice)
    share = layout.cpu_decode_fraction
    by_cpus = layout.prepare_tasks * 100 / share
    by_gpus = layout.workers / ((1 - share) / 2000 + 1 / 4000)
    assert 0 < share < 1
    assert by_cpus == pytest.approx(by_gpus, rel=0.03)
    assert layout.name == "gpu_decode"
    assert why.endswith(f"{share:.0%} of it on CPUs")


@pytest.mark.parametrize(("host", "name", "share"), [(1e5, "gpu", 1.0), (1, "gpu_decode", 0.0)])
def test_a_side_that_is_too_slow_to_help_is_left_out(host: float, name: str, share: float) -> None:
    answer = BenchmarkResult({128: 4000}, cpu_decode=host, device_decode=2000)
    choice, _ = autotune.balance_decoding(answer, GPUS, TunedSettings(128, False))
    layout = autotune.apply_decode_split(GPUS, choice)
    assert (layout.name, layout.cpu_decode_fraction) == (name, share)


def test_without_an_image_that_can_be_read_the_layout_stays() -> None:
    choice, why = autotune.balance_decoding(
        BenchmarkResult({128: 4000}), GPUS, TunedSettings(128, False)
    )
    assert autotune.apply_decode_split(GPUS, choice) == GPUS
    assert "none of the first images" in why


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 1.0])
def test_chunks_are_shared_out_evenly(share: float) -> None:
    on_cpus = [is_decoded_on_cpu(chunk, share) for chunk in range(1000)]
    assert sum(on_cpus) == pytest.approx(1000 * share, abs=1)
    for start in range(0, 1000, 100):
        assert sum(on_cpus[start : start + 100]) == pytest.approx(100 * share, abs=1)


# ------------------------------------------------------------------ the measuring


def test_a_worker_measures_its_network_and_its_decoding(
    colour_bundle: Path, tmp_path: Path
) -> None:
    good, broken = tmp_path / "good.jpg", tmp_path / "broken.jpg"
    draw("red").save(good)
    broken.write_bytes(b"no image")
    urls = (str(good), str(broken), str(tmp_path / "missing.jpg"))
    case = BenchmarkInput(str(colour_bundle), "fast", "fp32", 1, urls, StorageConfig())
    answer = autotune.measure_rates(BenchmarkSpec((8, 16), True, True), case, 1)
    assert set(answer.forward) == {8, 16}
    assert min(answer.forward.values()) > 0
    assert answer.compiled is None  # one row is labelled sooner than anything is compiled
    assert answer.cpu_decode is not None
    assert answer.cpu_decode > 0
    assert answer.device_decode is not None
    none = autotune.measure_rates(BenchmarkSpec((8,), False, True), replace(case, urls=urls[1:]), 1)
    assert none.cpu_decode is None
