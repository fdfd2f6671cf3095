"""A GPU's limits, and how near the stages of the GPU layouts come to them; needs CUDA, not Ray.

    python -m benchmarks.gpu [--models resnet50 vit_b_16] [--rows 4096] [--source FOLDER]

For each model, in images per second of this machine's first GPU, medians of three:
  forward   pixels that are on the device already, launched kernel by kernel, and as a recorded
            graph, by batch size; compiled, and without cuDNN's fused convolutions, too
  upload    the same from the host's memory, batches handed over without waiting
  nvJPEG    photographs decoded and resized in bulk on the device, of those that it takes
  resize    decoded photographs resized on the device, by one kernel and one by one
  decode    all photographs by one core of the host
  verify    the same, but those for the device are verified and left for it
  chunks    nvJPEG and the forward pass of whole chunks in two threads, as a worker does them;
            and what the slower of the two would allow, and what both in turn would
  train     forward, backward and optimizer steps in bf16, with the convolution algorithms of either
            setting of scale.deterministic, and with those that repeat, the fastest of them measured
A check comes first: the same labels by every route, scores no further apart than 0.01.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.machine import read_cpu
from benchmarks.workloads import SAMPLE, make_bundle, photographs

BATCHES = (64, 128, 256, 512)
CHUNK = 256
REPEATS = 3
TRAIN_BATCH = 64


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_b_16"])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--source", type=Path, default=SAMPLE)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; CPU: {read_cpu()}")
    blobs = [file.read_bytes() for file in photographs(options.source)]
    with tempfile.TemporaryDirectory(prefix="imgcls-gpu-") as folder:
        for model in options.models:
            measure(str(make_bundle(Path(folder), model)), model, blobs, options.rows)


def measure(bundle: str, model: str, blobs: list[bytes], rows: int) -> None:
    import torch

    from imgcls.data.decoding import decode, device_decode
    from imgcls.models.classifier import Classifier

    print(model)
    plain = Classifier.load(bundle, decode="fast")  # a GPU decodes only for this setting
    pixels = np.stack([decode.decode_image(blob, plain.preprocess)[0] for blob in blobs[:CHUNK]])
    check(plain, bundle, pixels)
    best, fastest = measure_forward(bundle, plain, pixels, rows)
    host = np.resize(pixels, (CHUNK, *pixels.shape[1:]))
    report("upload and forward", rate(lambda: classify(best, host, rows), rows))

    prepared = [device_decode.prepare_file(blob, plain.preprocess) for blob in blobs]
    jpegs = [file for file in prepared if isinstance(file, device_decode.DeviceJpeg)]

    def on_the_device(count: int) -> None:
        for start in range(0, count, CHUNK):
            some = [jpegs[i % len(jpegs)] for i in range(start, start + CHUNK)]
            device_decode.decode_batch(some, plain.preprocess, device=plain.device)
        torch.cuda.synchronize()

    def on_the_host(count: int) -> None:
        for i in range(count):
            decode.decode_image(blobs[i % len(blobs)], plain.preprocess)

    def verified_on_the_host(count: int) -> None:
        for i in range(count):
            device_decode.prepare_file(blobs[i % len(blobs)], plain.preprocess)

    def chunks(count: int) -> None:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(one_chunk, range(0, count, CHUNK)))

    def one_chunk(start: int) -> None:
        some = [jpegs[i % len(jpegs)] for i in range(start, start + CHUNK)]
        found = device_decode.decode_batch(some, plain.preprocess, device=plain.device)
        best.classify(torch.stack([each[0] for each in found if isinstance(each, tuple)]))

    decoding = rate(lambda: on_the_device(rows), rows)
    report("nvJPEG", decoding)
    measure_resize(blobs, plain, rows)
    report("decode, one core", rate(lambda: on_the_host(1000), 1000))
    report("verify, one core", rate(lambda: verified_on_the_host(1000), 1000))
    report("chunks, two threads", rate(lambda: chunks(rows), rows))
    report("  the slower of the two allows", min(decoding, fastest))
    report("  both in turn allow", 1 / (1 / decoding + 1 / fastest))
    measure_training(model, plain.preprocess.crop, rows)


def measure_forward(bundle: str, plain: Any, pixels: Any, rows: int) -> tuple[Any, float]:
    """Report the rates of the forward pass; the fastest classifier, and its rate."""
    import torch

    from imgcls.models import fuse_cuda
    from imgcls.models.classifier import Classifier

    best, fastest = plain, 0.0
    for size in BATCHES:
        batch = torch.from_numpy(np.resize(pixels, (size, *pixels.shape[1:]))).cuda()
        graph = Classifier.load(bundle, batch_size=size)
        report(f"forward, {size} by kernels", rate(lambda b=batch: classify(plain, b, rows), rows))  # type: ignore[misc]
        replayed = rate(lambda g=graph, b=batch: classify(g, b, rows), rows)  # type: ignore[misc]
        report(f"forward, {size} as a graph", replayed)
        if replayed > fastest:
            best, fastest = graph, replayed
    size = CHUNK
    compiled = Classifier.load(bundle, batch_size=size, compile=True)
    batch = torch.from_numpy(np.resize(pixels, (size, *pixels.shape[1:]))).cuda()
    report(f"forward, {size} compiled, graph", rate(lambda: classify(compiled, batch, rows), rows))
    with mock.patch.object(fuse_cuda, "insert_cuda_convolutions", return_value=None):
        unfused = Classifier.load(bundle, batch_size=size)
    report(f"forward, {size} not fused, graph", rate(lambda: classify(unfused, batch, rows), rows))
    return best, fastest


def report(what: str, rate: float) -> None:
    print(f"  {what:<34} {rate:10,.0f} images/s", flush=True)


def measure_resize(blobs: list[bytes], plain: Any, rows: int) -> None:
    """Report the rates for a batch of decoded images on the device."""
    import torch

    from imgcls.data.decoding import device_resize
    from imgcls.data.decoding.resize import DecodedImage

    images = []
    for index in range(CHUNK):
        pixels = np.array(Image.open(io.BytesIO(blobs[index % len(blobs)])).convert("RGB"))
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).cuda()
        images.append(DecodedImage(tensor, 1, (tensor.shape[2], tensor.shape[1])))

    def run(count: int) -> None:
        for _ in range(0, count, CHUNK):
            device_resize.resize_batch(images, plain.preprocess)
        torch.cuda.synchronize()

    report("resize, by one kernel", rate(lambda: run(rows), rows))
    with mock.patch.object(device_resize, "_find_kernel", return_value=None):
        report("resize, one by one", rate(lambda: run(rows), rows))


def measure_training(model: str, side: int, rows: int) -> None:
    """Report the rate of training steps for each choice of convolution algorithms."""
    import torch

    from imgcls.models import zoo

    architecture = zoo.adapt_for_training(zoo.resolve_architecture(model))
    network = zoo.build_network(architecture, 1000).train().cuda()
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, fused=True)
    batch = torch.randn(TRAIN_BATCH, 3, side, side, device="cuda")
    batch = batch.to(memory_format=torch.channels_last)
    labels = torch.zeros(TRAIN_BATCH, dtype=torch.long, device="cuda")

    def run(count: int) -> None:
        for _ in range(0, count, TRAIN_BATCH):
            with torch.autocast("cuda", torch.bfloat16):
                logits = network(batch)
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    for name, deterministic, benchmark in (
        ("deterministic true", True, False),
        ("that repeat, fastest", True, True),
        ("deterministic false", False, True),
    ):
        with torch.backends.cudnn.flags(
            enabled=True, deterministic=deterministic, benchmark=benchmark
        ):
            report(f"train, {name}", rate(lambda: run(rows), rows))


def check(plain: Any, bundle: str, pixels: Any) -> None:
    from imgcls.models.classifier import Classifier

    expected = plain.classify(pixels).scores
    for compile in (False, True):
        classifier = Classifier.load(bundle, batch_size=64, compile=compile)
        found = np.concatenate(
            [classifier.classify(pixels[i : i + 64]).scores for i in range(0, len(pixels), 64)]
        )
        if np.abs(found - expected).max() > 0.01:
            raise SystemExit(f"{compile=}: scores differ by {np.abs(found - expected).max():.3f}")


def classify(classifier: Any, batch: Any, rows: int) -> None:
    """Batches one after the other, none waited for but the last ones."""
    pending = [classifier.submit(batch) for _ in range(0, rows, len(batch))]
    for each in pending:
        each.get()


def rate(work: Callable[[], None], count: int) -> float:
    work()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return count / statistics.median(taken)


if __name__ == "__main__":
    main()
