"""Choice of the precision by the hardware: bfloat16 or int8 where it is multiplied natively.

fp16 is never chosen automatically: its largest number is 65,504, which a layer can exceed, and its
speed has not been measured on a GPU without bfloat16.
"""

from __future__ import annotations

from typing import Literal

import torch

from imgcls.errors import RequestError
from imgcls.models import cpu
from imgcls.models.bundle import EngineName, Precision
from imgcls.models.device_support import check_device

RunPrecision = Literal["fp32", "bf16", "fp16", "int8"]
"""A precision that was chosen."""
INT8_FLAGS = {"amx_int8", "avx512_vnni", "avx_vnni"}


def choose_precision(
    wanted: Precision, device: torch.device, engine: EngineName = "torch"
) -> tuple[RunPrecision, str]:
    """The precision to run at on a device, and the reason.

    Raises RequestError for int8 on a GPU, or on a CPU whose instructions the engine cannot use for
    it, and for fp16 on a CPU.
    """
    check_device(wanted, engine, device.type)
    if wanted == "int8":
        _check_int8_instructions(engine)
    if wanted == "bf16" and device.type == "cpu" and cpu.find_bf16_instructions() is None:
        return wanted, "as requested; fp32 is faster: the CPU has no bfloat16 instructions"
    if wanted != "auto":
        return wanted, "as requested"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if native:
            return "bf16", "the GPU has it"
        return "fp32", "the GPU has no bfloat16; --precision fp16 is possible, not measured"
    instructions = cpu.find_bf16_instructions()
    if instructions is not None:
        return "bf16", f"the CPU has {instructions}"
    return "fp32", "the CPU has no bfloat16 instructions"


def has_int8_instructions() -> bool:
    """Whether the CPU sums products of int8 without overflow."""
    return bool(cpu.read_cpu_flags() & INT8_FLAGS)


def _check_int8_instructions(engine: EngineName) -> None:
    flags = cpu.read_cpu_flags()
    if engine == "openvino" and "avx2" not in flags:
        raise RequestError("precision int8: this CPU has no AVX2; use --precision auto")
    if engine != "openvino" and not has_int8_instructions():
        raise RequestError(
            f"precision int8: this CPU has none of {', '.join(sorted(INT8_FLAGS))}, without which "
            "sums overflow in torch; use --precision auto, or a bundle from `imgcls model quantize "
            "--engine openvino`"
        )


def has_native_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively."""
    return choose_precision("auto", device)[0] == "bf16"


def choose_float_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the layers that are not quantized."""
    if precision in ("auto", "int8"):
        precision, _ = choose_precision("auto", device)
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
