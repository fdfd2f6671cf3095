"""Ray for the tests of this package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import RayCluster


@pytest.fixture(scope="package")
def local_ray(cluster: RayCluster) -> Iterator[None]:
    """This process is a driver of the test cluster, which has two logical CPUs."""
    with cluster.joined():
        yield
