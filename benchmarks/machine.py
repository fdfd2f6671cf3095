"""The kind of CPU that a result holds for: its model, its instruction sets, and its cores.

`ONEDNN_MAX_CPU_ISA` imitates an older CPU for a part of the tools only. A result that was measured
with it names it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
INSTRUCTION_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "i8mm", "bf16"),  # Arm
)
"""Flags of /proc/cpuinfo that decide the speed of a network."""
ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"


@dataclass(frozen=True)
class Cpu:
    """The CPU of this machine.

    instruction_sets: of `INSTRUCTION_SETS`, those that the CPU has, whatever the limit
    isa_limit: value of ONEDNN_MAX_CPU_ISA, None where it is not set
    """

    model: str
    instruction_sets: tuple[str, ...]
    cores: int
    isa_limit: str | None

    def __str__(self) -> str:
        cores = f"{self.cores} core{'' if self.cores == 1 else 's'}"
        described = f"{self.model}, {cores}, {' '.join(self.instruction_sets) or 'no vectors'}"
        return described if self.isa_limit is None else f"{described}; {self.describe_limit()}"

    def describe_limit(self) -> str:
        """Which tools the limit affects; empty without a limit."""
        if self.isa_limit is None:
            return ""
        return (
            f"{ISA_LIMIT}={self.isa_limit} limits oneDNN (torch's convolutions and matrix "
            "products) and OpenVINO, not ONNX Runtime"
        )

    def to_json(self) -> dict[str, Any]:
        """The fields, for the description in a file of results."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets)}


def read_cpu(
    info: Path = Path("/proc/cpuinfo"), environment: Mapping[str, str] = os.environ
) -> Cpu:
    """Describe the CPU that a file in the format of /proc/cpuinfo lists first."""
    text = info.read_text() if info.exists() else ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    model = fields.get("model name", platform.machine())
    if "cpu family" in fields:  # a model name in a virtual machine may be of a whole series
        model += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    limit = environment.get(ISA_LIMIT, "").upper() or None
    return Cpu(model, tuple(each for each in INSTRUCTION_SETS if each in flags), CORES, limit)
