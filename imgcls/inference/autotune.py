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

from imgcls.cluster.session import Interruption, keep_memory
from imgcls.data import filesystem, object_store
from imgcls.data.filesystem import MAX_BYTES
from imgcls.data.object_store import StorageConfig
from imgcls.data.preprocess import Decode
from imgcls.errors import ImageError, StorageError
from imgcls.execution.placement import Layout, LayoutName, ScaleConfig
from imgcls.models.bundle import load_bundle

if TYPE_CHECKING:
    from imgcls.data.preprocess import Preprocess
    from imgcls.models.classifier import Classifier

WORTH_ROWS = {"cpu": 20_000, "gpu": 200_000, "gpu_decode": 200_000}
"""Rows per worker from which a trial is worth the half minute that it takes."""
WORTH_COMPILING = 600.0
"""Seconds of forward passes, per worker, from which compiling is tried."""
GPU_BATCHES = (64, 128, 256)
"""Batch sizes that are tried on a GPU."""
NEAR = 0.97
"""The smallest batch within this share of the fastest is taken: it needs the least memory."""
EDGE = 0.05
"""A share of the decoding that is smaller than this is not worth being split off."""
IMAGES = 64
"""Images that decoding is tried on."""
_SECONDS = 1.0


@dataclass(frozen=True)
class Question:
    """What to measure.

    batch_sizes: to try
    compile:     whether to try a compiled network too
    decode:      whether to time decoding, by the host and by the device
    """

    batch_sizes: tuple[int, ...]
    compile: bool
    decode: bool


@dataclass(frozen=True)
class Case:
    """What to measure it on.

    rows: that each worker will do
    urls: images from the start of the manifest
    """

    bundle_url: str
    decode: Decode
    precision: str
    rows: int
    urls: tuple[str, ...]
    storage: StorageConfig
    max_bytes: int = MAX_BYTES


@dataclass(frozen=True)
class Answer:
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
    host_decode: float | None = None
    device_decode: float | None = None


@dataclass(frozen=True)
class Choice:
    """What changes results and was decided by measurement, or without one; kept with the run.

    host_share: of the images, decoded on CPUs for GPUs; None where the layout says
    """

    batch_size: int
    compile: bool
    host_share: float | None = None


def question(
    config: ScaleConfig,
    compile: Literal["auto", "always", "never"],
    layout: Layout,
    rows: int,
    kept: Choice | None,
) -> Question | None:
    """What is open and worth measuring before so many rows; None when nothing is.

    kept: what this run chose when it began, and stays with
    """
    if kept is not None or rows < WORTH_ROWS[layout.name] * layout.workers:
        return None
    gpu = layout.name != "cpu"
    decode = gpu and config.layout == "auto" and config.host_share is None
    open_size = gpu and config.batch_size is None
    asked = Question(GPU_BATCHES if open_size else (layout.batch_size,), compile == "auto", decode)
    return asked if open_size or asked.compile or decode else None


def ask(
    asked: Question,
    case: Case,
    layout: Layout,
    interruption: Interruption,
    waiting: Callable[[float], None],
) -> Answer:
    """Have a worker of the layout's kind measure it.

    waiting: called with the seconds that have passed, while there is no answer
    """
    begun = time.monotonic()
    task = ray.remote(
        num_cpus=layout.worker_cpus,
        num_gpus=layout.worker_gpus,
        runtime_env=keep_memory() if layout.name == "cpu" else {},
    )(measure).remote(asked, case, layout.threads)
    while not ray.wait([task], timeout=0.2)[0]:
        interruption.check()
        waiting(time.monotonic() - begun)
    answer: Answer = ray.get(task)
    return answer


def measure(asked: Question, case: Case, threads: int) -> Answer:
    """Try the bundle's network, and decoding, on this process's device."""
    import torch

    from imgcls.models.classifier import Classifier

    object_store.use(case.storage)
    torch.set_num_threads(threads)
    bundle = load_bundle(case.bundle_url).with_decode(case.decode)
    precision: Any = case.precision
    side = bundle.spec.preprocess.crop
    pixels = torch.randint(0, 256, (max(asked.batch_sizes), 3, side, side), dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)

    def rate(classifier: Classifier, size: int) -> float:
        return size * _per_second(lambda: classifier.classify(pixels[:size]))

    plain = Classifier(bundle, precision=precision)
    forward = {}
    for size in asked.batch_sizes:
        if plain.device.type == "cuda":
            plain = Classifier(bundle, precision=precision, batch_size=size)
        forward[size] = rate(plain, size)
    best = batch_of(forward)
    answer = Answer(forward)
    if asked.compile and case.rows / forward[best] > WORTH_COMPILING:
        start = time.perf_counter()
        try:
            compiled = Classifier(bundle, precision=precision, compile=True, batch_size=best)
            compiled.classify(pixels[:best])
        except Exception as error:  # noqa: BLE001  whatever a compiler raises: nobody asked for it
            answer = replace(answer, compile_failure=str(error).strip().partition("\n")[0])
        else:
            took = time.perf_counter() - start
            answer = replace(answer, compiled=rate(compiled, best), compile_seconds=took)
    return _with_decoding(answer, case, plain) if asked.decode else answer


def batch_of(forward: dict[int, float]) -> int:
    """The smallest batch size that is as fast as any, or nearly."""
    fastest = max(forward.values())
    return min(size for size, rate in forward.items() if rate >= NEAR * fastest)


def choose(answer: Answer, rows: int) -> tuple[Choice, tuple[str, ...]]:
    """Batch size and compiling, for workers that do so many rows each; and why."""
    size = batch_of(answer.forward)
    plain = answer.forward[size]
    tried = ", ".join(f"{n}: {rate:,.0f}" for n, rate in sorted(answer.forward.items()))
    reasons = [f"forward pass by batch size, images/s of one worker: {tried}"]
    if answer.compile_failure is not None:
        reasons.append(f"not compiled: {answer.compile_failure}")
    if answer.compiled is None:
        return Choice(size, False), tuple(reasons)
    saved = rows * (1 / plain - 1 / answer.compiled) - answer.compile_seconds
    pays = saved > answer.compile_seconds
    reasons.append(
        f"compiled {answer.compiled:,.0f} images/s instead of {plain:,.0f}, after "
        f"{answer.compile_seconds:.0f} s: over {rows:,} rows a worker "
        f"{'saves' if saved > 0 else 'loses'} {abs(saved):,.0f} s; "
        f"{'compiled' if pays else 'not compiled'}"
    )
    return Choice(size, pays), tuple(reasons)


def split(answer: Answer, layout: Layout, choice: Choice) -> tuple[Choice, str]:
    """The choice with the decoding shared out between CPUs and GPUs as fast as they are; and why.

    With D images/s decoded by all CPUs, n GPUs that decode g and classify f images/s each, and a
    share s decoded on CPUs, the CPUs allow D / s images/s and the GPUs n / ((1 - s) / g + 1 / f):
    the share at which both are the same.
    """
    if answer.host_decode is None or answer.device_decode is None:
        return choice, "decoding: none of the first images can be read; as it was"
    plain = answer.forward[choice.batch_size]
    f = answer.compiled if choice.compile and answer.compiled is not None else plain
    g, hosts = answer.device_decode, layout.decoders * answer.host_decode
    share = hosts * (1 / g + 1 / f) / (layout.workers + hosts / g)
    share = 0.0 if share < EDGE else 1.0 if share > 1 - EDGE else round(share, 2)
    why = (
        f"decoding: {answer.host_decode:,.0f} images/s a core, {layout.decoders} of them, and "
        f"{g:,.0f} a GPU beside {f:,.0f} forward: {share:.0%} of it on CPUs"
    )
    return replace(choice, host_share=share), why


def with_share(layout: Layout, choice: Choice) -> Layout:
    """The layout in which the decoding is shared out as chosen."""
    if layout.name == "cpu" or choice.host_share is None:
        return layout
    name: LayoutName = "gpu" if choice.host_share == 1 else "gpu_decode"
    return replace(layout, name=name, host_share=choice.host_share)


def _with_decoding(answer: Answer, case: Case, classifier: Classifier) -> Answer:
    import torch

    from imgcls.data import decode

    blobs = _readable(case, classifier.preprocess)
    if not blobs:
        return answer

    def on_the_host() -> None:
        for blob in blobs:
            decode.decode(blob, classifier.preprocess)

    def on_the_device() -> None:
        decode.decode_batch(blobs, classifier.preprocess, device=classifier.device)
        if classifier.device.type == "cuda":
            torch.cuda.synchronize()

    return replace(
        answer,
        host_decode=len(blobs) * _per_second(on_the_host),
        device_decode=len(blobs) * _per_second(on_the_device),
    )


def _readable(case: Case, preprocess: Preprocess) -> list[bytes]:
    from imgcls.data import decode

    blobs = []
    for url in case.urls:
        try:
            blob = filesystem.read_image(url, case.max_bytes)
            decode.decode(blob, preprocess)
        except (StorageError, ImageError):
            continue  # a row with a reason, once it is its turn
        blobs.append(blob)
    return blobs


def _per_second(work: Callable[[], object]) -> float:
    """How often a thing can be done in a second, after it was done once."""
    work()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        work()
        done += 1
    return done / (time.perf_counter() - start)
