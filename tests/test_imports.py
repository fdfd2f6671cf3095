"""The modules that each kind of process imports at its start, and what is left out of torch."""

from __future__ import annotations

import gc
import subprocess
import sys
from types import ModuleType

import pytest

from imgcls import imports
from imgcls.imports import pause_collector

STORES = {"fsspec", "s3fs", "botocore", "aiobotocore", "gcsfs", "adlfs"}
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}
OPTIONAL = {"matplotlib", "openvino", "timm", "onnx", "mlflow", "wandb", "tensorboardX", "scipy"}
RAY_LIBRARIES = {"ray.train", "ray.tune", "ray.serve", "ray.rllib"}
JOBS = {"imgcls.serving", "imgcls.evaluation", "imgcls.training", "fastapi"}
LARGE = STORES | COMPILER | OPTIONAL | RAY_LIBRARIES | JOBS
PIXELS = {"torch", "torchvision", "PIL"}

PROCESSES = {
    "driver": [
        ("import imgcls.cli, imgcls.inference.predict", LARGE | PIXELS | {"pandas", "ray.data"}),
        ("import imgcls.execution.pipeline", LARGE | PIXELS),
    ],
    "worker of a labeling or a scan": [
        (
            "import ray.data; from imgcls.inference.workers import import_stages; import_stages()",
            LARGE | {"torch._meta_registrations"},
        ),
        ("import imgcls.curation.scan_stage", LARGE | {"torch._meta_registrations"}),
    ],
    "training worker": [
        (
            "import imgcls.training.trainer, imgcls.training.ray_trainer",
            LARGE - {"fsspec", "ray.train", "imgcls.training"} | {"imgcls.inference"},
        ),
    ],
}
"""What kinds of processes import, step by step, and what they must not have imported then."""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_imports_nothing_that_it_does_not_need(process: str) -> None:
    steps = "\n".join(
        f"{imports}\nprint({imports!r}, *sorted({unneeded!r} & set(sys.modules)))"
        for imports, unneeded in PROCESSES[process]
    )
    found = run(f"import sys\n{steps}")
    assert found.splitlines() == [imports for imports, _ in PROCESSES[process]]


WITHOUT_META_KERNELS = """
import sys
from imgcls.imports import import_meta_kernels, import_torch
torch = import_torch()
assert "torch._meta_registrations" not in sys.modules
assert not hasattr(torch, "_meta_registrations")
images, weights = torch.ones(1, 3, 4, 4), torch.ones(2, 3, 3, 3)
convolve = torch.nn.functional.conv2d
assert convolve(images, weights).tolist() == [[[[27.0] * 2] * 2] * 2]
try:
    convolve(images.to("meta"), weights.to("meta"))
except NotImplementedError:
    print("refused")
import_meta_kernels()
print(*convolve(images.to("meta"), weights.to("meta")).shape)
"""


def test_torch_is_imported_without_kernels_that_can_be_imported_later() -> None:
    assert run(WITHOUT_META_KERNELS).splitlines() == ["refused", "1 2 2 2"]


@pytest.mark.parametrize(("version", "is_whole"), [("2.14.9", False), ("2.15.0", True)])
def test_torch_of_a_version_that_was_not_checked_is_imported_as_a_whole(
    version: str, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = ModuleType("torch")
    fake._meta_registrations = None  # type: ignore[attr-defined]
    replaced: list[bool] = []

    def import_module(name: str) -> ModuleType:
        replaced.append(imports.META_KERNELS in sys.modules)
        return fake

    for name in ("torch", imports.META_KERNELS):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(imports, "version", lambda name: version)
    monkeypatch.setattr(imports.importlib, "import_module", import_module)
    assert imports.import_torch() is fake
    assert replaced == [not is_whole]
    assert imports.META_KERNELS not in sys.modules


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_paused_and_then_as_before(is_enabled: bool) -> None:
    if not is_enabled:
        gc.disable()
    try:
        with pause_collector():
            assert not gc.isenabled()
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()
