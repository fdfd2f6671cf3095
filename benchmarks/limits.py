"""What this machine can do at most: decoding, the forward pass, and both, in bare processes.

One process per core, no Ray, nothing written. Each runs with the allocator settings and the batch
size that labelling runs with, and starts to count once all of them are warm.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from benchmarks.workloads import CORES, read_manifest
from imgcls.cluster import keep_memory

BATCH = 32
WHAT = ("both", "forward", "decode", "decode by torchvision", "decode by Pillow")
"""What is measured: all of it, the network alone, and ways to decode:

decode                  ours, with JPEGs scaled in the frequency domain
decode by torchvision   whole, then torchvision's antialiased resize of tensors
decode by Pillow        whole, then the model's documented transforms
"""


def measure(what: str, bundle: Path, manifest: Path) -> float:
    """Images per second of one process per core, start-up and warm-up left out."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(CORES + 1)
    kept = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    os.environ.update(keep_memory()["env_vars"])
    try:
        processes = [
            context.Process(target=_work, args=(what, bundle, manifest, index, barrier))
            for index in range(CORES)
        ]
        for process in processes:
            process.start()
    finally:
        for name in [name for name in os.environ if name.startswith("MALLOC_")]:
            del os.environ[name]
        os.environ.update(kept)
    barrier.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    return len(read_manifest(manifest)) / (time.perf_counter() - start)


def _work(what: str, bundle: Path, manifest: Path, index: int, barrier: Barrier) -> None:
    import numpy as np
    import torch

    from imgcls.models.classifier import Classifier

    torch.set_num_threads(1)
    classifier = Classifier.load(str(bundle))
    paths = read_manifest(manifest)[index::CORES]
    decode = _decoder(what, classifier)
    fixed = np.stack([decode(Path(path).read_bytes()) for path in paths[:BATCH]])

    def run(batch: list[str]) -> None:
        if what == "forward":
            classifier.classify(fixed[: len(batch)])
            return
        pixels = [decode(Path(path).read_bytes()) for path in batch]
        if what == "both":
            classifier.classify(np.stack(pixels))

    run(paths[:BATCH])
    barrier.wait()
    for start in range(0, len(paths), BATCH):
        run(paths[start : start + BATCH])


def _decoder(what: str, classifier: Any) -> Callable[[bytes], Any]:
    import torch
    import torchvision
    from PIL import Image
    from torchvision.transforms import v2

    from imgcls.data import images

    spec = classifier.preprocess
    if what == "decode by Pillow":
        name = classifier.bundle.spec.architecture.name
        transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        return lambda data: transforms(Image.open(io.BytesIO(data)).convert("RGB"))
    if what == "decode by torchvision":
        resize = v2.Compose([v2.Resize(spec.resize, antialias=True), v2.CenterCrop(spec.crop)])

        def whole(data: bytes) -> Any:
            tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return resize(torchvision.io.decode_image(tensor, torchvision.io.ImageReadMode.RGB))

        return whole
    return lambda data: images.decode(data, spec)[0]
