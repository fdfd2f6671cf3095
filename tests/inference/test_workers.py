"""The stages of the placements with GPUs, called in one process, on a CPU."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from imgcls.data.manifest import ManifestConfig, open_manifest
from imgcls.execution.heartbeat import Attempt
from imgcls.execution.messages import ChunkResult, ChunkTask
from imgcls.execution.worker import run_first_stage, unpack_prepared, unpickle_cell
from imgcls.inference import workers
from imgcls.inference.specs import PredictSpec
from imgcls.inference.stages import PreparedImages
from imgcls.models.bundle import load_bundle
from tests.execution.runs import plan_at, spec_of


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(("most", "kind"), [(10_000_000, list), (100, PreparedImages)])
def test_a_chunk_with_too_many_bytes_for_a_gpu_is_decoded_on_a_cpu(
    most: int, kind: type, colors: Callable[..., Path], color_bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(workers, "MAX_TRANSFER_BYTES", most)
    manifest = open_manifest(ManifestConfig(path=str(colors(4))))
    plan = plan_at(tmp_path / "out", manifest, classes=["red", "green", "blue"])
    spec = spec_of(tmp_path / "out", plan, manifest, str(color_bundle), bundle_sha256="")
    data = unpack_prepared(run_prepare(spec, 0.0)).data
    assert type(data) is kind
    assert len(data if isinstance(data, list) else data.status) == 4


def run_prepare(spec: PredictSpec, cpu_fraction: float) -> pa.Table:
    """The first stage of chunk 0."""
    batch = pa.table({"task": [pickle.dumps(ChunkTask(0))]})
    return run_first_stage(batch, workers.prepare_chunk, spec, cpu_fraction)


@pytest.mark.parametrize("cpu_fraction", [1.0, 0.0])
def test_crashes_in_both_stages_are_counted_in_the_result(
    cpu_fraction: float, colors: Callable[..., Path], color_bundle: Path, tmp_path: Path
) -> None:
    manifest = open_manifest(ManifestConfig(path=str(colors(4))))
    output = tmp_path / "out"
    plan = plan_at(output, manifest, classes=load_bundle(str(color_bundle)).spec.classes)
    sha256 = load_bundle(str(color_bundle)).sha256
    spec = spec_of(output, plan, manifest, str(color_bundle), bundle_sha256=sha256)
    for stage in ("prepare", "prepare", "finish"):
        Attempt.for_chunk(spec, ChunkTask(0), stage)  # and its worker crashes
    finished = workers.GpuWorker(spec, 1)(run_prepare(spec, cpu_fraction))
    result: ChunkResult = unpickle_cell(pa.table(finished), "result")
    assert (result.rows, result.status, result.crashes) == (4, {"ok": 4}, 3)
    assert result.details == {"precision": "fp32"}
