"""Benchmark of one worker: rates of the network by batch size and engine, and of decoding."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from imgcls.cluster.session import DeviceType
from imgcls.data import image_files
from imgcls.data.decoding.preprocess import DecodeMode
from imgcls.data.image_files import MAX_IMAGE_BYTES
from imgcls.data.storage import storage_settings
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import ImageError, RunFailed, StorageError
from imgcls.inference.gpu_errors import describe_out_of_memory
from imgcls.models.bundle import Bundle, EngineName, load_bundle, read_description

if TYPE_CHECKING:
    import torch

    from imgcls.data.decoding.preprocess import Preprocess
    from imgcls.models.classifier import Classifier
    from imgcls.models.scores import PendingScores

MIN_FORWARD_S = 600.0
"""Forward passes per worker, in seconds, from which compiling is benchmarked."""
NEAR_BEST_FRACTION = 0.97
"""The smallest batch size with this fraction of the best rate is chosen: it needs least memory."""
BENCHMARK_IMAGES = 64
"""Number of images to benchmark decoding on."""
DEVICE_DECODE_IMAGES = 256
"""Number of images that a GPU decodes at a time in the benchmark, as many as a chunk has; its rate
rises with their number."""
MAX_BATCHES_AHEAD = 2
"""Number of batches submitted to a GPU before the scores of the first are read, as in a run."""
_MEASURE_S = 1.0

DecodeStep = Literal["decode", "verify"]
DECODE_STEPS: tuple[DecodeStep, ...] = ("decode", "verify")


@dataclass(frozen=True)
class BenchmarkSpec:
    """What to measure.

    batch_sizes: candidates
    compile:     whether to measure a compiled network too
    decode:      whether to measure decoding, on a CPU core and on the device
    engines:     other engines than torch to measure
    """

    batch_sizes: tuple[int, ...]
    compile: bool
    decode: bool
    engines: tuple[EngineName, ...] = ()


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
class OptionRate:
    """Rate of another way to run the network than plain torch, or why it has none.

    rate:    images per second at the chosen batch size; None if the network cannot run so
    seconds: until its first batch was done
    failure: the reason, for example no C++ compiler
    """

    rate: float | None = None
    seconds: float = 0.0
    failure: str | None = None


@dataclass(frozen=True)
class BenchmarkResult:
    """Rates of one worker, in images per second.

    forward:         forward passes, by batch size
    too_large:       the smallest batch size that a GPU had no memory for; None if all fit
    compiled:        compiled; None if not measured
    cpu_decode:      decoding on one core while all cores of a GPU decode; None if not measured
    cpu_verify:      the same, but JPEGs for a GPU are verified and left for it
    device_decode:   decoding in batches on the worker's device, which leaves the other files to
        CPUs; None if no image is one for the device
    engines:         of other engines than torch, by name
    """

    forward: dict[int, float]
    too_large: int | None = None
    compiled: OptionRate | None = None
    cpu_decode: float | None = None
    cpu_verify: float | None = None
    device_decode: float | None = None
    engines: Mapping[EngineName, OptionRate] = field(default_factory=dict)


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
        from imgcls.data.decoding import decode, device_decode

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
    from imgcls.models.large_pages import reserve_large_pages

    storage_settings.set_process_settings(images.storage)
    torch.set_num_threads(threads)
    if planned == "cpu":
        reserve_large_pages()
    bundle = load_bundle(images.bundle_url, needs_classes=False).with_decode(images.decode)
    precision: Any = images.precision
    device = find_worker_device(planned)
    side = bundle.spec.preprocess.crop
    pixels = torch.randint(0, 256, (max(spec.batch_sizes), 3, side, side), dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)

    plain = Classifier(bundle, precision=precision, engine="torch", device=device)
    forward: dict[int, float] = {}
    too_large: int | None = None
    for size in sorted(spec.batch_sizes):
        try:
            if device.type == "cuda":
                plain = Classifier(bundle, precision=precision, device=device, batch_size=size)
            forward[size] = _measure_forward(plain, pixels[:size])
        except torch.OutOfMemoryError as error:
            if not forward:
                raise RunFailed(describe_out_of_memory(error, size)) from error
            too_large = size
            break
    best = choose_batch_size(forward)
    if too_large is not None:  # in place of the one that did not fit
        plain = Classifier(bundle, precision=precision, device=device, batch_size=best)
    result = BenchmarkResult(forward, too_large=too_large)
    options = {"precision": precision, "device": device, "batch_size": best}
    if spec.compile and images.rows / forward[best] > MIN_FORWARD_S:
        compiled = _measure_option(bundle, pixels[:best], compile=True, **options)
        result = replace(result, compiled=compiled)
    others = {
        name: _measure_option(bundle, pixels[:best], engine=name, **options)
        for name in spec.engines
    }
    result = replace(result, engines=others)
    return _measure_decoding(result, images, plain) if spec.decode else result


def _measure_forward(classifier: Classifier, pixels: torch.Tensor) -> float:
    """Images per second in batches of these pixels."""
    pending: collections.deque[PendingScores] = collections.deque()

    def submit() -> None:
        pending.append(classifier.submit(pixels))
        if len(pending) > MAX_BATCHES_AHEAD:
            pending.popleft().get()

    def finish() -> None:
        while pending:
            pending.popleft().get()

    return len(pixels) * _measure_rate(submit, finish)


def _measure_option(bundle: Bundle, pixels: torch.Tensor, **options: Any) -> OptionRate:
    """Rate of a classifier that may fail where the plain one does not."""
    from imgcls.models.classifier import Classifier

    start = time.perf_counter()
    try:
        classifier = Classifier(bundle, **options)
        classifier.classify(pixels)
    except Exception as error:  # noqa: BLE001  it is optional: a failed compiler is no error
        return OptionRate(failure=str(error).strip().partition("\n")[0])
    seconds = time.perf_counter() - start
    return OptionRate(_measure_forward(classifier, pixels), seconds)


def choose_batch_size(forward: dict[int, float]) -> int:
    """The smallest batch size whose rate is close to the best."""
    fastest = max(forward.values())
    return min(size for size, rate in forward.items() if rate >= NEAR_BEST_FRACTION * fastest)


def _measure_decoding(
    result: BenchmarkResult, images: BenchmarkInput, classifier: Classifier
) -> BenchmarkResult:
    import torch

    from imgcls.data.decoding import device_decode

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
    from imgcls.data.decoding import decode

    files = []
    for url in images.urls:
        try:
            file = image_files.read_image(url, images.max_bytes)
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
