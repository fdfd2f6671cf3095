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
        # a replica is on one node
        ([Node(2, 0), Node(2, 0)], {"min_replicas": 1}, (1, 1, 2, 0)),
        ([Node(4, 0), Node(8, 0)], {"min_replicas": 3}, (3, 3, 4, 0)),
        ([Node(3, 0)] * 6, {}, (8, 8, 1, 0)),
        # the default minimum is at most the maximum
        ([Node(16, 0)], {"max_replicas": 4}, (4, 4, 4, 0)),
        ([Node(16, 4)], {"max_replicas": 2}, (2, 2, 4, 1)),
        ([Node(16, 0)], {"max_replicas": 12}, (8, 12, 1, 0)),
        # the maximum has room, where it can have it
        ([Node(8, 0)], {"min_replicas": 1, "max_replicas": 4}, (1, 4, 2, 0)),
        ([Node(4, 0)], {"min_replicas": 1, "max_replicas": 8}, (1, 8, 4, 0)),
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
    plan = plan_replicas(nodes, ReplicaConfig(**settings), max_nodes=None)
    assert (plan.min_replicas, plan.max_replicas, plan.cpus, plan.gpus) == expected
    assert plan.threads == max(1, int(plan.cpus))
    assert ("only" in plan.reason) == (plan.max_replicas * plan.cpus > sum(n.cpus for n in nodes))
    assert plan.device == ("cuda" if plan.gpus else "cpu")


@pytest.mark.parametrize("node", [Node(8, 0), Node(8, 8)])
def test_replicas_that_do_not_fit_are_rejected_unless_nodes_may_join(node: Node) -> None:
    config = ReplicaConfig(min_replicas=9, cpus=4)
    with pytest.raises(ResourcesError, match=r"replicas\.min_replicas 9: each replica needs 4 CPU"):
        plan_replicas([node], config, max_nodes=None)
    assert plan_replicas([node], config, max_nodes=[node] * 9).min_replicas == 9


def test_cpus_of_other_nodes_do_not_count_for_replicas_on_gpus() -> None:
    with pytest.raises(ResourcesError, match="each replica needs 8 CPUs and 1 GPU; only 0 fit"):
        plan_replicas([Node(4, 1), Node(32, 0)], ReplicaConfig(cpus=8), max_nodes=None)


def test_the_default_cpus_fit_the_nodes_that_may_join() -> None:
    config = ReplicaConfig(min_replicas=1, max_replicas=8)
    assert plan_replicas([], config, max_nodes=[Node(16, 0)] * 4).cpus == 16
    assert plan_replicas([Node(4, 0)], config, max_nodes=[Node(16, 0)] * 4).cpus == 4
    both = ReplicaConfig(min_replicas=5)
    assert plan_replicas([Node(4, 0)], both, max_nodes=[Node(16, 0)] * 4).cpus == 8


@pytest.mark.parametrize(
    ("nodes", "settings", "max_nodes", "message"),
    [
        (
            [Node(2, 0), Node(2, 0)],
            {"min_replicas": 1, "cpus": 4},
            None,
            "replicas.min_replicas 1: each replica needs 4 CPUs; only 0 fit in the cluster's 4 "
            "CPUs; the largest node has 2 CPUs. Set replicas.cpus to 2 or less",
        ),
        (
            [Node(2, 0)],
            {"min_replicas": 1, "cpus": 32},
            [Node(16, 0)] * 4,
            "replicas.min_replicas 1: each replica needs 32 CPUs; only 0 fit in the cluster's 2 "
            "CPUs; the largest node has 16 CPUs. Set replicas.cpus to 16 or less",
        ),
        (
            [Node(4, 1), Node(32, 0)],
            {"cpus": 8},
            None,
            "replicas.min_replicas 1: each replica needs 8 CPUs and 1 GPU; only 0 fit in the "
            "cluster's 36 CPUs and 1 GPUs; the largest node with a GPU has 4 CPUs. Set "
            "replicas.cpus to 4 or less",
        ),
        (
            [Node(8, 0)],
            {"min_replicas": 5, "cpus": 2},
            None,
            "replicas.min_replicas 5: each replica needs 2 CPUs; only 4 fit in the cluster's 8 "
            "CPUs. Lower replicas.min_replicas or replicas.cpus",
        ),
        (
            [Node(2, 0), Node(2, 0)],
            {"min_replicas": 5},
            None,
            "replicas.min_replicas 5: each replica needs 1 CPUs; only 4 fit in the cluster's 4 "
            "CPUs. Lower replicas.min_replicas, or add nodes to the cluster",
        ),
        (
            [],
            {},
            None,
            "replicas.min_replicas 1: each replica needs 1 CPUs; only 0 fit in the cluster's 0 "
            "CPUs. Add nodes with CPUs to the cluster",
        ),
    ],
)
def test_the_remedy_fits_the_setting_that_is_wrong(
    nodes: list[Node], settings: dict[str, float], max_nodes: list[Node] | None, message: str
) -> None:
    with pytest.raises(ResourcesError) as caught:
        plan_replicas(nodes, ReplicaConfig(**settings), max_nodes=max_nodes)
    assert str(caught.value) == message
