"""Checks of `imgcls doctor` on the reports of nodes: each yields lines of the checklist.

A check yields one line per node that has a problem, and one for all others together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from imgcls.cluster.node_report import PACKAGES, NodeReport, Space
from imgcls.cluster.session import JPEG_ENGINE_GPUS
from imgcls.formatting import format_count

DoctorStatus = Literal["ok", "warning", "failed", "skipped"]

MIN_MEMORY_PER_CPU = 1 << 30
"""Bytes. A worker with torch and a small network takes about as much."""
MIN_FREE_MEMORY = 0.1
"""Fraction of the memory. Ray kills workers when less than 0.05 is free."""
OBJECT_STORE_FRACTION = 0.3
"""Fraction of the memory that Ray takes for its object store by default."""
MIN_FREE_DISK = 0.05
"""Fraction of the disk below which Ray writes nothing more to it."""
LOW_DISK = 5 << 30
"""Bytes that a node may write: images from archives, spilled objects, logs."""
MAX_SKEW_S = 5.0
"""Files of a driver that is alive are taken for abandoned when they are 10 s old."""
REFUSED_SKEW_S = 900.0
"""Object stores refuse requests that were signed earlier or later than that, in seconds."""
_MUST_MATCH = ("python", "imgcls", "ray", "torch", "torchvision")
_GIB = 1 << 30


@dataclass(frozen=True)
class CheckedNode:
    """A live node, or this machine without Ray.

    name:   its address; with the start of its id where several nodes have one address
    id:     Ray's id; empty without Ray
    folder: Ray's temporary folder on it, or the system's
    object_store_bytes: size of its object store; None without Ray
    """

    name: str
    id: str
    cpus: float
    gpus: float
    folder: str
    object_store_bytes: float | None


@dataclass(frozen=True)
class DoctorResult:
    """A line of the checklist; `fix`: how to correct a warning or a failure."""

    check: str
    status: DoctorStatus
    message: str
    fix: str = ""


Reports = Mapping[CheckedNode, NodeReport]


def check_versions(
    python: str, versions: Mapping[str, str | None], reports: Reports
) -> Iterator[DoctorResult]:
    """Compare the versions on each node with the driver's.

    python, versions: of the driver
    """
    wanted = {"python": python, **versions}
    for missing in (name for name in _MUST_MATCH if wanted[name] is None):
        yield DoctorResult(
            "versions", "failed", f"this process has no {missing}", f"Run pip install {missing}"
        )
    alike = 0
    for node, report in reports.items():
        found = {"python": report["python"], **report["versions"]}
        different = [name for name in ("python", *PACKAGES) if found[name] != wanted[name]]
        alike += not different
        if different:
            yield _describe_versions(node, found, wanted, different)
    if alike:
        names = ", ".join(f"{name} {wanted[name]}" for name in _MUST_MATCH[1:])
        where = format_count(alike, "node") if next(iter(reports)).id else "this machine"
        yield DoctorResult("versions", "ok", f"{where}: Python {python}, {names}")


def _describe_versions(
    node: CheckedNode,
    found: Mapping[str, str | None],
    wanted: Mapping[str, str | None],
    different: Sequence[str],
) -> DoctorResult:
    pairs = [
        f"{name} {found[name] or 'is missing'} (here {wanted[name] or 'missing'})"
        for name in different
    ]
    is_fatal = any(name in _MUST_MATCH for name in different)
    pins = [
        f"{name}=={wanted[name]}"
        for name in different
        if name not in ("python", "imgcls") and wanted[name]
    ]
    fixes = [f"use Python {wanted['python']} on it"] if "python" in different else []
    fixes += [f"run there: pip install {' '.join(pins)}"] if pins else []
    if "imgcls" in different:
        fixes.append("install the same imgcls on it, or run this command as a job that brings it")
    fix = "; ".join(fixes)
    fix = fix[:1].upper() + fix[1:]
    return DoctorResult(
        "versions", "failed" if is_fatal else "warning", f"{node.name}: {', '.join(pairs)}", fix
    )


def check_memory(reports: Reports) -> Iterator[DoctorResult]:
    """Memory of each node: what is free now, and the total for a worker per CPU."""
    good: dict[CheckedNode, Space] = {}
    for node, report in reports.items():
        space = report["memory"]
        text = f"{node.name}: {_format_space(space)}"
        if space["free"] < MIN_FREE_MEMORY * space["total"]:
            fix = "Ray kills workers when 95% is used: stop other programs there, or add memory"
            yield DoctorResult("memory", "warning", text, fix)
        elif space["total"] < node.cpus * MIN_MEMORY_PER_CPU:
            fix = "With a worker per CPU, memory may run out: set --scale.workers lower"
            yield DoctorResult("memory", "warning", f"{text} for {node.cpus:g} CPUs", fix)
        else:
            good[node] = space
    yield from _summarize("memory", good)


def check_shared_memory(reports: Reports) -> Iterator[DoctorResult]:
    """/dev/shm of each node, in which Ray keeps its object store."""
    good: dict[CheckedNode, Space] = {}
    for node, report in reports.items():
        space = report["shared_memory"]
        if space is None:
            yield DoctorResult(
                "shm", "warning", f"{node.name}: has no /dev/shm", "Mount a tmpfs there"
            )
            continue
        store = node.object_store_bytes
        needed = OBJECT_STORE_FRACTION * report["memory"]["total"] if store is None else store
        text = f"{node.name}: {_format_space(space)} in /dev/shm"
        if space["free"] < 0.05 * space["total"]:
            fix = "Remove files from it: processes that write to a full one are killed (SIGBUS)"
            yield DoctorResult("shm", "failed", text, fix)
        elif space["total"] < needed:
            fix = (
                "Ray keeps objects on the disk instead. Docker: --shm-size; Kubernetes: an "
                "emptyDir with medium Memory; or a smaller --object-store-memory of ray start"
            )
            text = f"{text}, Ray's object store takes {needed / _GIB:.1f} GiB"
            yield DoctorResult("shm", "warning", text, fix)
        else:
            good[node] = space
    yield from _summarize("shm", good, " in /dev/shm")


def check_disk(reports: Reports) -> Iterator[DoctorResult]:
    """The disk of Ray's temporary folder on each node."""
    good: dict[CheckedNode, Space] = {}
    for node, report in reports.items():
        space = report["disk"]
        text = f"{node.name}: {_format_space(space)} for {node.folder}"
        if space["free"] < MIN_FREE_DISK * space["total"]:
            fix = "Ray stores no objects on a disk that is 95% full: free space, or start Ray with "
            yield DoctorResult("disk", "failed", text, f"{fix}--temp-dir on another disk")
        elif space["free"] < LOW_DISK:
            fix = "Free space, or start Ray with --temp-dir on another disk"
            yield DoctorResult("disk", "warning", text, fix)
        else:
            good[node] = space
    yield from _summarize("disk", good, " for Ray's temporary folder")


def check_gpus(reports: Reports) -> Iterator[DoctorResult]:
    """GPUs as Ray counts them and as torch finds them, and their JPEG decoders."""
    found = [_check_node_gpus(node, report) for node, report in reports.items()]
    results = [result for result in found if result is not None]
    yield from results
    if reports and not results:
        yield DoctorResult("gpus", "ok", "none; networks run on CPUs")


def _check_node_gpus(node: CheckedNode, report: NodeReport) -> DoctorResult | None:
    gpus: dict[str, Any] | None = report["gpus"]
    if gpus is None:
        return None
    counted = f"{node.name}: Ray counts {format_count(round(node.gpus), 'GPU')}"
    start = f"start Ray there with --num-gpus={len(gpus.get('names', []))}"
    if "error" in gpus:
        return DoctorResult(
            "gpus", "failed", f"{node.name}: {gpus['error']}", "Repair torch or the driver on it"
        )
    names = gpus["names"]
    if not names and not node.gpus:
        text = f"{node.name}: has an NVIDIA driver, but torch finds no GPU"
        return DoctorResult("gpus", "warning", text, "Install torch with CUDA to use its GPUs")
    if len(names) < node.gpus:
        build = f"CUDA {gpus['cuda']}" if gpus["cuda"] else "CPUs only"
        return DoctorResult(
            "gpus",
            "failed",
            f"{counted}, torch finds {len(names)} (torch is built for {build})",
            f"Install an NVIDIA driver and torch with CUDA, or {start}",
        )
    if node.id and not node.gpus:
        return DoctorResult("gpus", "warning", f"{counted}, torch {len(names)}", start.capitalize())
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if gpus["fault"]:
        return DoctorResult(
            "gpus",
            "warning",
            f"{node.name}: {kinds}; nvJPEG does not decode: {gpus['fault']}",
            "Keep --scale.layout gpu, in which CPUs decode, or install a torchvision with CUDA",
        )
    has_engine = any(re.search(rf"\b{each}\b", name) for each in JPEG_ENGINE_GPUS for name in names)
    engine = "with" if has_engine else "without"
    return DoctorResult(
        "gpus", "ok", f"{node.name}: {kinds}; nvJPEG decodes, {engine} a JPEG engine"
    )


def check_clocks(skews: Mapping[str, float], storage: float | None) -> Iterator[DoctorResult]:
    """Clocks compared with this machine's.

    skews:   of nodes by name, in seconds, as `compute_skew` returns them
    storage: of the checked folder's store; None where unknown
    """
    every = dict(skews) if storage is None else {**skews, "the storage": storage}
    far = {name: skew for name, skew in every.items() if abs(skew) > MAX_SKEW_S}
    for name, skew in far.items():
        yield DoctorResult(
            "clocks",
            "failed" if abs(skew) > REFUSED_SKEW_S else "warning",
            f"{name}: its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this "
            "machine's",
            "Synchronize the clocks (NTP)",
        )
    if every and not far:
        names = [*([format_count(len(skews), "node")] if skews else [])]
        names += ["the storage"] if storage is not None else []
        yield DoctorResult(
            "clocks", "ok", f"{' and '.join(names)}: within {MAX_SKEW_S:.0f} s of this machine's"
        )


def compute_skew(clock: float, began: float, ended: float, resolution: float = 0.0) -> float:
    """Seconds by which another clock is ahead, negative if behind: the least that is certain.

    clock:        what it showed between `began` and `ended` of this machine's
    resolution:   it may have been up to this much later
    """
    return max(0.0, clock - ended) or min(0.0, clock + resolution - began)


def _summarize(
    check: str, good: Mapping[CheckedNode, Space], what: str = ""
) -> Iterator[DoctorResult]:
    """One line for all nodes without a problem, with the least free space."""
    if good:
        least = min(good.values(), key=lambda space: space["free"])
        prefix = f"{format_count(len(good), 'node')}, the least: " if len(good) > 1 else ""
        yield DoctorResult(check, "ok", f"{prefix}{_format_space(least)}{what}")


def _format_space(space: Space) -> str:
    return f"{space['free'] / _GIB:.1f} of {space['total'] / _GIB:.1f} GiB free"
