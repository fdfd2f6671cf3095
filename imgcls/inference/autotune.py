"""Autotuning of a long run: a worker benchmarks the settings left on automatic before it starts.

The benchmark runs on a worker with the resources of the run's workers; the settings are computed
from its results. A short run would end before a benchmark pays: it takes the placement's defaults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray

from imgcls import log
from imgcls.cluster.autoscaler import WaitTimeout
from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import build_malloc_env, find_cause, is_private_session
from imgcls.errors import RunFailed, first_line
from imgcls.execution.config import ScaleConfig
from imgcls.execution.placement import WORKER_CPUS, Placement
from imgcls.formatting import format_count, format_share
from imgcls.inference.benchmark import (
    DECODE_STEPS,
    NEAR_BEST_FRACTION,
    BenchmarkInput,
    BenchmarkResult,
    BenchmarkSpec,
    DecodeBenchmark,
    choose_batch_size,
    measure_rates,
)
from imgcls.models.bundle import EngineName, Precision
from imgcls.models.cpu import find_bf16_instructions, is_openvino_faster
from imgcls.models.openvino_package import is_openvino_installed

GPU_BATCH_SIZES = (64, 128, 256)
"""Batch sizes to benchmark on a GPU."""
MIN_OPENVINO_ROWS = 1_000
"""Rows per worker from which OpenVINO saves more time than it takes to convert the network, about a
second for a ResNet-50."""
MIN_SPLIT_FRACTION = 0.05
"""Minimum fraction of the decoding that is given to the slower side."""
CompileMode = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class TunedSettings:
    """Settings that change results and were chosen automatically; stored with the run.

    cpu_decode_fraction: of the images, decoded on CPUs for GPUs; None for the placement's own
    engine: runs the network
    """

    batch_size: int
    compile: bool
    cpu_decode_fraction: float | None = None
    engine: EngineName = "torch"

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TunedSettings:
        """The settings in a `_run.json`."""
        return cls(
            stored["batch_size"],
            stored["compile"],
            stored.get("host_share"),
            stored.get("engine", "torch"),
        )

    def to_json(self) -> dict[str, Any]:
        """The entry `chosen` of `_run.json`; its keys are those of all versions."""
        return {
            "batch_size": self.batch_size,
            "compile": self.compile,
            "host_share": self.cpu_decode_fraction,
            "engine": self.engine,
        }

    def apply_to(self, placement: Placement) -> Placement:
        """The placement in which CPUs and GPUs share the decoding as chosen."""
        if self.cpu_decode_fraction is None:
            return placement
        return placement.with_cpu_decode_fraction(self.cpu_decode_fraction)


def tune_settings(
    stored: Mapping[str, Any] | None,
    scale: ScaleConfig,
    compile: CompileMode,
    placement: Placement,
    rows: int,
    build_input: Callable[[int], BenchmarkInput],
    interruption: Interruption,
    *,
    engine: EngineName = "torch",
    precision: Precision = "auto",
) -> TunedSettings:
    """Choose the automatic settings of a run, with a benchmark if it is a long one; log why.

    stored:      the choice of an earlier driver of the run, which is kept
    rows:        of the whole run
    build_input: called with the rows per worker when a benchmark pays
    Raises RunFailed when no worker can start within `scale.resource_timeout_s`.
    """
    if stored is not None:
        return TunedSettings.from_json(stored)
    always = compile == "always"
    usual = TunedSettings(
        placement.batch_size, always, engine="torch" if engine == "auto" else engine
    )
    spec = plan_benchmark(scale, compile, placement, rows, engine)
    if spec is None:
        if engine == "auto" and not always and is_openvino_default(placement, rows, precision):
            log.emit("tune", "engine openvino: on CPUs with AVX2 it is faster than torch")
            return replace(usual, engine="openvino")
        return usual
    images = build_input(rows // placement.workers)
    timeout = WaitTimeout(scale.resource_timeout_s)
    try:
        result = run_benchmark(
            spec,
            images,
            placement,
            interruption,
            lambda waited: timeout.check(waited, "a benchmark"),
        )
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.RayActorError) as error:
        # a task or an actor, by an image for example: in the run, only its row has an error
        log.emit("note", f"not benchmarked, the worker crashed: {first_line(find_cause(error))}")
        return usual
    tuned, reasons = choose_settings(result, images.rows)
    if engine != "auto":
        tuned = replace(tuned, engine=engine)
    tuned = replace(tuned, compile=tuned.compile or always)
    if spec.decode:
        tuned, reason = balance_decoding(result, placement, tuned)
        reasons = (*reasons, reason)
    for reason in reasons:
        log.emit("tune", reason)
    return tuned


def is_openvino_default(placement: Placement, rows: int, precision: Precision) -> bool:
    """Whether a run that is not benchmarked uses OpenVINO.

    Only in a private session: the CPUs of a cluster's nodes are not known. OpenVINO has no bf16 on
    a CPU without its instructions.
    """
    has_precision = precision in ("auto", "fp32") or (
        precision == "bf16" and find_bf16_instructions() is not None
    )
    return (
        is_openvino_installed()
        and placement.worker_gpus == 0
        and rows >= MIN_OPENVINO_ROWS * placement.workers
        and has_precision
        and is_private_session()
        and is_openvino_faster()
    )


def plan_benchmark(
    config: ScaleConfig,
    compile: CompileMode,
    placement: Placement,
    rows: int,
    engine: EngineName = "torch",
) -> BenchmarkSpec | None:
    """What to measure before a run of some rows; None when nothing is automatic or worth it."""
    if rows < placement.min_benchmark_rows * placement.workers:
        return None
    has_gpus = placement.worker_gpus > 0
    decode = has_gpus and config.layout == "auto" and config.cpu_decode_fraction is None
    tune_batch_size = has_gpus and config.batch_size is None
    may_differ = engine == "auto" and compile != "always" and not has_gpus
    spec = BenchmarkSpec(
        GPU_BATCH_SIZES if tune_batch_size else (placement.batch_size,),
        compile == "auto" and engine != "openvino",
        decode,
        ("openvino",) if may_differ and is_openvino_installed() else (),
    )
    return spec if tune_batch_size or spec.compile or decode or spec.engines else None


def run_benchmark(
    spec: BenchmarkSpec,
    images: BenchmarkInput,
    placement: Placement,
    interruption: Interruption,
    waiting: Callable[[float], None],
) -> BenchmarkResult:
    """Measure on a worker with the resources of the placement's workers, then on its cores.

    waiting: called with the seconds since the start, while there is no result
    """
    started_at = time.monotonic()

    def wait_for(references: list[Any]) -> list[Any]:
        while len(ray.wait(references, num_returns=len(references), timeout=0.2)[0]) < len(
            references
        ):
            interruption.check()
            waiting(time.monotonic() - started_at)
        results: list[Any] = ray.get(references)
        return results

    task = ray.remote(
        num_cpus=placement.worker_cpus,
        num_gpus=placement.worker_gpus,
        runtime_env={} if placement.worker_gpus else build_malloc_env(),
    )(measure_rates).remote(spec, images, placement.threads, placement.device)
    try:
        result: BenchmarkResult = wait_for([task])[0]
    except RunFailed:  # interrupted, or waited too long for the cores
        ray.cancel(task, force=True)
        raise
    if result.device_decode is None:
        return result
    cores = max(1, placement.prepare_tasks // placement.workers)
    cpu_decode, cpu_verify = _measure_cores(images, cores, wait_for)
    return replace(result, cpu_decode=cpu_decode, cpu_verify=cpu_verify)


def _measure_cores(
    images: BenchmarkInput, cores: int, wait_for: Callable[[list[Any]], list[Any]]
) -> tuple[float, float]:
    """Images decoded, and prepared for a GPU, per second and core while all cores work.

    A core that works alone has its caches, its clock and its second thread for itself.
    """
    actor: Any = ray.remote(num_cpus=WORKER_CPUS)(DecodeBenchmark)
    actors = [actor.remote(images) for _ in range(cores)]
    try:
        wait_for([each.load.remote() for each in actors])
        rates = [wait_for([each.measure.remote(step) for each in actors]) for step in DECODE_STEPS]
    finally:
        for each in actors:
            ray.kill(each)
    decoding, verifying = (sum(rate) / cores for rate in rates)
    return decoding, verifying


def choose_settings(result: BenchmarkResult, rows: int) -> tuple[TunedSettings, tuple[str, ...]]:
    """Batch size, engine and compiling for workers with `rows` rows each, and the reasons."""
    size = choose_batch_size(result.forward)
    best = result.forward[size]
    tried = ", ".join(f"{n}: {rate:,.0f}" for n, rate in sorted(result.forward.items()))
    if result.too_large is not None:
        tried += f", {result.too_large}: out of memory"
    reasons = [f"forward pass by batch size, images/s of one worker: {tried}"]
    tuned = TunedSettings(size, False)
    if (compiled := result.compiled) is not None:
        if compiled.rate is None:
            reasons.append(f"not compiled: {compiled.failure}")
        else:
            pays, gain = _describe_gain(best, compiled.rate, compiled.seconds, rows)
            reasons.append(f"compiled {gain}; {'compiled' if pays else 'not compiled'}")
            if pays:
                tuned, best = TunedSettings(size, True), compiled.rate
    for name, option in result.engines.items():
        if option.rate is None:
            reasons.append(f"engine {tuned.engine}: {option.failure}")
            continue
        pays, gain = _describe_gain(best, option.rate, option.seconds, rows)
        if pays and option.rate * NEAR_BEST_FRACTION > best:
            tuned, best = TunedSettings(size, False, engine=name), option.rate
        reasons.append(f"{name} {gain}; engine {tuned.engine}")
    return tuned, tuple(reasons)


def _describe_gain(usual: float, other: float, seconds: float, rows: int) -> tuple[bool, str]:
    """Whether another rate saves more than twice the seconds until it begins, and the numbers."""
    saved = rows * (1 / usual - 1 / other) - seconds
    text = (
        f"{other:,.0f} images/s instead of {usual:,.0f}, after {seconds:.0f} s: over {rows:,} rows "
        f"per worker {'saves' if saved > 0 else 'loses'} {abs(saved):,.0f} s"
    )
    return saved > seconds, text


def balance_decoding(
    result: BenchmarkResult, placement: Placement, tuned: TunedSettings
) -> tuple[TunedSettings, str]:
    """The settings with the decoding split between CPUs and GPUs by their rates, and the reason.

    With all CPUs that decode D or verify V images/s, n GPUs that decode g and classify f images/s
    each, and a fraction s decoded on CPUs, the CPUs allow 1 / (s / D + (1 - s) / V) images/s and
    the GPUs n / ((1 - s) / g + 1 / f). The fraction at which both are equal is chosen.
    """
    if result.cpu_decode is None or result.cpu_verify is None or result.device_decode is None:
        return tuned, "decoding: on CPUs, none of the first images is one for GPUs to decode"
    f = result.forward[tuned.batch_size]
    if tuned.compile and result.compiled is not None and result.compiled.rate is not None:
        f = result.compiled.rate
    g, n = result.device_decode, placement.workers
    decoding = 1 / (placement.prepare_tasks * result.cpu_decode)  # seconds per image
    verifying = 1 / (placement.prepare_tasks * result.cpu_verify)
    on_gpus = 1 / (n * g)
    share = 1.0  # where a CPU verifies no faster than it decodes
    if verifying < decoding:
        share = (on_gpus + 1 / (n * f) - verifying) / (on_gpus + decoding - verifying)
    share = (
        0.0
        if share < MIN_SPLIT_FRACTION
        else 1.0
        if share > 1 - MIN_SPLIT_FRACTION
        else round(share, 2)
    )
    reason = (
        f"decoding: {result.cpu_decode:,.0f} images/s per core, or {result.cpu_verify:,.0f} "
        f"verified, with {format_count(placement.prepare_tasks, 'core')}; {g:,.0f} per GPU that "
        f"classifies {f:,.0f}: {format_share(share)} on CPUs"
    )
    return replace(tuned, cpu_decode_fraction=share), reason
