"""The description of the CPU: model, instruction sets, cores, and which tools a limit affects."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.machine import CORES, Cpu, read_cpu

EPYC = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni avx512_bf16 avx512bw

processor\t: 1
model\t\t: 99
model name\t: another one
flags\t\t: amx_bf16
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n"


@pytest.mark.parametrize(
    ("info", "model", "sets"),
    [
        (
            EPYC,
            "AMD EPYC (family 25, model 17)",
            ("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
        ),
        (EPYC.replace("avx512", "old"), "AMD EPYC (family 25, model 17)", ("avx2",)),
        (
            "model name : Xeon\nflags : avx512_bf16 amx_int8 amx_bf16 amx_tile avx2 avx512f\n",
            "Xeon",
            ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
        ),
    ],
    ids=["avx512", "avx2", "amx"],
)
def test_the_first_processor_is_described(
    info: str, model: str, sets: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(info)
    assert read_cpu(tmp_path / "cpuinfo", {}) == Cpu(model, sets, CORES, None)


def test_an_arm_cpu_has_its_own_instruction_sets(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(ARM)
    assert read_cpu(tmp_path / "cpuinfo", {}).instruction_sets == ("asimd", "i8mm", "bf16")


def test_a_limit_is_named_with_the_tools_that_it_affects(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(EPYC)
    cpu = read_cpu(tmp_path / "cpuinfo", {"ONEDNN_MAX_CPU_ISA": "avx2"})
    cores = "1 core" if CORES == 1 else f"{CORES} cores"
    assert str(cpu) == (
        f"AMD EPYC (family 25, model 17), {cores}, avx2 avx512f avx512_vnni avx512_bf16; "
        "ONEDNN_MAX_CPU_ISA=AVX2 limits oneDNN (torch's convolutions and matrix products) and "
        "OpenVINO, not ONNX Runtime"
    )
    assert cpu.to_json()["isa_limit"] == "AVX2"


def test_no_limit_is_named_where_none_is_set(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(EPYC)
    for environment in ({}, {"ONEDNN_MAX_CPU_ISA": ""}):
        cpu = read_cpu(tmp_path / "cpuinfo", environment)
        assert cpu.describe_limit() == ""
        assert str(cpu).endswith(" avx512_bf16")
