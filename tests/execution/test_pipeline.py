"""The stages of the layouts with GPUs, called by hand in one process, on a CPU."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from imgcls.cluster.session import Node
from imgcls.data.manifest import ManifestConfig, open_manifest
from imgcls.data.storage_settings import StorageConfig
from imgcls.execution import pipeline
from imgcls.execution.heartbeat import Attempt
from imgcls.execution.messages import ChunkResult, ChunkTask
from imgcls.execution.pipeline import GpuWorker, apply_host_limits, prepare_chunk
from imgcls.execution.placement import ScaleConfig, plan_placement
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
    most: int, kind: type, colours: Callable[..., Path], colour_bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "MAX_TRANSFER_BYTES", most)
    manifest = open_manifest(ManifestConfig(path=str(colours(4))))
    plan = plan_at(tmp_path / "out", manifest, classes=["red", "green", "blue"])
    spec = spec_of(tmp_path / "out", plan, manifest, str(colour_bundle), bundle_sha256="")
    made = prepare_chunk(pa.table({"work": [pickle.dumps(ChunkTask(0))]}), spec, 0.0)
    _, ready, _, _ = pickle.loads(made["ready"][0])
    assert type(ready) is kind
    assert len(ready if isinstance(ready, list) else ready.status) == 4


@pytest.mark.parametrize(
    ("on_web", "workers", "limit", "expected"),
    [
        (True, 4, 64, (4, 16, 16)),
        (True, 16, 64, (16, 4, 8)),
        (True, 100, 64, (64, 1, 2)),
        (False, 100, 64, (100, 1, 16)),
    ],
)
def test_workers_together_keep_the_limit_per_host_and_queue_for_it_shortly(
    on_web: bool, workers: int, limit: int, expected: tuple[int, int, int],
    colours: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    manifest = open_manifest(ManifestConfig(path=str(colours(4))))
    plan = plan_at(tmp_path / "out", manifest)
    spec = spec_of(
        tmp_path / "out", plan, manifest, "", on_web=on_web, io_concurrency=16,
        storage=StorageConfig(max_requests_per_host=limit),
    )  # fmt: skip
    layout = plan_placement([Node(cpus=workers, gpus=0)], ScaleConfig())
    shared, planned = apply_host_limits(spec, layout, 1000)
    assert (
        planned.workers,
        shared.storage.max_requests_per_host,
        shared.io_concurrency,
    ) == expected


@pytest.mark.parametrize("host_share", [1.0, 0.0])
def test_workers_that_died_in_either_stage_are_told_of_with_the_chunk(
    host_share: float, colours: Callable[..., Path], colour_bundle: Path, tmp_path: Path
) -> None:
    manifest = open_manifest(ManifestConfig(path=str(colours(4))))
    output = tmp_path / "out"
    plan = plan_at(output, manifest, classes=load_bundle(str(colour_bundle)).spec.classes)
    sha256 = load_bundle(str(colour_bundle)).sha256
    spec = spec_of(output, plan, manifest, str(colour_bundle), bundle_sha256=sha256)
    for stage in ("prepare", "prepare", "classify"):
        Attempt.for_chunk(spec, ChunkTask(0), stage)  # and its worker dies
    ready = prepare_chunk(pa.table({"work": [pickle.dumps(ChunkTask(0))]}), spec, host_share)
    receipt = GpuWorker(spec, 1)(pa.table(ready))
    done: ChunkResult = pickle.loads(receipt["done"][0])
    assert (done.rows, done.status, done.crashes) == (4, {"ok": 4}, 3)
