"""The table and the files of the labeling benchmark: precisions, the CPU, equal comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import labeling_results
from benchmarks.labeling_results import format_table, write_results
from benchmarks.machine import Cpu
from benchmarks.programs import Rate

AVX2 = Cpu("AMD EPYC", ("avx2", "avx512_bf16"), 2, "AVX2")
WITHOUT_LIMIT = Cpu("Xeon", ("avx2", "amx_bf16"), 2, None)
RATES = [
    Rate("limit: both", "bf16", 200.0),
    Rate("imgcls, whole job", "bf16", 100.0),
    Rate("imgcls, whole job", "fp32", 40.0),
    Rate("OpenVINO, tuned", "bf16", 80.0, 0.99),
    Rate("ONNX Runtime, tuned", "fp32", 50.0, 1.0),
    Rate("imgcls, whole job", "bf16", 120.0),
    Rate("imgcls, whole job", "bf16", 110.0),
]


def read_rows(table: str) -> dict[tuple[str, str], list[str]]:
    """Numbers of the rows with a precision, by name and precision."""
    found = {}
    for line in table.splitlines()[1:]:
        precision, *numbers = line[38:].split() or [""]
        if precision in ("bf16", "fp32"):
            found[line[:38].strip(), precision] = numbers
    return found


def test_a_peer_is_compared_with_imgcls_at_its_precision() -> None:
    rows = read_rows(format_table(RATES, WITHOUT_LIMIT))
    assert rows["imgcls, whole job", "bf16"] == ["110.0", "55%"]
    assert rows["OpenVINO, tuned", "bf16"] == ["80.0", "40%", "1.38", "x"]
    assert rows["ONNX Runtime, tuned", "fp32"] == ["50.0", "0.80", "x"]


def test_a_peer_without_imgcls_at_its_precision_has_no_ratio() -> None:
    rates = [Rate("imgcls, whole job", "bf16", 100.0), Rate("timm, tuned", "fp32", 50.0)]
    assert read_rows(format_table(rates, WITHOUT_LIMIT))["timm, tuned", "fp32"] == ["50.0"]


def test_the_table_names_the_cpu_and_the_limit() -> None:
    *_, limit, cpu = format_table(RATES, AVX2).splitlines()
    assert limit == labeling_results.NOT_LIMITED
    assert cpu == f"CPU: {AVX2}"
    table = format_table(RATES, WITHOUT_LIMIT)
    assert table.endswith("\nCPU: Xeon, 2 cores, avx2 amx_bf16")
    assert "ONEDNN" not in table


def test_the_file_describes_the_cpu_and_the_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labeling_results, "RESULTS", tmp_path / "bench-results")
    titles = []
    monkeypatch.setattr(labeling_results, "draw_chart", lambda *args: titles.append(args[1:3]))
    forward = {"torch": {"fp32": 28.8, "bf16": 3.6}}
    record = {"model": "resnet18", "images": "png", "rows": 4000, "forward": forward}
    place = write_results(RATES, record, AVX2, tmp_path)
    assert place.name == "labeling-resnet18-png-avx2"
    assert titles == [("resnet18, 4,000 png images", str(AVX2))]
    table = pq.read_table(f"{place}.parquet")
    assert table.column("precision").to_pylist() == [rate.precision for rate in RATES]
    assert table.column("labels_agree").to_pylist()[3] == 0.99
    described = json.loads(table.schema.metadata[b"imgcls.benchmark"])
    assert described["cpu"] == {
        "model": "AMD EPYC", "instruction_sets": ["avx2", "avx512_bf16"], "cores": 2,
        "isa_limit": "AVX2",
    }  # fmt: skip
    assert described["forward"] == forward
    assert {"ray", "torch"} <= set(described["versions"])
