"""What this machine can do at most: decoding, the forward pass, and both, in bare processes.

One process per core, no Ray, nothing written. Each runs with the allocator settings and the batch
size that prediction runs with, and starts to count once all of them are warm.
"""

from __future__ import annotations

import io
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from benchmarks.machine import CORES
from benchmarks.workloads import read_manifest
from imgcls.cluster.session import build_malloc_env
from imgcls.data.environment import set_env_defaults
from imgcls.models.bundle import EngineName

BATCH = 32
WHAT = (
    *("both", "forward", "decode"),
    *("both by torchvision", "forward by torchvision", "decode by torchvision"),
    "decode by Pillow",
)
"""What is measured: the network alone, decoding alone, and both, each by several routes:

ours            the decoder and an engine of imgcls
by torchvision  JPEGs decoded whole, torchvision's antialiased resize of tensors; its network as it
                is, at the same precision and channels last
by Pillow       JPEGs decoded whole, then the model's documented transforms
"""


def measure(what: str, bundle: Path, manifest: Path, precision: str, engine: EngineName) -> float:
    """Images per second of one process per core, start-up and warm-up left out.

    engine: of imgcls, for its own routes
    Raises RuntimeError if a process has failed, and BrokenBarrierError if it did during warm-up.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(CORES + 1)
    with set_env_defaults(build_malloc_env()["env_vars"]):
        processes = [
            context.Process(
                target=_work, args=(barrier, what, bundle, manifest, precision, engine, index)
            )
            for index in range(CORES)
        ]
        for process in processes:
            process.start()
    barrier.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - start
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{what}: a process has failed, so there is no rate")
    return len(read_manifest(manifest)) / seconds


def _work(barrier: Barrier, *job: Any) -> None:
    """Run a job; the other processes end, too, when one fails."""
    try:
        _run_job(barrier, *job)
    except Exception:
        barrier.abort()
        raise


def _run_job(
    barrier: Barrier,
    what: str,
    bundle: Path,
    manifest: Path,
    precision: str,
    engine: EngineName,
    index: int,
) -> None:
    import torch

    from imgcls.data.decoding import decode
    from imgcls.models.classifier import Classifier
    from imgcls.models.large_pages import reserve_large_pages

    torch.set_num_threads(1)
    reserve_large_pages()
    by_us = " by " not in what
    classifier = Classifier.load(
        str(bundle), precision=precision, engine=engine if by_us else "torch"
    )
    paths = read_manifest(manifest)[index::CORES]
    decoder = _decoder(what, classifier)
    classify = classifier.classify if by_us else _plainly(classifier)
    stack: Callable[[Any], Any] = decode.stack_images if by_us else torch.stack
    forward_alone, decode_alone = what.startswith("forward"), what.startswith("decode")
    fixed = stack([decoder(Path(path).read_bytes()) for path in paths[:BATCH]])

    def run(batch: list[str]) -> None:
        if forward_alone:
            classify(fixed[: len(batch)])
            return
        pixels = [decoder(Path(path).read_bytes()) for path in batch]
        if not decode_alone:
            classify(stack(pixels))

    run(paths[:BATCH])
    barrier.wait()
    for start in range(0, len(paths), BATCH):
        run(paths[start : start + BATCH])


def _plainly(classifier: Any) -> Callable[[Any], Any]:
    """The same network as torchvision has it, and (N, 3, H, W) uint8 through it."""
    import torch

    from imgcls.models import zoo
    from imgcls.models.bundle import load_bundle_weights

    bundle, spec = classifier.bundle, classifier.preprocess
    network = zoo.build_network(bundle.spec.architecture, len(bundle.spec.classes)).eval()
    network.load_state_dict(load_bundle_weights(bundle))
    dtype = torch.bfloat16 if classifier.precision == "bf16" else torch.float32
    network = network.to(dtype).to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))

    @torch.inference_mode()
    def classify(batch: Any) -> Any:
        inputs = batch.contiguous(memory_format=torch.channels_last).float().div_(255)
        return network(inputs.sub_(mean).div_(std).to(dtype)).float().softmax(1).numpy()

    return classify


def _decoder(what: str, classifier: Any) -> Callable[[bytes], Any]:
    import torch
    import torchvision
    from PIL import Image
    from torchvision.transforms import v2

    from imgcls.data.decoding import decode

    spec = classifier.preprocess
    if what == "decode by Pillow":
        name = classifier.bundle.spec.architecture.name
        transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        return lambda data: transforms(Image.open(io.BytesIO(data)).convert("RGB"))
    if what.endswith("by torchvision"):
        resize = v2.Compose([v2.Resize(spec.resize, antialias=True), v2.CenterCrop(spec.crop)])

        def whole(data: bytes) -> Any:
            tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return resize(torchvision.io.decode_image(tensor, torchvision.io.ImageReadMode.RGB))

        return whole
    return lambda data: decode.decode_image(data, spec)[0]
