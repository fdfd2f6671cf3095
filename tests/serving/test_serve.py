"""Checks before Ray starts, and the detection of missing replicas."""

from __future__ import annotations

import pytest
from ray.serve.schema import DeploymentStatus

from imgcls.serving.serve import has_missing_replicas


@pytest.mark.parametrize(
    ("statuses", "missing"),
    [
        (["HEALTHY", "HEALTHY"], False),
        (["HEALTHY", "UNHEALTHY"], True),
        (["DEPLOY_FAILED", "HEALTHY"], True),
        (["UNHEALTHY", "UPDATING"], True),
        (["UPSCALING", "HEALTHY"], None),  # autoscaling under load
        (["DOWNSCALING", "HEALTHY"], None),
        (["UPDATING", "HEALTHY"], None),
    ],
)
def test_a_change_of_the_number_of_replicas_is_not_a_missing_replica(
    statuses: list[str], missing: bool | None
) -> None:
    assert has_missing_replicas(DeploymentStatus(status) for status in statuses) is missing
