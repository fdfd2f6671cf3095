"""Forward passes by the engines side by side: python -m benchmarks.engines

One process with one thread, the same batch of 32 for all, batch by batch in turns (OpenVINO runs
each batch in parts of 8); images per CPU second of the process, the median of the rounds and the
quartiles. The networks have random weights: their speed does not depend on them. Set
ONEDNN_MAX_CPU_ISA=AVX2 to measure torch and OpenVINO as on a CPU with AVX2 only; ONNX Runtime
ignores it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import read_cpu
from benchmarks.workloads import make_bundle

BATCH = 32
MODELS = ("resnet18", "resnet50", "mobilenet_v3_small", "timm:tf_efficientnet_lite0", "vit_b_16")
CONTESTANTS = (
    *("torch as torchvision has it", "torch", "onnxruntime", "openvino"),
    *("torch bf16", "openvino bf16", "torch int8", "openvino int8"),
)

Run = Callable[[Any], Any]


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"CPU: {read_cpu()}", flush=True)
    torch.set_num_threads(1)
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            measure(make_bundle(Path(folder), model), model, options.contestants, options.rounds)


def measure(bundle: Path, model: str, contestants: list[str], rounds: int) -> None:
    """Print the rates of one network."""
    from imgcls.models.bundle import load_bundle

    side = load_bundle(str(bundle)).spec.preprocess.crop
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (BATCH, side, side, 3), np.uint8).transpose(0, 3, 1, 2)
    ready: dict[str, Run] = {}
    for name in contestants:
        start = time.perf_counter()
        try:
            ready[name] = _prepare(name, bundle, batch)
            ready[name](batch)
        except Exception as error:  # noqa: BLE001  one that this CPU does not run
            print(f"{model:<28} {name:<28} not run: {str(error).splitlines()[0][:120]}", flush=True)
            ready.pop(name, None)
            continue
        print(
            f"{model:<28} {name:<28} ready after {time.perf_counter() - start:5.1f} s", flush=True
        )
    rates: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, run in ready.items():
            start = time.process_time()
            run(batch)
            rates[name].append(BATCH / (time.process_time() - start))
    base = float(np.median(rates[next(iter(rates))]))
    for name, found in rates.items():
        low, median, high = np.quantile(found, [0.25, 0.5, 0.75])
        spread = f"({low:.1f} to {high:.1f})"
        print(f"{model:<28} {name:<28} {median:8.1f} {median / base:5.2f}  {spread}", flush=True)


def _prepare(name: str, bundle: Path, batch: Any) -> Run:
    from imgcls.evaluation.quantize import calibrate_bundle
    from imgcls.models.bundle import load_bundle
    from imgcls.models.classifier import Classifier

    if name == "torch as torchvision has it":
        return _plain_torch(bundle)
    if name == "onnxruntime":
        return _onnxruntime(bundle)
    engine, _, precision = name.partition(" ")
    engine_name: Any = engine
    wanted: Any = precision or "fp32"
    loaded = load_bundle(str(bundle))
    if wanted == "int8":
        loaded = calibrate_bundle(loaded, engine_name, list(batch), judged_images=1)
    return Classifier(loaded, engine=engine_name, precision=wanted, device="cpu").classify


def _plain_torch(bundle: Path) -> Run:
    import torch

    from imgcls.models import zoo
    from imgcls.models.bundle import load_bundle, load_bundle_weights

    loaded = load_bundle(str(bundle))
    spec = loaded.spec
    network = zoo.build_network(spec.architecture, len(spec.classes)).eval()
    network.load_state_dict(load_bundle_weights(loaded))
    network = network.to(memory_format=torch.channels_last)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (spec.preprocess.mean, spec.preprocess.std)
    )

    @torch.inference_mode()
    def run(batch: Any) -> Any:
        pixels = torch.from_numpy(batch).contiguous(memory_format=torch.channels_last)
        return network(pixels.float().div_(255).sub_(mean).div_(std)).softmax(1).numpy()

    return run


def _onnxruntime(bundle: Path) -> Run:
    import onnxruntime

    from imgcls import log
    from imgcls.models.config import ExportConfig
    from imgcls.models.export import export_bundle

    log.show = lambda *_: None
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(ExportConfig(model=str(bundle), output=folder, formats=["onnx"]))
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(Path(folder) / "model.onnx"), settings, providers=["CPUExecutionProvider"]
        )
    return lambda batch: session.run(None, {"pixels": np.ascontiguousarray(batch)})


if __name__ == "__main__":
    main()
