"""Autotuning of a long run: a worker benchmarks the settings left on automatic before it starts.

The benchmark runs on a worker with the resources of the run's workers; the settings are computed
from its results. A short run would end before a benchmark pays: it takes the placement's defaults.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import ray

from imgcls import log
from imgcls.cluster.autoscaler import WaitTimeout
from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import DeviceType, build_malloc_env
from imgcls.data import filesystem, storage_settings
from imgcls.data.filesystem import MAX_IMAGE_BYTES
from imgcls.data.preprocess import DecodeMode
from imgcls.data.storage_settings import StorageConfig
from imgcls.errors import ImageError, RunFailed, StorageError, first_line
from imgcls.execution.config import ScaleConfig
from imgcls.execution.placement import WORKER_CPUS, Placement
from imgcls.formatting import format_count, format_share
from imgcls.inference.gpu_errors import describe_out_of_memory
from imgcls.models.bundle import load_bundle, read_description

if TYPE_CHECKING:
    from imgcls.data.preprocess import Preprocess
    from imgcls.models.classifier import Classifier
    from imgcls.models.scores import PendingScores

MIN_FORWARD_S = 600.0
"""Forward passes per worker, in seconds, from which compiling is benchmarked."""
GPU_BATCH_SIZES = (64, 128, 256)
"""Batch sizes to benchmark on a GPU."""
NEAR_BEST_FRACTION = 0.97
"""The smallest batch size with this fraction of the best rate is chosen: it needs least memory."""
MIN_SPLIT_FRACTION = 0.05
"""Minimum fraction of the decoding that is given to the slower side."""
BENCHMARK_IMAGES = 64
"""Number of images to benchmark decoding on."""
DEVICE_DECODE_IMAGES = 256
"""Number of images that a GPU decodes at a time in the benchmark, as many as a chunk has; its rate
rises with their number."""
MAX_BATCHES_AHEAD = 2
"""Number of batches submitted to a GPU before the scores of the first are read, as in a run."""
_MEASURE_S = 1.0

CompileMode = Literal["auto", "always", "never"]
DecodeStep = Literal["decode", "verify"]
DECODE_STEPS: tuple[DecodeStep, ...] = ("decode", "verify")


@dataclass(frozen=True)
class BenchmarkSpec:
    """What to measure.

    batch_sizes: candidates
    compile:     whether to measure a compiled network too
    decode:      whether to measure decoding, on a CPU core and on the device
    """

    batch_sizes: tuple[int, ...]
    compile: bool
    decode: bool


@dataclass(frozen=True)
class BenchmarkInput:
    """The model and the images to measure on.

    rows: number of rows that each worker will process
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
    """Rates of one worker, in images per second.

    forward:         forward passes, by batch size
    too_large:       the smallest batch size that a GPU had no memory for; None if all fit
    compiled:        compiled, at the chosen batch size; None if not measured, or failed
    compile_seconds: duration of the first compiled forward pass
    compile_failure: why it could not be compiled, for example without a C++ compiler
    cpu_decode:      decoding on one core while all cores of a GPU decode; None if not measured
    cpu_verify:      the same, but JPEGs for a GPU are verified and left for it
    device_decode:   decoding in batches on the worker's device, which leaves the other files to
        CPUs; None if no image is one for the device
    """

    forward: dict[int, float]
    too_large: int | None = None
    compiled: float | None = None
    compile_seconds: float = 0.0
    compile_failure: str | None = None
    cpu_decode: float | None = None
    cpu_verify: float | None = None
    device_decode: float | None = None


@dataclass(frozen=True)
class TunedSettings:
    """Settings that change results and were chosen automatically; stored with the run.

    cpu_decode_fraction: of the images, decoded on CPUs for GPUs; None for the placement's own
    """

    batch_size: int
    compile: bool
    cpu_decode_fraction: float | None = None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TunedSettings:
        """The settings in a `_run.json`."""
        return cls(stored["batch_size"], stored["compile"], stored.get("host_share"))

    def to_json(self) -> dict[str, Any]:
        """The entry `chosen` of `_run.json`; its keys are those of all versions."""
        return {
            "batch_size": self.batch_size,
            "compile": self.compile,
            "host_share": self.cpu_decode_fraction,
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
    spec = plan_benchmark(scale, compile, placement, rows)
    if spec is None:
        return TunedSettings(placement.batch_size, always)
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
        log.emit("note", f"not benchmarked, the worker crashed: {first_line(error)}")
        return TunedSettings(placement.batch_size, always)
    tuned, reasons = choose_settings(result, images.rows)
    tuned = replace(tuned, compile=tuned.compile or always)
    if spec.decode:
        tuned, reason = balance_decoding(result, placement, tuned)
        reasons = (*reasons, reason)
    for reason in reasons:
        log.emit("tune", reason)
    return tuned


def plan_benchmark(
    config: ScaleConfig,
    compile: CompileMode,
    placement: Placement,
    rows: int,
) -> BenchmarkSpec | None:
    """What to measure before a run of some rows; None when nothing is automatic or worth it."""
    if rows < placement.min_benchmark_rows * placement.workers:
        return None
    has_gpus = placement.worker_gpus > 0
    decode = has_gpus and config.layout == "auto" and config.cpu_decode_fraction is None
    tune_batch_size = has_gpus and config.batch_size is None
    spec = BenchmarkSpec(
        GPU_BATCH_SIZES if tune_batch_size else (placement.batch_size,), compile == "auto", decode
    )
    return spec if tune_batch_size or spec.compile or decode else None


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


class DecodeBenchmark:
    """Ray actor that decodes the first images of a run on one core."""

    def __init__(self, images: BenchmarkInput) -> None:
        self._images = images
        self._files: list[bytes] = []
        self._preprocess: Preprocess | None = None

    def load(self) -> None:
        """Read the images that can be decoded."""
        import torch

        torch.set_num_threads(1)
        images = self._images
        storage_settings.set_process_settings(images.storage)
        description = read_description(images.bundle_url).with_decode(images.decode)
        self._preprocess = description.spec.preprocess
        self._files = _load_readable(images, self._preprocess)

    def measure(self, step: DecodeStep) -> float:
        """Images per second.

        step: "decode" every file, or "verify" those that a GPU is to decode, and decode the others
        """
        from imgcls.data import decode, device_decode

        preprocess = self._preprocess
        assert preprocess is not None
        process: Any = {"decode": decode.decode_image, "verify": device_decode.prepare_file}[step]

        def process_all() -> None:
            for file in self._files:
                process(file, preprocess)

        return len(self._files) * _measure_rate(process_all)


def measure_rates(
    spec: BenchmarkSpec, images: BenchmarkInput, threads: int, planned: DeviceType
) -> BenchmarkResult:
    """Measure the bundle's network, and decoding in batches, on the device of the workers.

    Raises RunFailed when not even the smallest batch size fits into the memory of a GPU.
    """
    import torch

    from imgcls.data.cuda import find_worker_device
    from imgcls.models.classifier import Classifier

    storage_settings.set_process_settings(images.storage)
    torch.set_num_threads(threads)
    bundle = load_bundle(images.bundle_url).with_decode(images.decode)
    precision: Any = images.precision
    device = find_worker_device(planned)
    side = bundle.spec.preprocess.crop
    pixels = torch.randint(0, 256, (max(spec.batch_sizes), 3, side, side), dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)

    def rate(classifier: Classifier, size: int) -> float:
        pending: collections.deque[PendingScores] = collections.deque()

        def submit() -> None:
            pending.append(classifier.submit(pixels[:size]))
            if len(pending) > MAX_BATCHES_AHEAD:
                pending.popleft().get()

        def finish() -> None:
            while pending:
                pending.popleft().get()

        return size * _measure_rate(submit, finish)

    plain = Classifier(bundle, precision=precision, device=device)
    forward: dict[int, float] = {}
    too_large: int | None = None
    for size in sorted(spec.batch_sizes):
        try:
            if device.type == "cuda":
                plain = Classifier(bundle, precision=precision, device=device, batch_size=size)
            forward[size] = rate(plain, size)
        except torch.OutOfMemoryError as error:
            if not forward:
                raise RunFailed(describe_out_of_memory(error, size)) from error
            too_large = size
            break
    best = choose_batch_size(forward)
    if too_large is not None:  # in place of the one that did not fit
        plain = Classifier(bundle, precision=precision, device=device, batch_size=best)
    result = BenchmarkResult(forward, too_large=too_large)
    if spec.compile and images.rows / forward[best] > MIN_FORWARD_S:
        start = time.perf_counter()
        try:
            compiled = Classifier(
                bundle, precision=precision, device=device, compile=True, batch_size=best
            )
            compiled.classify(pixels[:best])
        except Exception as error:  # noqa: BLE001  a failed compiler is no error: compiling is optional
            result = replace(result, compile_failure=str(error).strip().partition("\n")[0])
        else:
            took = time.perf_counter() - start
            result = replace(result, compiled=rate(compiled, best), compile_seconds=took)
    return _measure_decoding(result, images, plain) if spec.decode else result


def choose_batch_size(forward: dict[int, float]) -> int:
    """The smallest batch size whose rate is close to the best."""
    fastest = max(forward.values())
    return min(size for size, rate in forward.items() if rate >= NEAR_BEST_FRACTION * fastest)


def choose_settings(result: BenchmarkResult, rows: int) -> tuple[TunedSettings, tuple[str, ...]]:
    """Batch size and compiling for workers with `rows` rows each, and the reasons."""
    size = choose_batch_size(result.forward)
    plain = result.forward[size]
    tried = ", ".join(f"{n}: {rate:,.0f}" for n, rate in sorted(result.forward.items()))
    if result.too_large is not None:
        tried += f", {result.too_large}: out of memory"
    reasons = [f"forward pass by batch size, images/s of one worker: {tried}"]
    if result.compile_failure is not None:
        reasons.append(f"not compiled: {result.compile_failure}")
    if result.compiled is None:
        return TunedSettings(size, False), tuple(reasons)
    saved = rows * (1 / plain - 1 / result.compiled) - result.compile_seconds
    pays = saved > result.compile_seconds
    reasons.append(
        f"compiled {result.compiled:,.0f} images/s instead of {plain:,.0f}, after "
        f"{result.compile_seconds:.0f} s: over {rows:,} rows per worker "
        f"{'saves' if saved > 0 else 'loses'} {abs(saved):,.0f} s; "
        f"{'compiled' if pays else 'not compiled'}"
    )
    return TunedSettings(size, pays), tuple(reasons)


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
    plain = result.forward[tuned.batch_size]
    f = result.compiled if tuned.compile and result.compiled is not None else plain
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


def _measure_decoding(
    result: BenchmarkResult, images: BenchmarkInput, classifier: Classifier
) -> BenchmarkResult:
    import torch

    from imgcls.data import device_decode

    loaded = _load_readable(images, classifier.preprocess)
    prepared = [device_decode.prepare_file(file, classifier.preprocess) for file in loaded]
    files = [file for file in prepared if isinstance(file, device_decode.DeviceJpeg)]
    if not files:
        return result
    fraction = len(files) / len(loaded)

    if classifier.device.type == "cuda":
        repeats = -(-DEVICE_DECODE_IMAGES // len(files))
        files = (files * repeats)[:DEVICE_DECODE_IMAGES]

    def decode_on_device() -> None:
        device_decode.decode_batch(files, classifier.preprocess, device=classifier.device)
        if classifier.device.type == "cuda":
            torch.cuda.synchronize()

    rate = len(files) * _measure_rate(decode_on_device)
    return replace(result, device_decode=rate / fraction)


def _load_readable(images: BenchmarkInput, preprocess: Preprocess) -> list[bytes]:
    from imgcls.data import decode

    files = []
    for url in images.urls:
        try:
            file = filesystem.read_image(url, images.max_bytes)
            decode.decode_image(file, preprocess)
        except (StorageError, ImageError):
            continue  # becomes an error row
        files.append(file)
    return files


def _measure_rate(work: Callable[[], object], finish: Callable[[], object] = lambda: None) -> float:
    """Calls per second, after one call to warm up.

    finish: waits for what the calls have submitted
    """
    work()
    finish()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < _MEASURE_S:
        work()
        done += 1
    finish()
    return done / (time.perf_counter() - start)
