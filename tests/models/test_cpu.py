"""The instructions of the CPU decide which engine is used without a benchmark."""

from __future__ import annotations

import io

import pytest

from imgcls.models import cpu
from imgcls.models.cpu import read_cpu_flags


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


@pytest.mark.parametrize(
    ("flags", "is_faster"),
    [
        ({"avx2"}, True),
        ({"avx2", "avx512f", "avx512_bf16"}, True),
        ({"avx2", "avx512_bf16", "amx_bf16"}, True),
        ({"asimd", "bf16"}, False),
        ({"sse4_2"}, False),
    ],
)
def test_openvino_is_faster_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], is_faster: bool
) -> None:
    monkeypatch.setattr(cpu, "read_cpu_flags", lambda: flags)
    assert cpu.is_openvino_faster() == is_faster
