"""Planning of replicas from the nodes of a cluster."""

from __future__ import annotations

import pytest

from imgcls.cluster.session import Node
from imgcls.errors import ResourcesError
from imgcls.serving.config import ReplicaConfig
from imgcls.serving.scaling import plan_replicas


@pytest.mark.parametrize(
    ("nodes", "settings", "expected"),
    [
        ([Node(2, 0)], {}, (2, 2, 1, 0)),
        ([Node(32, 0)], {}, (8, 8, 4, 0)),
        ([Node(4, 0)], {"min_replicas": 1}, (1, 1, 4, 0)),
        ([Node(4, 0)], {"cpus": 2, "min_replicas": 2, "max_replicas": 6}, (2, 6, 2, 0)),
        ([Node(16, 2), Node(16, 2)], {}, (4, 4, 8, 1)),
        ([Node(2, 4)], {}, (4, 4, 0.5, 1)),
        # the CPUs of a replica are on the node of its GPU
        ([Node(4, 1), Node(32, 0)], {}, (1, 1, 4, 1)),
        ([Node(8, 1), Node(16, 0), Node(16, 0)], {}, (1, 1, 8, 1)),
        ([Node(4, 1), Node(64, 4)], {}, (5, 5, 4, 1)),
    ],
)
def test_replicas_share_the_cpus_or_take_a_gpu_each(
    nodes: list[Node], settings: dict[str, float], expected: tuple[float, ...]
) -> None:
    plan = plan_replicas(nodes, ReplicaConfig(**settings), may_grow=False)
    assert (plan.min_replicas, plan.max_replicas, plan.cpus, plan.gpus) == expected
    assert plan.threads == max(1, int(plan.cpus))
    assert plan.device == ("cuda" if plan.gpus else "cpu")


@pytest.mark.parametrize("node", [Node(8, 0), Node(8, 8)])
def test_replicas_that_do_not_fit_are_rejected_unless_nodes_may_join(node: Node) -> None:
    config = ReplicaConfig(min_replicas=9, cpus=4)
    with pytest.raises(ResourcesError, match=r"replicas\.min_replicas 9: each replica needs 4 CPU"):
        plan_replicas([node], config, may_grow=False)
    assert plan_replicas([node], config, may_grow=True).min_replicas == 9


def test_cpus_of_other_nodes_do_not_count_for_replicas_on_gpus() -> None:
    with pytest.raises(ResourcesError, match="each replica needs 8 CPUs and 1 GPU; only 0 fit"):
        plan_replicas([Node(4, 1), Node(32, 0)], ReplicaConfig(cpus=8), may_grow=False)
