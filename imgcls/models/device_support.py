"""Precisions and engines that run on one type of device only.

Imports no torch: a request is checked before workers start.
"""

from __future__ import annotations

from typing import get_args

from imgcls.errors import RequestError
from imgcls.models.bundle import EngineName, Precision


def check_device(wanted: Precision, engine: EngineName, device_type: str) -> None:
    """Raise RequestError for a precision or an engine that is unknown or the device cannot run.

    device_type: "cpu" or "cuda"
    """
    for name, value, kind in (("precision", wanted, Precision), ("engine", engine, EngineName)):
        if value not in get_args(kind):
            raise RequestError(f"{name}: {value!r} is not one of {', '.join(get_args(kind))}")
    is_cpu = device_type == "cpu"
    if wanted == "fp16" and is_cpu:
        raise RequestError("precision fp16: runs on GPUs only; use bf16 or auto on a CPU")
    if wanted == "int8" and not is_cpu:
        raise RequestError(
            "precision int8: runs on CPUs only; use bf16 or auto on a GPU, or keep the network on "
            "CPUs (predict: --scale.layout cpu)"
        )
    if engine == "openvino" and not is_cpu:
        raise RequestError(
            "engine openvino: runs on CPUs only; use torch or auto on a GPU, or keep the network "
            "on CPUs (predict: --scale.layout cpu)"
        )
