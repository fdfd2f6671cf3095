"""The modules that each kind of process imports at its start, and what is left out of torch."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from imgcls.cluster.imports import pause_collector

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
    "labeling worker": [
        (
            "import ray.data; from imgcls.inference.workers import import_stages; import_stages()",
            LARGE,
        ),
        ("import imgcls.curation.scan_stage", LARGE),
    ],
    "training worker": [
        (
            "import imgcls.training.trainer, imgcls.training.ray_trainer",
            LARGE - {"fsspec", "ray.train", "imgcls.training"} | {"imgcls.inference"},
        ),
    ],
    "inspector of fetched images": [
        (
            "import imgcls.curation.inspector",
            LARGE | {"torch", "torchvision", "pandas", "pyarrow", "pydantic", "ray"},
        ),
    ],
    "list of runs": [
        (
            "import imgcls.cli, imgcls.evaluation.overview.show",
            LARGE - {"imgcls.evaluation", "imgcls.training"} | PIXELS | {"pandas", "ray"},
        ),
    ],
}
"""What processes of each kind import, step by step, and what they must not have imported then."""


def execute(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


def run(script: str) -> str:
    done = execute(script)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("process", sorted(PROCESSES))
def test_a_process_imports_nothing_that_it_does_not_need(process: str) -> None:
    steps = "\n".join(
        f"{imports}\nprint({imports!r}, *sorted({unneeded!r} & set(sys.modules)))"
        for imports, unneeded in PROCESSES[process]
    )
    found = run(f"import sys\n{steps}")
    assert found.splitlines() == [imports for imports, _ in PROCESSES[process]]


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


def test_a_process_ends_without_collecting_what_it_imported() -> None:
    script = (
        "import atexit, gc\n"
        "from imgcls.cluster.imports import skip_collection_at_exit\n"
        "atexit.register(lambda: print(len(gc.get_objects()), gc.get_freeze_count() > 1_000))\n"
        "for _ in range(2):\n"
        "    skip_collection_at_exit()\n"
        "assert not gc.get_freeze_count()\n"
    )
    left, is_frozen = run(script).split()
    assert int(left) < 100
    assert is_frozen == "True"


def test_a_process_with_duckdb_reports_no_leak() -> None:
    script = (
        "from imgcls.cluster.imports import skip_collection_at_exit\n"
        "skip_collection_at_exit()\n"
        "import duckdb\n"
        "duckdb.sql('select 1').fetchall()\n"
    )
    done = execute(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
