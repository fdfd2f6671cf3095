"""The driver's view of the workers: liveness, and one error for each kind of failure."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch

from imgcls.cluster import autoscaler, ray_internals
from imgcls.cluster.interrupts import Interruption
from imgcls.config import build
from imgcls.data.storage import filesystem
from imgcls.errors import RunFailed
from imgcls.training import ray_trainer
from imgcls.training.config import TrainConfig, TrainScaleConfig
from imgcls.training.driver_channel import open_driver_channel
from imgcls.training.epoch_metrics import TrainLoopResult
from imgcls.training.ray_trainer import (
    compute_num_threads,
    format_worker_failure,
    resolve_ray_storage,
)
from imgcls.training.scaling import WorkerPlan
from imgcls.training.trainer import TrainLoopSpec
from tests.processes import wait_for


class Worker:
    def ping(self) -> None: ...


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_workers_that_are_alive_are_not_waited_for_and_lost_ones_only_until_the_timeout(
    joined: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(autoscaler, "LOG_WAIT_AFTER_S", 0)
    monkeypatch.setattr(ray_trainer, "time", clock)
    kind: Any = ray.remote(num_cpus=0)(Worker)
    worker = kind.remote()
    ray.get(worker.ping.remote())
    with open_driver_channel(1, lambda epoch: None) as channel:
        ray.get(channel.register_worker.remote(worker))
        liveness = ray_trainer._WorkerLiveness(channel, "1 x (1 CPU)", timeout_s=100)
        for _ in range(4):
            clock.now += 30
            liveness.check()
        assert capsys.readouterr().out == ""
        ray.kill(worker)
        wait_for(lambda: not ray_internals.is_actor_alive(worker), 60)
        for _ in range(3):
            clock.now += 30
            liveness.check()
        assert "waiting  for training workers, 1 x (1 CPU)" in capsys.readouterr().out
        clock.now += 30
        with pytest.raises(
            RunFailed, match=r"for training workers, 1 x \(1 CPU\); the cluster has"
        ):
            liveness.check()


def test_the_reported_failure_is_the_cause_and_not_that_others_lost_their_peer() -> None:
    failures = {
        0: RuntimeError("[gloo/transport] Connection closed by peer"),
        1: RuntimeError("Traceback\n  ...\nRuntimeError: CUDA out of memory. Tried to allocate"),
    }
    line = format_worker_failure(ray.train.WorkerGroupError("", failures))
    assert line.startswith("training worker 1 failed: RuntimeError: CUDA out of memory")
    assert line.endswith("set a smaller batch_size or a larger scale.accumulate")


def test_a_failure_that_the_workers_returned_ends_the_run_with_its_message() -> None:
    run: Future[Any] = Future()
    outcome = TrainLoopResult((), "fp32", failure_kind="failed", problem="the features are NaN")
    run.set_result(SimpleNamespace(return_value=outcome))
    liveness: Any = SimpleNamespace(check=lambda: None)
    with pytest.raises(RunFailed, match=r"^the features are NaN$"):
        ray_trainer._wait_for_result(run, None, liveness, Interruption())


def test_ray_keeps_its_records_on_a_store_through_the_driver_of_the_store(tmp_path: Path) -> None:
    path, file_system = resolve_ray_storage("memory://ray-records/run")
    assert file_system is not None
    file_system.create_dir(path)
    with file_system.open_output_stream(f"{path}/record") as stream:
        stream.write(b"state")
    assert filesystem.read("memory://ray-records/run/record") == b"state"
    filesystem.remove("memory://ray-records")
    assert resolve_ray_storage(str(tmp_path)) == (str(tmp_path), None)


@pytest.fixture
def torch_trainer(tmp_path: Path) -> Any:
    config = build(TrainConfig, {"data": "x.csv", "output": str(tmp_path)})
    unused: dict[str, Any] = dict.fromkeys(
        ("architecture", "initial_weights", "preprocess", "images", "class_weights")
    )
    spec = TrainLoopSpec(
        config=config,
        strategy="scratch",
        targets=None,
        classes=[],
        head_coefficients=(),
        **unused,
    )
    workers = WorkerPlan(count=1, cpus=1, gpus=0, min_count=1, max_count=1)
    return ray_trainer.build_torch_trainer(spec, workers, None, str(tmp_path))


def test_no_process_is_started_for_datasets_that_a_training_does_not_have(
    torch_trainer: Any,
) -> None:
    from ray.train.torch import TorchTrainer

    kinds = [type(callback).__name__ for callback in torch_trainer._create_default_callbacks()]
    theirs = TorchTrainer._create_default_callbacks(torch_trainer)
    assert "DatasetsCallback" not in kinds
    assert sorted([*kinds, "DatasetsCallback"]) == sorted(type(each).__name__ for each in theirs)


def test_the_controller_of_ray_train_does_not_import_the_training_loop(torch_trainer: Any) -> None:
    # these two are all that the controller reads of this package
    assert b"imgcls" not in ray.cloudpickle.dumps(torch_trainer.train_run_context)
    result = pickle.dumps(TrainLoopResult((), "fp32"))
    script = (
        "import pickle, sys\n"
        "result = pickle.load(sys.stdin.buffer)\n"
        "assert result.precision == 'fp32'\n"
        "assert not {'torch', 'imgcls.training.trainer'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], input=result, check=True)


@pytest.mark.parametrize("deterministic", [True, False])
def test_convolutions_of_a_gpu_repeat_their_results_unless_the_fastest_are_wanted(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", not deterministic)
    monkeypatch.setattr(cudnn, "benchmark", deterministic)
    ray_trainer._set_convolution_algorithms(deterministic=deterministic)
    assert (cudnn.deterministic, cudnn.benchmark) == (deterministic, not deterministic)
    assert TrainScaleConfig().deterministic


@pytest.mark.parametrize(
    ("cores", "node_cpus", "workers", "threads"),
    [
        (8, 8.0, 1, 8),
        (8, 8.0, 3, 2),
        (64, 4.0, 1, 4),  # a container limited to 4 CPUs sees all cores of its machine
        (64, 4.0, 2, 2),
        (64, 3.5, 2, 1),
        (2, 16.0, 1, 2),  # more CPUs declared than the machine has
        (4, 4.0, 8, 1),
    ],
)
def test_workers_share_the_cores_that_their_node_may_use(
    cores: int, node_cpus: float, workers: int, threads: int
) -> None:
    assert compute_num_threads(cores, node_cpus, workers) == threads
