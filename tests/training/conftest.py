"""What training tests share: a group of one worker here, groups of several in other processes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import ray
import torch
import torch.distributed as dist

from tests.training.team import Team


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The networks here are so small that threads would wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one, in this process."""
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30)
    )
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Up to three workers in processes of their own."""
    with Team.start(3, tmp_path_factory.mktemp("team")) as running:
        yield running


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of this process's own, with two logical CPUs."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
