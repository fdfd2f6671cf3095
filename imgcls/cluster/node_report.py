"""Report of one node: versions, memory, disk, GPUs, and its access to the checked storage.

`read_node` runs on nodes where imgcls may be missing or have another version. So this module is
sent to the nodes by value, imports only the standard library at its top, and returns plain values.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from typing import Any, TypedDict

PACKAGES = ("imgcls", "ray", "torch", "torchvision", "pyarrow", "pillow")
_IMPORT_NAMES = {"pillow": "PIL"}
"""Packages whose import name is not their distribution name."""
SHARED_MEMORY = "/dev/shm"
_GPU_TIMEOUT_S = 60
_GPU_PROGRAM = """
import json, torch
from imgcls.data.decoding.nvjpeg import find_fault
found = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if found else []
fault = find_fault(torch.device("cuda", 0)) if found else None
print(json.dumps({"cuda": torch.version.cuda, "names": names, "fault": fault}))
"""
"""Run in a process of its own: a task without GPUs of its own sees none."""


class Space(TypedDict):
    """Size of a memory or a disk, in bytes."""

    total: int
    free: int


class NodeReport(TypedDict):
    """What `read_node` found; `versions` has None for a package that is not installed.

    gpus:    CUDA version of torch, names of the GPUs, why nvJPEG fails; None where not checked
    storage: why the checked folder cannot be used; None if it can, or if none was given
    """

    host: str
    python: str
    versions: dict[str, str | None]
    shared_memory: Space | None
    memory: Space
    disk: Space
    has_nvidia_driver: bool
    gpus: dict[str, Any] | None
    storage: str | None


class StorageTask(TypedDict):
    """The part of the storage check that a node does: read one file and create another.

    settings: of `StorageConfig`
    name:     of the file in `folder` that the driver has written
    """

    folder: str
    settings: dict[str, Any]
    name: str
    content: bytes


def find_versions() -> dict[str, str | None]:
    """Versions of the imported code, by package; None for a package that is not installed."""
    return {name: _find_version(name) for name in PACKAGES}


def _find_version(package: str) -> str | None:
    """The version of the imported code.

    A checkout that is not pip-installed (as `ray job submit --working-dir` leaves it) has no
    package metadata, and one that precedes an installed imgcls on the path would get the metadata
    of the other. Builds under another distribution name (pillow-simd) have no metadata either.
    """
    if package != "imgcls":
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    try:
        module = importlib.import_module(_IMPORT_NAMES.get(package, package))
    except ImportError:
        return None
    return str(module.__version__)


def read_node(
    disk_folder: str, check_gpus: bool, storage: StorageTask | None, name: str
) -> NodeReport:
    """Read the report of the node that this process runs on.

    disk_folder: folder whose disk is measured, such as Ray's temporary folder
    check_gpus:  import torch in another process and decode a JPEG on the first GPU
    storage:     folder to check; None: none
    name:        of the file that this node creates in it
    """
    has_driver = os.path.exists("/proc/driver/nvidia/version")
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": find_versions(),
        "shared_memory": _read_disk(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None,
        "memory": _read_memory(),
        "disk": _read_disk(disk_folder),
        "has_nvidia_driver": has_driver,
        "gpus": _read_gpus() if check_gpus or has_driver else None,
        "storage": None if storage is None else _check_storage(storage, name),
    }


def read_clock() -> float:
    """Unix time of this node, in seconds."""
    return time.time()


def _read_disk(folder: str) -> Space:
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    found = shutil.disk_usage(folder)
    return {"total": found.total, "free": found.free}


def _read_memory() -> Space:
    """Memory of the machine, or of the container where that has a limit."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    group = "/sys/fs/cgroup/memory."
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max": no limit
        with open(f"{group}max", encoding="ascii") as file:
            limit = int(file.read())
        with open(f"{group}current", encoding="ascii") as file:
            used = int(file.read())
        with open(f"{group}stat", encoding="ascii") as file:
            cache = int(dict(line.split() for line in file)["inactive_file"])
        total, free = min(total, limit), min(free, limit - used + cache)
    return {"total": total, "free": max(0, free)}


def _read_gpus() -> dict[str, Any]:
    """What torch finds in a new process that sees all GPUs of the node."""
    hidden = ("CUDA_VISIBLE_DEVICES",)
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _GPU_PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_GPU_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"torch did not answer within {_GPU_TIMEOUT_S} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _check_storage(storage: StorageTask, name: str) -> str | None:
    """Read the driver's file and create another one; returns why that failed."""
    try:
        from imgcls.data.storage import filesystem, storage_settings
        from imgcls.errors import ImgclsError, StorageMissing, one_line
    except ImportError as error:
        return f"not checked, because imgcls cannot be imported there ({error})"
    folder, content = storage["folder"], storage["content"]
    try:
        with storage_settings.use_settings(storage["settings"]):
            if filesystem.read(filesystem.join(folder, storage["name"])) != content:
                return "a file that the driver has written has other bytes there"
            filesystem.create(filesystem.join(folder, name), content)
    except StorageMissing:
        return "a file that the driver has written is not there: the folder is not shared"
    except ImgclsError as error:
        return one_line(error)
    return None
