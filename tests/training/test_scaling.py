"""The requested workers fit the nodes, or are refused with the arithmetic before any wait."""

from __future__ import annotations

import pytest

from imgcls.cluster.session import Node
from imgcls.config import load
from imgcls.errors import ConfigError, ResourcesError
from imgcls.training.config import TrainScaleConfig
from imgcls.training.scaling import (
    WorkerPlan,
    compute_decode_cpus,
    fits_object_store,
    plan_worker_bundles,
    plan_workers,
)

LAPTOP = [Node(2, 0)]


def test_two_workers_fit_two_cores() -> None:
    assert plan_workers(LAPTOP, TrainScaleConfig(num_workers=2)) == WorkerPlan(2, 1.0, 0, 2, 2)


def test_workers_may_share_a_core() -> None:
    config = TrainScaleConfig(num_workers=20, cpus_per_worker=0.1)
    assert plan_workers(LAPTOP, config).count == 20


def test_too_many_workers_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(ResourcesError, match=r"3 x \(1 CPU\) do not fit .* room for 2"):
        plan_workers(LAPTOP, TrainScaleConfig(num_workers=3))


def test_a_worker_is_not_split_between_nodes() -> None:
    with pytest.raises(ResourcesError, match="have room for 2"):
        plan_workers([Node(3, 0), Node(3, 0)], TrainScaleConfig(num_workers=3, cpus_per_worker=2))


def test_gpus_are_taken_when_there_are_enough_for_all() -> None:
    nodes = [Node(8, 1), Node(8, 1)]
    assert plan_workers(nodes, TrainScaleConfig(num_workers=2)).gpus == 1
    assert plan_workers(nodes, TrainScaleConfig(num_workers=3)).gpus == 0
    assert plan_workers(nodes, TrainScaleConfig(num_workers=2, use_gpu=False)).gpus == 0


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ResourcesError, match=r"1 x \(1 CPU \+ 1 GPU\) do not fit"):
        plan_workers(LAPTOP, TrainScaleConfig(use_gpu=True))


def test_a_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(ResourcesError, match=r"\(none\), which have room for 0"):
        plan_workers([], TrainScaleConfig())


def test_synchronized_batch_norm_is_refused_without_gpus() -> None:
    with pytest.raises(ResourcesError, match=r"scale\.sync_batchnorm: .* only on GPUs"):
        plan_workers(LAPTOP, TrainScaleConfig(sync_batchnorm=True))
    nodes = [Node(8, 2)]
    assert plan_workers(nodes, TrainScaleConfig(num_workers=2, sync_batchnorm=True)).gpus == 1


# ------------------------------------------------------------------ elastic groups


@pytest.mark.parametrize(
    ("cores", "count"), [(1, None), (2, 2), (3, 3), (4, 4), (9, 4)],
)  # fmt: skip
def test_an_elastic_group_takes_what_there_is_within_its_bounds(
    cores: int, count: int | None
) -> None:
    config = TrainScaleConfig(num_workers=(2, 4))
    if count is None:
        with pytest.raises(ResourcesError, match=r"num_workers 2: .* have room for 1"):
            plan_workers([Node(cores, 0)], config)
        return
    workers = plan_workers([Node(cores, 0)], config)
    assert workers == WorkerPlan(count, 1.0, 0, 2, 4)
    assert str(workers) == f"{count} x (1 CPU), 2 to 4"


def test_an_elastic_group_runs_on_gpus_when_the_fewest_workers_can() -> None:
    config = TrainScaleConfig(num_workers=(2, 4))
    assert plan_workers([Node(8, 1)], config).gpus == 0
    found = plan_workers([Node(8, 3)], config)
    assert (found.count, found.gpus) == (3, 1)


@pytest.mark.parametrize(
    ("text", "bounds"), [("3", (3, 3)), ("[1, 4]", (1, 4)), ("[2, 2]", (2, 2))]
)
def test_the_number_of_workers_is_one_or_a_pair(text: str, bounds: tuple[int, int]) -> None:
    config = load(TrainScaleConfig, ["--num-workers", text])
    assert config.bounds == (config.min_workers, config.max_workers) == bounds


@pytest.mark.parametrize("text", ["0", "[0, 2]", "[1, 2, 3]", "[4, 2]", "many"])
def test_other_numbers_of_workers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="num_workers"):
        load(TrainScaleConfig, ["--num-workers", text])


# ------------------------------------------------------------------ room for images


def test_images_are_kept_while_they_leave_a_fifth_of_the_object_store() -> None:
    assert fits_object_store(8_000_000_000, 10_000_000_000)
    assert not fits_object_store(8_000_000_001, 10_000_000_000)


def test_what_the_workers_leave_is_for_decoding() -> None:
    nodes = [Node(4, 0), Node(4, 0)]
    assert compute_decode_cpus(nodes, WorkerPlan(3, 2.0, 0, 3, 3)) == 2
    assert compute_decode_cpus(nodes, WorkerPlan(7, 1.0, 0, 1, 7)) == 1


def test_no_cpu_left_to_decode_is_refused_with_what_would_leave_one() -> None:
    workers = WorkerPlan(2, 1.0, 0, 2, 2)
    with pytest.raises(ResourcesError, match=r"of 2 the workers reserve 2. Set .* to at most 0\.5"):
        compute_decode_cpus(LAPTOP, workers)
    assert compute_decode_cpus(LAPTOP, WorkerPlan(2, 0.5, 0, 2, 2)) == 1


# ------------------------------------------------------------------ autoscaling


def test_the_bundles_requested_from_an_autoscaler_are_what_the_workers_reserve() -> None:
    possible = [Node(16, 1)] * 2 + [Node(16, 0)] * 8
    assert (
        plan_worker_bundles(possible, TrainScaleConfig(num_workers=2))
        == [{"CPU": 1.0, "GPU": 1.0}] * 2
    )
    assert (
        plan_worker_bundles(possible, TrainScaleConfig(num_workers=3, cpus_per_worker=4))
        == [{"CPU": 4.0}] * 3
    )
    assert (
        plan_worker_bundles(possible, TrainScaleConfig(num_workers=(1, 40), use_gpu=False))
        == [{"CPU": 1.0}] * 40
    )
    # if the possible nodes are unknown: only the minimum
    assert plan_worker_bundles(None, TrainScaleConfig(num_workers=(1, 40))) == [{"CPU": 1.0}]
    assert plan_worker_bundles(None, TrainScaleConfig(use_gpu=True)) == [{"CPU": 1.0, "GPU": 1.0}]
