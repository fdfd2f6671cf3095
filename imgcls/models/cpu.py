"""Instruction sets of the CPU, and which engine is fastest with them; imports no torch."""

from __future__ import annotations

import os

_ISAS = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX",
)  # fmt: skip
"""Instruction sets to which oneDNN can be limited, in ascending order.
Source: oneDNN developer guide, "CPU Dispatcher Control"."""
_ISA_BY_FLAG = {
    "avx_vnni": "AVX2_VNNI", "avx512_vnni": "AVX512_CORE_VNNI", "avx512_bf16": "AVX512_CORE_BF16",
    "amx_bf16": "AVX512_CORE_AMX", "amx_int8": "AVX512_CORE_AMX",
}  # fmt: skip


def read_cpu_flags() -> set[str]:
    """The CPU's flags, without those that ONEDNN_MAX_CPU_ISA keeps oneDNN from using."""
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            line = next((each for each in info if each.startswith(("flags", "Features"))), "")
        flags.update(line.split())
    except OSError:
        pass
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in _ISAS:
        allowed = _ISAS[: _ISAS.index(limit) + 1]
        flags -= {flag for flag, isa in _ISA_BY_FLAG.items() if isa not in allowed}
    return flags


def find_bf16_instructions() -> str | None:
    """Name of the CPU's bfloat16 instructions; None if it has none.

    Without them, on AVX-512 and on AVX2, bfloat16 takes 2 to 11 times as long as float32.
    """
    flags = read_cpu_flags()
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16"), ("bf16", "Arm BF16")):
        if flag in flags:
            return name
    return None


def is_openvino_faster() -> bool:
    """Whether OpenVINO was measured as at least as fast as torch on CPUs of this kind.

    On CPUs with AVX2, AVX-512 or AMX it was, for every network; others were not measured.
    The measurements: `python -m benchmarks.engines`, docs/performance.md.
    """
    return "avx2" in read_cpu_flags()
