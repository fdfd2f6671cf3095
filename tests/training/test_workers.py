import pytest

from imgcls.cluster import Node
from imgcls.errors import ResourcesError
from imgcls.training.workers import ScaleConfig, Workers, check_store, plan_workers

LAPTOP = [Node(2, 0)]


def test_two_workers_fit_two_cores() -> None:
    assert plan_workers(LAPTOP, ScaleConfig(num_workers=2)) == Workers(2, 1.0, 0)


def test_workers_may_share_a_core() -> None:
    config = ScaleConfig(num_workers=20, cpus_per_worker=0.1)
    assert plan_workers(LAPTOP, config).count == 20


def test_too_many_workers_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(ResourcesError, match=r"3 x \(1 CPU\) do not fit .* hold 2"):
        plan_workers(LAPTOP, ScaleConfig(num_workers=3))


def test_a_worker_is_not_split_between_machines() -> None:
    with pytest.raises(ResourcesError, match="which hold 2"):
        plan_workers([Node(3, 0), Node(3, 0)], ScaleConfig(num_workers=3, cpus_per_worker=2))


def test_gpus_are_taken_when_there_are_enough_for_all() -> None:
    machines = [Node(8, 1), Node(8, 1)]
    assert plan_workers(machines, ScaleConfig(num_workers=2)).gpus == 1
    assert plan_workers(machines, ScaleConfig(num_workers=3)).gpus == 0
    assert plan_workers(machines, ScaleConfig(num_workers=2, use_gpu=False)).gpus == 0


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ResourcesError, match=r"1 x \(1 CPU \+ 1 GPU\) do not fit"):
        plan_workers(LAPTOP, ScaleConfig(use_gpu=True))


def test_a_cluster_without_machines_is_refused() -> None:
    with pytest.raises(ResourcesError, match=r"\(none\), which hold 0"):
        plan_workers([], ScaleConfig())


def test_images_that_do_not_fit_the_object_store_are_refused() -> None:
    check_store(8_000_000_000, 10_000_000_000)
    with pytest.raises(ResourcesError, match=r"take 8.1 GB, and the smallest object store .* 10.0"):
        check_store(8_100_000_000, 10_000_000_000)
