"""The precision follows the instructions of the processor that oneDNN may use."""

from __future__ import annotations

import pytest
import torch

from imgcls.errors import RequestError
from imgcls.models.precision import choose_float_dtype, choose_precision


@pytest.mark.parametrize(
    ("flags", "precision", "reason"),
    [
        ({"avx512f"}, "fp32", "the CPU has no bfloat16 instructions"),
        ({"avx512_bf16"}, "bf16", "the CPU has AVX-512 BF16"),
        ({"avx512_bf16", "amx_bf16"}, "bf16", "the CPU has AMX"),
        ({"bf16", "asimd"}, "bf16", "the CPU has Arm BF16"),
        (set(), "fp32", "the CPU has no bfloat16 instructions"),
    ],
)
def test_bf16_is_chosen_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], precision: str, reason: str
) -> None:
    monkeypatch.setattr("imgcls.models.cpu.read_cpu_flags", lambda: flags)
    assert choose_precision("auto", torch.device("cpu")) == (precision, reason)
    assert choose_precision("fp32", torch.device("cpu")) == ("fp32", "as requested")
    requested = "as requested"
    if precision == "fp32":
        requested += "; fp32 is faster: the CPU has no bfloat16 instructions"
    assert choose_precision("bf16", torch.device("cpu")) == ("bf16", requested)


@pytest.mark.parametrize(
    ("has_bf16", "precision", "dtype"),
    [(True, "bf16", torch.bfloat16), (False, "fp32", torch.float32)],
)
def test_a_gpu_without_bf16_runs_in_fp16_only_on_request(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, precision: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    gpu = torch.device("cuda")
    chosen, reason = choose_precision("auto", gpu)
    assert chosen == precision
    assert ("fp16 is possible, not measured" in reason) == (not has_bf16)
    assert choose_float_dtype("auto", gpu) == dtype
    assert choose_precision("fp16", gpu) == ("fp16", "as requested")
    assert choose_float_dtype("fp16", gpu) == torch.float16
    with pytest.raises(RequestError, match="fp16: runs on GPUs only; use bf16 or auto on a CPU"):
        choose_precision("fp16", torch.device("cpu"))


def test_openvino_is_for_cpus() -> None:
    with pytest.raises(RequestError, match="engine openvino: runs on CPUs only; use torch or auto"):
        choose_precision("fp32", torch.device("cuda"), "openvino")
    assert choose_precision("fp32", torch.device("cpu"), "openvino")[0] == "fp32"


def test_int8_is_for_cpus_that_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="runs on CPUs only; use bf16 or auto on a GPU"):
        choose_precision("int8", torch.device("cuda"))
    monkeypatch.setattr("imgcls.models.cpu.read_cpu_flags", lambda: {"avx2"})
    with pytest.raises(RequestError, match="amx_int8, avx512_vnni, avx_vnni, without which"):
        choose_precision("int8", torch.device("cpu"))
    assert choose_precision("int8", torch.device("cpu"), "openvino")[0] == "int8"
    monkeypatch.setattr("imgcls.models.cpu.read_cpu_flags", lambda: {"amx_int8"})
    assert choose_precision("int8", torch.device("cpu"))[0] == "int8"
