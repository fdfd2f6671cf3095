"""The stages of the placements with GPUs, called in one process, on a CPU."""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imgcls.cluster.session import DeviceType
from imgcls.curation.scan_worker import ScanSpec, ScanWorker
from imgcls.data import image_files
from imgcls.data.cuda import DEVICE_FAILURE_STATUS
from imgcls.data.decoding import device_decode
from imgcls.data.decoding.device_decode import DecodeResult, DeviceJpeg
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import BundleError, RunFailed, StorageError
from imgcls.execution.completed import read_chunk_rows
from imgcls.execution.heartbeat import CRASHES_TO_CONFIRM, Attempt
from imgcls.execution.messages import ChunkResult, ChunkTask
from imgcls.execution.worker import run_first_stage, unpack_prepared, unpickle_cell
from imgcls.inference import benchmark, workers
from imgcls.inference.benchmark import BenchmarkInput, BenchmarkSpec
from imgcls.inference.specs import ImageSpec, PredictSpec
from imgcls.inference.stages import PreparedImages
from imgcls.models import large_pages
from imgcls.models.bundle import load_bundle
from imgcls.models.openvino_engine import ConversionError
from tests.execution.runs import plan_at, spec_of

pytestmark = pytest.mark.usefixtures("joined")


@pytest.mark.parametrize(
    ("cpu_fraction", "fitting", "on_gpu"), [(0.0, 4, 4), (0.0, 2, 2), (0.0, 0, 0), (1.0, 4, 0)]
)
def test_files_beyond_the_bytes_for_a_gpu_are_decoded_on_a_cpu(
    cpu_fraction: float, fitting: int, on_gpu: int, colors: Callable[..., Path],
    color_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    manifest = open_manifest(ManifestConfig(path=str(colors(4))))
    plan = plan_at(tmp_path / "out", manifest, classes=["red", "green", "blue"])
    spec = spec_of(tmp_path / "out", plan, manifest, str(color_bundle), bundle_sha256="")
    paths = read_chunk_rows(spec, ChunkTask(0)).column("path").to_pylist()[:fitting]
    sizes = [os.path.getsize(str(manifest.resolve(path))) for path in paths]
    monkeypatch.setattr(workers, "MAX_TRANSFER_BYTES", sum(sizes))
    data: PreparedImages = unpack_prepared(run_prepare(spec, cpu_fraction)).data
    assert data.status == ["ok"] * 4
    assert list(data.jpegs) == list(range(on_gpu))
    assert len(data.pixels) == 4 - on_gpu


def run_prepare(spec: PredictSpec, cpu_fraction: float) -> pa.Table:
    """The first stage of chunk 0."""
    batch = pa.table({"task": [pickle.dumps(ChunkTask(0))]})
    return run_first_stage(batch, workers.prepare_chunk, spec, cpu_fraction)


def test_the_garbage_of_a_chunk_is_collected(
    colors: Callable[..., Path], color_bundle: Path, tmp_path: Path
) -> None:
    manifest = open_manifest(ManifestConfig(path=str(colors(2))))
    plan = plan_at(tmp_path / "out", manifest, classes=["red", "green", "blue"])
    spec = spec_of(tmp_path / "out", plan, manifest, str(color_bundle), bundle_sha256="")
    run_prepare(spec, 1.0)
    frozen = gc.get_freeze_count()
    made: list[list[object]] = [[] for _ in range(1_000)]  # a second freeze would count them
    run_prepare(spec, 1.0)
    assert gc.get_freeze_count() <= frozen, "some that were frozen before may be freed"
    del made


def test_a_worker_without_a_gpu_uses_none_although_there_is_one(
    colors: Callable[..., Path], color_bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    manifest = open_manifest(ManifestConfig(path=str(colors(2))))
    bundle = load_bundle(str(color_bundle))
    plan = plan_at(tmp_path / "out", manifest, classes=bundle.spec.classes)
    spec = spec_of(tmp_path / "out", plan, manifest, bundle.url, bundle_sha256=bundle.sha256)
    scan = ScanSpec(
        **{field.name: getattr(spec, field.name) for field in dataclasses.fields(ImageSpec)},
        bundle_url=bundle.url, bundle_sha256=bundle.sha256, decode=None,
    )  # fmt: skip
    for worker in (workers.CpuWorker(spec, 1, "cpu"), ScanWorker(scan, 1, "cpu")):
        assert worker._classifier.device == torch.device("cpu")
    images = BenchmarkInput(bundle.url, "fast", "fp32", 1, (), StorageConfig())
    assert benchmark.measure_rates(BenchmarkSpec((1,), False, False), images, 1, "cpu").forward


@pytest.mark.parametrize("is_automatic", [True, False])
def test_a_network_that_openvino_cannot_run_is_run_by_torch_unless_openvino_was_requested(
    is_automatic: bool, colors: Callable[..., Path], color_bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(*_: object) -> None:
        raise ConversionError("No conversion rule found for operations: aten::linalg_svd")

    monkeypatch.setattr("imgcls.models.engines.OpenVinoEngine", refuse)
    manifest = open_manifest(ManifestConfig(path=str(colors(2))))
    bundle = load_bundle(str(color_bundle))
    plan = plan_at(tmp_path / "out", manifest, classes=bundle.spec.classes)
    spec = spec_of(tmp_path / "out", plan, manifest, bundle.url, bundle_sha256=bundle.sha256)
    spec = replace(spec, engine="openvino", is_engine_automatic=is_automatic)
    if not is_automatic:
        with pytest.raises(BundleError, match=r"aten::linalg_svd; use --engine torch"):
            workers.CpuWorker(spec, 1, "cpu")
        return
    reserved: list[bool] = []
    monkeypatch.setattr(large_pages, "reserve_large_pages", lambda: reserved.append(True))
    worker = workers.CpuWorker(spec, 1, "cpu")
    assert worker.details["engine"].startswith("torch ")
    assert reserved


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RunFailed),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), SystemExit),
    ],
)
def test_without_memory_the_run_ends_and_with_a_gpu_that_fails_the_worker(
    error: RuntimeError, ended: type[BaseException], colors: Callable[..., Path],
    color_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(f"ended with {status}"))
    manifest = open_manifest(ManifestConfig(path=str(colors(2))))
    bundle = load_bundle(str(color_bundle))
    plan = plan_at(tmp_path / "out", manifest, classes=bundle.spec.classes)
    spec = spec_of(tmp_path / "out", plan, manifest, bundle.url, bundle_sha256=bundle.sha256)
    spec = dataclasses.replace(spec, session=ended.__name__)
    worker = workers.GpuWorker(spec, 1, "cpu")
    monkeypatch.setattr(worker._classifier, "submit", fail)
    with pytest.raises(ended) as found:
        worker(run_prepare(spec, 1.0))
    if ended is RunFailed:
        assert "has not enough memory for batches of" in str(found.value)
        assert "Set a smaller --scale.batch-size" in str(found.value)
    else:  # the worker that replaces it counts a crash
        assert str(found.value) == f"ended with {DEVICE_FAILURE_STATUS}"
        assert Attempt.for_chunk(spec, ChunkTask(0), "finish").crashes == 1


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
    finished = workers.GpuWorker(spec, 1, "cpu")(run_prepare(spec, cpu_fraction))
    result: ChunkResult = unpickle_cell(pa.table(finished), "result")
    assert (result.rows, result.status, result.crashes) == (4, {"ok": 4}, 3)
    assert result.details == {"precision": "fp32", "engine": f"torch {torch.__version__}"}


def test_a_worker_runs_the_engine_of_its_run(
    colors: Callable[..., Path], color_bundle: Path, tmp_path: Path
) -> None:
    manifest = open_manifest(ManifestConfig(path=str(colors(2))))
    bundle = load_bundle(str(color_bundle))
    plan = plan_at(tmp_path / "out", manifest, classes=bundle.spec.classes)
    changes = {"bundle_sha256": bundle.sha256, "engine": "openvino"}
    spec = spec_of(tmp_path / "out", plan, manifest, bundle.url, **changes)
    scan = ScanSpec(
        **{field.name: getattr(spec, field.name) for field in dataclasses.fields(ImageSpec)},
        bundle_url=bundle.url, bundle_sha256=bundle.sha256, decode=None, engine="openvino",
    )  # fmt: skip
    for worker in (workers.CpuWorker(spec, 1, "cpu"), ScanWorker(scan, 1, "cpu")):
        assert worker.details["engine"].startswith("openvino ")


def test_a_file_that_crashes_the_process_that_fetches_it_is_a_crashed_row(
    colors: Callable[..., Path], color_bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    manifest = open_manifest(ManifestConfig(path=str(colors(4))))
    plan = plan_at(tmp_path / "out", manifest, classes=["red", "green", "blue"])
    spec = spec_of(tmp_path / "out", plan, manifest, str(color_bundle), bundle_sha256="")
    spec = replace(spec, session="fetching")
    bad = manifest.resolve(read_chunk_rows(spec, ChunkTask(0)).column("path")[2].as_py())
    read = image_files.read_ahead

    def crash(urls: Iterable[str | None], *limits: int) -> Iterator[bytes | StorageError]:
        for url in urls:
            if url == bad:
                raise KilledError
            yield from read([url], *limits)

    monkeypatch.setattr(image_files, "read_ahead", crash)
    for _ in range(spec.crash_retries + 1 + CRASHES_TO_CONFIRM):
        with pytest.raises(KilledError):
            run_prepare(spec, 0.0)
    data = unpack_prepared(run_prepare(spec, 0.0)).data
    assert data.status == ["ok", "ok", "crashed", "ok"]
    assert list(data.jpegs) == [0, 1, 3]


def test_a_file_that_crashes_the_gpu_worker_is_a_crashed_row(
    colors: Callable[..., Path], color_bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    manifest = open_manifest(ManifestConfig(path=str(colors(4))))
    bundle = load_bundle(str(color_bundle))
    plan = plan_at(tmp_path / "out", manifest, classes=bundle.spec.classes)
    spec = spec_of(
        tmp_path / "out", plan, manifest, bundle.url, bundle_sha256=bundle.sha256,
        session="decoding",
    )  # fmt: skip
    prepared = run_prepare(spec, 0.0)
    bad = unpack_prepared(prepared).data.jpegs[2].data
    decode_batch = device_decode.decode_batch

    def crash(files: Sequence[DeviceJpeg], *args: Any, **options: Any) -> list[DecodeResult]:
        if bad in [file.data for file in files]:
            raise KilledError
        return decode_batch(files, *args, **options)

    monkeypatch.setattr(device_decode, "decode_batch", crash)
    worker = workers.GpuWorker(spec, 1, "cpu")
    for _ in range(spec.crash_retries + 1 + CRASHES_TO_CONFIRM):
        with pytest.raises(KilledError):
            worker(prepared)
    result: ChunkResult = unpickle_cell(pa.table(worker(prepared)), "result")
    assert result.status == {"ok": 3, "crashed": 1}


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
def test_a_batch_size_beyond_the_memory_of_a_gpu_ends_the_run_with_the_remedy(
    colors: Callable[..., Path], color_bundle: Path, tmp_path: Path
) -> None:
    manifest = open_manifest(ManifestConfig(path=str(colors(2))))
    bundle = load_bundle(str(color_bundle))
    plan = plan_at(tmp_path / "out", manifest, classes=bundle.spec.classes)
    spec = spec_of(
        tmp_path / "out", plan, manifest, bundle.url, bundle_sha256=bundle.sha256,
        batch_size=10**9,
    )  # fmt: skip
    with pytest.raises(RunFailed, match=r"batches of 1000000000: .*smaller --scale\.batch-size"):
        workers.GpuWorker(spec, 1, "cuda")


FAILING = """
import torch
from imgcls.inference.gpu_errors import handle_gpu_errors
with handle_gpu_errors(1):
    values = torch.zeros(4, device="cuda")
    values[torch.tensor([7], device="cuda")].sum()  # an assertion within the kernel
    torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_an_error_after_which_a_gpu_cannot_be_used_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == DEVICE_FAILURE_STATUS, done.stderr
    assert "the GPU failed: this process ends, to be replaced" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("cpu_fraction", [1.0, 0.0])
def test_a_gpu_worker_writes_the_table_of_a_cpu_worker(
    cpu_fraction: float, colors: Callable[..., Path], color_bundle: Path, tmp_path: Path
) -> None:
    check_gpu_worker(cpu_fraction, "cuda", colors(16), color_bundle, tmp_path)


def check_gpu_worker(
    cpu_fraction: float, device: DeviceType, path: Path, color_bundle: Path, folder: Path
) -> None:
    (folder / "images" / "00003.jpg").write_bytes(b"broken")
    manifest = open_manifest(ManifestConfig(path=str(path)))
    bundle = load_bundle(str(color_bundle))
    tables = []
    for name in ("cpu", "gpu"):
        plan = plan_at(folder / name, manifest, classes=bundle.spec.classes)
        spec = spec_of(
            folder / name, plan, manifest, bundle.url, bundle_sha256=bundle.sha256, scores=True,
            session=f"{name} {cpu_fraction}",
        )  # fmt: skip
        if name == "cpu":
            batch = pa.table({"task": [pickle.dumps(ChunkTask(0))]})
            workers.CpuWorker(spec, 1, "cpu")(batch)
        else:
            workers.GpuWorker(spec, 1, device)(run_prepare(spec, cpu_fraction))
        (written,) = (folder / name / "_staging").glob("part-*/chunk-*")
        tables.append(pq.read_table(written))
    cpu, gpu = tables
    for column in ("row", "status", "error", "width", "height"):
        assert gpu[column].to_pylist() == cpu[column].to_pylist()
    for here, there in zip(gpu["scores"].to_pylist(), cpu["scores"].to_pylist(), strict=True):
        # nvJPEG and the resize of a GPU round differently
        assert (here is None) == (there is None)
        assert here is None or here == pytest.approx(there, abs=0.02)


class KilledError(Exception):
    """The process ends here."""
