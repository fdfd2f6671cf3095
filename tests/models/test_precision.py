"""The precision follows the instructions of the processor that oneDNN may use."""

from __future__ import annotations

import io

import pytest
import torch

from imgcls.errors import RequestError
from imgcls.models.precision import choose_precision, read_cpu_flags


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
    monkeypatch.setattr("imgcls.models.precision.read_cpu_flags", lambda: flags)
    assert choose_precision("auto", torch.device("cpu")) == (precision, reason)
    assert choose_precision("fp32", torch.device("cpu")) == ("fp32", "as requested")
    assert choose_precision("bf16", torch.device("cpu")) == ("bf16", "as requested")


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ("", {"avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}),
        ("AVX512_CORE_BF16", {"avx2", "avx512_vnni", "avx512_bf16"}),
        ("avx2", {"avx2"}),
    ],
)
def test_what_onednn_must_not_use_is_no_instruction_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, limit: str, left: set[str]
) -> None:
    info = "flags : avx2 avx512_vnni avx512_bf16 amx_int8 amx_bf16\nflags : none\n"
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(info))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert read_cpu_flags() - {"flags", ":"} == left


def test_int8_is_for_cpus_that_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="runs on CPUs only; use bf16 or auto on a GPU"):
        choose_precision("int8", torch.device("cuda"))
    monkeypatch.setattr("imgcls.models.precision.read_cpu_flags", lambda: {"avx2"})
    with pytest.raises(RequestError, match="amx_int8, avx512_vnni, avx_vnni, without which"):
        choose_precision("int8", torch.device("cpu"))
