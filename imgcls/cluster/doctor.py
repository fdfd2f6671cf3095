"""Checklist for an existing machine or cluster (`imgcls doctor`), before the first run on it.

One task per node reads versions, memory, disk and GPUs (`node_report`), the driver checks the
storage (`storage_check`), and `node_checks` compares. Without Ray, this machine alone is checked.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imgcls import log
from imgcls.cluster import node_report, session
from imgcls.cluster.config import DoctorConfig
from imgcls.cluster.node_checks import (
    CheckedNode,
    DoctorResult,
    check_clocks,
    check_disk,
    check_gpus,
    check_memory,
    check_shared_memory,
    check_versions,
    compute_skew,
)
from imgcls.cluster.node_report import NodeReport, StorageTask
from imgcls.cluster.storage_check import StorageCheck, open_storage_check
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import ImgclsError, RequestError, one_line
from imgcls.formatting import format_count


@with_config_storage
def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Print the checklist, and return it: `ok`, `checks`, and a report per node.

    Raises RequestError when a check has failed.
    """
    first, nodes = _find_nodes(config)
    url = config.storage.url and filesystem.absolute(config.storage.url)
    with contextlib.ExitStack() as stack:
        storage = stack.enter_context(open_storage_check(url, config.storage)) if url else None
        task = storage.task if storage else None
        reports, unread = _read_nodes(nodes, task, config.timeout_s)
        skews = _read_clocks([node for node in reports if node.id], config.timeout_s)
    results = [
        first,
        *unread,
        *check_versions(platform.python_version(), node_report.find_versions(), reports),
        *_check_storage(url, storage, reports),
        *check_gpus(reports),
        *check_shared_memory(reports),
        *check_clocks(skews, storage.skew_s if storage else None),
        *check_memory(reports),
        *check_disk(reports),
    ]
    failed = sum(result.status == "failed" for result in results)
    found = {
        "ok": not failed,
        "checks": [asdict(result) for result in results],
        "nodes": [{"name": node.name, "id": node.id, **reports[node]} for node in reports],
    }
    log.show(json.dumps(found) if config.json_lines else _format_results(results))
    if failed:
        raise RequestError(
            f"{failed} of {format_count(len(results), 'check')} failed. Correct what the lines "
            "name, and run this command again"
        )
    return found


def _find_nodes(config: DoctorConfig) -> tuple[DoctorResult, list[CheckedNode]]:
    """The line about Ray, and the nodes to check; this machine where Ray does not run."""
    here = CheckedNode(
        "this machine", "", float(os.cpu_count() or 1), 0.0, tempfile.gettempdir(), None
    )
    try:
        joined = session.join_cluster(config.address, start=config.start_ray)
    # Ray raises the last three for another version, an address and a token
    except (ImgclsError, RuntimeError, ConnectionError, ray.exceptions.RayError) as error:
        fix = "" if isinstance(error, ImgclsError) else "Use the cluster's Ray, Python and token"
        return DoctorResult("ray", "failed", one_line(error, 600), fix), [here]
    if not joined:
        message = "no cluster runs on this machine; only this machine is checked"
        fix = "Pass --address for a cluster elsewhere, or --start-ray to start Ray here"
        return DoctorResult("ray", "skipped", message, fix), [here]
    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    nodes = [_build_checked_node(node, addresses) for node in alive]
    address = ray.get_runtime_context().gcs_address
    where = "started for this check" if session.is_private_session() else f"at {address}"
    text = f"{metadata.version('ray')} {where}, {format_count(len(nodes), 'node')}"
    return DoctorResult("ray", "ok", text), nodes


def _build_checked_node(node: Mapping[str, Any], addresses: Sequence[str]) -> CheckedNode:
    """A node from an entry of `ray.nodes()`."""
    address, resources = node["NodeManagerAddress"], node["Resources"]
    is_unique = addresses.count(address) == 1
    return CheckedNode(
        address if is_unique else f"{address} ({node['NodeID'][:6]})",
        node["NodeID"],
        float(resources.get("CPU", 0)),
        float(resources.get("GPU", 0)),
        # FOLDER/session_*/sockets/plasma_store
        os.path.dirname(os.path.dirname(node["ObjectStoreSocketName"])) or tempfile.gettempdir(),
        float(resources.get("object_store_memory", 0)),
    )


def _read_nodes(
    nodes: Sequence[CheckedNode], task: StorageTask | None, timeout_s: float
) -> tuple[dict[CheckedNode, NodeReport], list[DoctorResult]]:
    """The report of each node, and a line for each node without one."""
    if not nodes[0].id:
        [here] = nodes
        return {here: node_report.read_node(here.folder, False, None, "")}, []
    with _send_by_value():
        remote: Any = ray.remote(num_cpus=0, max_retries=0)(node_report.read_node)
        pending = {
            _place(remote, node).remote(node.folder, node.gpus > 0, task, f"node-{node.id}"): node
            for node in nodes
        }
    ready, late = ray.wait(list(pending), num_returns=len(pending), timeout=timeout_s)
    reports: dict[CheckedNode, NodeReport] = {}
    unread: list[DoctorResult] = []
    for reference in ready:
        node = pending[reference]
        try:
            reports[node] = ray.get(reference)
        except ray.exceptions.RayError as error:
            reason = one_line(session.find_cause(error))
            unread.append(DoctorResult("nodes", "failed", f"{node.name}: {reason}", _READ_LOG))
    for reference in late:
        ray.cancel(reference, force=True)
        text = f"{pending[reference].name}: did not answer within {timeout_s:.0f} s"
        unread.append(DoctorResult("nodes", "failed", text, _READ_LOG))
    return reports, unread


_READ_LOG = "Read Ray's logs on that node (logs/raylet.out in its session folder)"


def _read_clocks(nodes: Sequence[CheckedNode], timeout_s: float) -> dict[str, float]:
    """Skew of each node's clock; by workers that have answered before, and so answer at once."""
    if not nodes:
        return {}  # `ray.get` would start Ray
    with _send_by_value():
        remote: Any = ray.remote(num_cpus=0, max_retries=0)(node_report.read_clock)
        began = time.time()
        references = [_place(remote, node).remote() for node in nodes]
    try:
        clocks = ray.get(references, timeout=timeout_s)
    except ray.exceptions.RayError:
        return {}  # a node was lost since its report
    ended = time.time()
    return {
        node.name: compute_skew(clock, began, ended)
        for node, clock in zip(nodes, clocks, strict=True)
    }


def _place(remote: Any, node: CheckedNode) -> Any:
    return remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))


@contextlib.contextmanager
def _send_by_value() -> Iterator[None]:
    """Within the block, Ray sends the functions of `node_report` with their code."""
    cloudpickle.register_pickle_by_value(node_report)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(node_report)


def _check_storage(
    url: str | None, check: StorageCheck | None, reports: Mapping[CheckedNode, NodeReport]
) -> Iterator[DoctorResult]:
    if url is None or check is None:
        fix = "Pass --storage with the folder or URL that runs will write to"
        yield DoctorResult("storage", "skipped", "no folder was given", fix)
        return
    if check.fault is not None:
        fix = "Correct --storage, the permissions or the --storage settings"
        yield DoctorResult("storage", "failed", f"{url}: {check.fault}", fix)
        return
    steps = "write, read, list, create only if absent and delete"
    yield DoctorResult("storage", "ok", f"{url}: {steps} in {check.seconds:.1f} s")
    faults = {node.name: report["storage"] for node, report in reports.items() if node.id}
    for name, fault in faults.items():
        if fault is not None:
            fix = "Use a folder that all nodes share or an object store, and let each node write"
            yield DoctorResult("storage", "failed", f"{name}: {fault}", fix)
    able = sum(fault is None for fault in faults.values())
    if able:
        yield DoctorResult("storage", "ok", f"{format_count(able, 'node')}: read and create files")


def _format_results(results: Sequence[DoctorResult]) -> str:
    width = max(len(result.check) for result in results)
    return "\n".join(
        f"{result.status:<7}  {result.check:<{width}}  {result.message}"
        + (f". {result.fix}" if result.fix else "")
        for result in results
    )
