"""Fixtures of the training tests: process groups of one or several workers, and a Ray session."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.processes import RayCluster
from tests.training.team import Team


@pytest.fixture
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process group of one worker, in this process; its backend is the fixture's parameter."""
    backend = getattr(request, "param", "gloo")
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30)
    )
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Up to three workers in processes of their own."""
    with Team.start(3, tmp_path_factory.mktemp("team")) as running:
        yield running


@pytest.fixture(scope="package")
def joined(cluster: RayCluster) -> Iterator[None]:
    """This process is a driver of the test cluster, which has two logical CPUs."""
    with cluster.joined():
        yield
