"""The precision that is fastest for the network of a peer on this CPU, found by a measurement.

bfloat16 is emulated on a CPU without it, at a fraction of the speed of float32. ONNX Runtime runs
convolutions on CPUs in float32 only.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from benchmarks import exported_peers, peers
from benchmarks.peer_jobs import read_job
from benchmarks.processes import run_alone

BATCH, ROUNDS = 8, 3
MIN_GAIN = 1.1
"""Rate in bf16, as a multiple of that in fp32, from which bf16 is chosen."""
CANDIDATES: dict[peers.Engine, tuple[str, ...]] = {
    "torch": ("fp32", "bf16"),
    "openvino": ("fp32", "bf16"),
    "onnxruntime": ("fp32",),
}


def choose_precision(rates: Mapping[str, float]) -> str:
    """The fastest precision. rates: of the forward pass by precision, fp32 among them.

    OpenVINO computes in fp32 when bf16 is requested on a CPU without it: equal rates mean fp32.
    """
    return "bf16" if rates.get("bf16", 0.0) > MIN_GAIN * rates["fp32"] else "fp32"


def measure_engines(
    engines: set[peers.Engine], bundle: Path
) -> dict[peers.Engine, dict[str, float]]:
    """Images per CPU second of the forward pass, by engine and precision.

    Each engine runs in its own process with one thread. CPU time: other processes take none of it.
    An engine that crashes is measured in fp32 alone.
    """
    found = {}
    for engine in CANDIDATES:
        if engine in engines:
            try:
                found[engine] = run_alone(_measure, engine, bundle, CANDIDATES[engine])
            except BrokenProcessPool:  # as OpenVINO limited to AVX2 with MobileNetV3 in bf16
                print(f"  the process of {engine} ended early: measured again in fp32 alone")
                found[engine] = run_alone(_measure, engine, bundle, ("fp32",))
    return found


def find_default_precision(engine: peers.Engine, bundle: Path) -> str:
    """The precision of an engine that is given none: bf16 of OpenVINO on CPUs that have it."""
    if engine != "openvino":
        return "fp32"
    return run_alone(exported_peers.find_openvino_default, bundle)


def _measure(engine: peers.Engine, bundle: Path, precisions: tuple[str, ...]) -> dict[str, float]:
    return measure_rates(
        {each: functools.partial(_prepare, engine, bundle, each) for each in precisions}
    )


def measure_rates(prepare: Mapping[str, Callable[[], Callable[[], Any]]]) -> dict[str, float]:
    """Rates by precision, measured in turn.

    prepare: by precision, returns a function that runs a batch; a precision other than fp32 for
        which it raises RuntimeError is left out: OpenVINO limited to AVX2 has no bf16
    """
    run = {}
    for precision, each in prepare.items():
        try:
            run[precision] = each()
            run[precision]()
        except RuntimeError:
            if precision == "fp32":
                raise
            run.pop(precision, None)
    seconds: dict[str, list[float]] = {precision: [] for precision in run}
    for _ in range(ROUNDS):
        for precision, batch in run.items():
            start = time.process_time()
            batch()
            seconds[precision].append(time.process_time() - start)
    return {precision: BATCH / statistics.median(taken) for precision, taken in seconds.items()}


def _prepare(engine: peers.Engine, bundle: Path, precision: str) -> Callable[[], Any]:
    """A function that runs the network of a tuned peer on one batch."""
    import numpy as np

    nowhere = Path()
    job = read_job(bundle, nowhere, nowhere, precision, tuned=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (BATCH, job.crop, job.crop, 3), np.uint8)
    if engine == "torch":
        import torch

        torch.set_num_threads(1)
        inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        predict = peers.network(job)
        return lambda: predict(inputs)
    classify = exported_peers.load_classifier(engine, job, threads=1)
    return lambda: classify(pixels)
