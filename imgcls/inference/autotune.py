"""Before a long run, what a worker can do is measured; what follows is decided by it, and said.

The measuring is done on a worker of the very kind that will do the work; the deciding is arithmetic
on what it found. A short run is over before a trial would have paid: it takes what the layout says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import ray

from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import build_malloc_env
from imgcls.data import filesystem, storage_settings
from imgcls.data.filesystem import MAX_IMAGE_BYTES
from imgcls.data.preprocess import DecodeMode
from imgcls.data.storage_settings import StorageConfig
from imgcls.errors import ImageError, StorageError
from imgcls.execution.placement import Placement, PlacementName, ScaleConfig
from imgcls.models.bundle import load_bundle

if TYPE_CHECKING:
    from imgcls.data.preprocess import Preprocess
    from imgcls.models.classifier import Classifier

MIN_BENCHMARK_ROWS = {"cpu": 20_000, "gpu": 200_000, "gpu_decode": 200_000}
"""Rows per worker from which a trial is worth the half minute that it takes."""
MIN_FORWARD_SECONDS = 600.0
"""Seconds of forward passes, per worker, from which compiling is tried."""
GPU_BATCH_SIZES = (64, 128, 256)
"""Batch sizes that are tried on a GPU."""
NEAR_BEST_FRACTION = 0.97
"""The smallest batch within this share of the fastest is taken: it needs the least memory."""
MIN_SPLIT_FRACTION = 0.05
"""A share of the decoding that is smaller than this is not worth being split off."""
BENCHMARK_IMAGES = 64
"""Images that decoding is tried on."""
_MEASURE_SECONDS = 1.0


@dataclass(frozen=True)
class BenchmarkSpec:
    """What to measure.

    batch_sizes: to try
    compile:     whether to try a compiled network too
    decode:      whether to time decoding, by the host and by the device
    """

    batch_sizes: tuple[int, ...]
    compile: bool
    decode: bool


@dataclass(frozen=True)
class BenchmarkInput:
    """What to measure it on.

    rows: that each worker will do
    urls: images from the start of the manifest
    """

    bundle_url: str
    decode: DecodeMode
    precision: str
    rows: int
    urls: tuple[str, ...]
    storage: StorageConfig
    max_bytes: int = MAX_IMAGE_BYTES


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured on one worker, in images per second.

    forward:         by batch size
    compiled:        at the batch size that is taken; None where it was not tried, or failed
    compile_seconds: that the first pass took
    compile_failure: why it could not be compiled, as on a machine without a C++ compiler
    host_decode:     of one core; None without images
    device_decode:   in bulk on the worker's device; None without images
    """

    forward: dict[int, float]
    compiled: float | None = None
    compile_seconds: float = 0.0
    compile_failure: str | None = None
    cpu_decode: float | None = None
    device_decode: float | None = None


@dataclass(frozen=True)
class TunedSettings:
    """What changes results and was decided by measurement, or without one; kept with the run.

    host_share: of the images, decoded on CPUs for GPUs; None where the layout says
    """

    batch_size: int
    compile: bool
    cpu_decode_fraction: float | None = None


def plan_benchmark(
    config: ScaleConfig,
    compile: Literal["auto", "always", "never"],
    layout: Placement,
    rows: int,
    kept: TunedSettings | None,
) -> BenchmarkSpec | None:
    """What is open and worth measuring before so many rows; None when nothing is.

    kept: what this run chose when it began, and stays with
    """
    if kept is not None or rows < MIN_BENCHMARK_ROWS[layout.name] * layout.workers:
        return None
    gpu = layout.name != "cpu"
    decode = gpu and config.layout == "auto" and config.cpu_decode_fraction is None
    open_size = gpu and config.batch_size is None
    asked = BenchmarkSpec(
        GPU_BATCH_SIZES if open_size else (layout.batch_size,), compile == "auto", decode
    )
    return asked if open_size or asked.compile or decode else None


def run_benchmark(
    asked: BenchmarkSpec,
    case: BenchmarkInput,
    layout: Placement,
    interruption: Interruption,
    waiting: Callable[[float], None],
) -> BenchmarkResult:
    """Have a worker of the layout's kind measure it.

    waiting: called with the seconds that have passed, while there is no answer
    """
    begun = time.monotonic()
    task = ray.remote(
        num_cpus=layout.worker_cpus,
        num_gpus=layout.worker_gpus,
        runtime_env=build_malloc_env() if layout.name == "cpu" else {},
    )(measure_rates).remote(asked, case, layout.threads)
    while not ray.wait([task], timeout=0.2)[0]:
        interruption.check()
        waiting(time.monotonic() - begun)
    answer: BenchmarkResult = ray.get(task)
    return answer


def measure_rates(asked: BenchmarkSpec, case: BenchmarkInput, threads: int) -> BenchmarkResult:
    """Try the bundle's network, and decoding, on this process's device."""
    import torch

    from imgcls.models.classifier import Classifier

    storage_settings.set_process_settings(case.storage)
    torch.set_num_threads(threads)
    bundle = load_bundle(case.bundle_url).with_decode(case.decode)
    precision: Any = case.precision
    side = bundle.spec.preprocess.crop
    pixels = torch.randint(0, 256, (max(asked.batch_sizes), 3, side, side), dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)

    def rate(classifier: Classifier, size: int) -> float:
        return size * _measure_rate(lambda: classifier.classify(pixels[:size]))

    plain = Classifier(bundle, precision=precision)
    forward = {}
    for size in asked.batch_sizes:
        if plain.device.type == "cuda":
            plain = Classifier(bundle, precision=precision, batch_size=size)
        forward[size] = rate(plain, size)
    best = choose_batch_size(forward)
    answer = BenchmarkResult(forward)
    if asked.compile and case.rows / forward[best] > MIN_FORWARD_SECONDS:
        start = time.perf_counter()
        try:
            compiled = Classifier(bundle, precision=precision, compile=True, batch_size=best)
            compiled.classify(pixels[:best])
        except Exception as error:  # noqa: BLE001  whatever a compiler raises: nobody asked for it
            answer = replace(answer, compile_failure=str(error).strip().partition("\n")[0])
        else:
            took = time.perf_counter() - start
            answer = replace(answer, compiled=rate(compiled, best), compile_seconds=took)
    return _measure_decoding(answer, case, plain) if asked.decode else answer


def choose_batch_size(forward: dict[int, float]) -> int:
    """The smallest batch size that is as fast as any, or nearly."""
    fastest = max(forward.values())
    return min(size for size, rate in forward.items() if rate >= NEAR_BEST_FRACTION * fastest)


def choose_settings(answer: BenchmarkResult, rows: int) -> tuple[TunedSettings, tuple[str, ...]]:
    """Batch size and compiling, for workers that do so many rows each; and why."""
    size = choose_batch_size(answer.forward)
    plain = answer.forward[size]
    tried = ", ".join(f"{n}: {rate:,.0f}" for n, rate in sorted(answer.forward.items()))
    reasons = [f"forward pass by batch size, images/s of one worker: {tried}"]
    if answer.compile_failure is not None:
        reasons.append(f"not compiled: {answer.compile_failure}")
    if answer.compiled is None:
        return TunedSettings(size, False), tuple(reasons)
    saved = rows * (1 / plain - 1 / answer.compiled) - answer.compile_seconds
    pays = saved > answer.compile_seconds
    reasons.append(
        f"compiled {answer.compiled:,.0f} images/s instead of {plain:,.0f}, after "
        f"{answer.compile_seconds:.0f} s: over {rows:,} rows a worker "
        f"{'saves' if saved > 0 else 'loses'} {abs(saved):,.0f} s; "
        f"{'compiled' if pays else 'not compiled'}"
    )
    return TunedSettings(size, pays), tuple(reasons)


def balance_decoding(
    answer: BenchmarkResult, layout: Placement, choice: TunedSettings
) -> tuple[TunedSettings, str]:
    """The choice with the decoding shared out between CPUs and GPUs as fast as they are; and why.

    With D images/s decoded by all CPUs, n GPUs that decode g and classify f images/s each, and a
    share s decoded on CPUs, the CPUs allow D / s images/s and the GPUs n / ((1 - s) / g + 1 / f):
    the share at which both are the same.
    """
    if answer.cpu_decode is None or answer.device_decode is None:
        return choice, "decoding: none of the first images can be read; as it was"
    plain = answer.forward[choice.batch_size]
    f = answer.compiled if choice.compile and answer.compiled is not None else plain
    g, hosts = answer.device_decode, layout.prepare_tasks * answer.cpu_decode
    share = hosts * (1 / g + 1 / f) / (layout.workers + hosts / g)
    share = (
        0.0
        if share < MIN_SPLIT_FRACTION
        else 1.0
        if share > 1 - MIN_SPLIT_FRACTION
        else round(share, 2)
    )
    why = (
        f"decoding: {answer.cpu_decode:,.0f} images/s a core, {layout.prepare_tasks} of them, and "
        f"{g:,.0f} a GPU beside {f:,.0f} forward: {share:.0%} of it on CPUs"
    )
    return replace(choice, cpu_decode_fraction=share), why


def apply_decode_split(layout: Placement, choice: TunedSettings) -> Placement:
    """The layout in which the decoding is shared out as chosen."""
    if layout.name == "cpu" or choice.cpu_decode_fraction is None:
        return layout
    name: PlacementName = "gpu" if choice.cpu_decode_fraction == 1 else "gpu_decode"
    return replace(layout, name=name, cpu_decode_fraction=choice.cpu_decode_fraction)


def _measure_decoding(
    answer: BenchmarkResult, case: BenchmarkInput, classifier: Classifier
) -> BenchmarkResult:
    import torch

    from imgcls.data import decode

    blobs = _load_readable(case, classifier.preprocess)
    if not blobs:
        return answer

    def on_the_host() -> None:
        for blob in blobs:
            decode.decode_image(blob, classifier.preprocess)

    def on_the_device() -> None:
        decode.decode_batch(blobs, classifier.preprocess, device=classifier.device)
        if classifier.device.type == "cuda":
            torch.cuda.synchronize()

    return replace(
        answer,
        cpu_decode=len(blobs) * _measure_rate(on_the_host),
        device_decode=len(blobs) * _measure_rate(on_the_device),
    )


def _load_readable(case: BenchmarkInput, preprocess: Preprocess) -> list[bytes]:
    from imgcls.data import decode

    blobs = []
    for url in case.urls:
        try:
            blob = filesystem.read_image(url, case.max_bytes)
            decode.decode_image(blob, preprocess)
        except (StorageError, ImageError):
            continue  # a row with a reason, once it is its turn
        blobs.append(blob)
    return blobs


def _measure_rate(work: Callable[[], object]) -> float:
    """How often a thing can be done in a second, after it was done once."""
    work()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < _MEASURE_SECONDS:
        work()
        done += 1
    return done / (time.perf_counter() - start)
