"""The order of the labeling benchmark: imgcls at each precision of a peer, peers at their own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import exported_peers, labeling, precisions
from benchmarks.machine import Cpu
from benchmarks.programs import PeerFailed, Rate

OWN = {"fp32": 40.0, "bf16": 100.0}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of what would take minutes; torch is fastest in fp32, OpenVINO in bf16."""
    calls: list[tuple[Any, ...]] = []
    for index in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")

    def measure_imgcls(
        bundle: Path, manifest: Path, output: Path, precision: str, engine: str
    ) -> tuple[float, float | None]:
        calls.append(("imgcls", precision, engine))
        (output / "predictions").mkdir(parents=True)
        table = pa.table({"path": [str(tmp_path / "0.png")], "predicted_label": ["class 7"]})
        pq.write_table(table, output / "predictions" / "part-00000.parquet")
        steady = 2 * OWN[precision] if engine == "auto" else None
        return OWN[precision], steady

    def measure_peer(
        name: str,
        bundle: Path,
        manifest: Path,
        output: Path,
        precision: str,
        expected: Any,
        *_: Any,
    ) -> Rate:
        calls.append((name, precision, expected))
        if name.startswith("timm"):
            raise PeerFailed("not comparable: 2 rows written of 4")
        return Rate(name, precision, 20.0, 1.0)

    rates = {"torch": {"fp32": 28.8, "bf16": 3.6}, "openvino": {"fp32": 28.8, "bf16": 60.0}}
    monkeypatch.setattr(labeling, "make_bundle", lambda *_: tmp_path)
    monkeypatch.setattr(exported_peers, "export_network", lambda bundle: calls.append(("export",)))
    monkeypatch.setattr(precisions, "measure_engines", lambda engines, bundle: rates)
    monkeypatch.setattr(labeling, "find_own_precision", lambda: "bf16")
    monkeypatch.setattr(labeling, "read_cpu", lambda: Cpu("Xeon", ("avx2",), 2, "AVX2"))
    monkeypatch.setattr(labeling, "measure_imgcls", measure_imgcls)
    monkeypatch.setattr(labeling, "measure_peer", measure_peer)
    monkeypatch.setattr(
        labeling.limits,
        "measure",
        lambda what, bundle, manifest, *how: calls.append(("limit", what, *how)) or 10.0,
    )
    monkeypatch.setattr(
        labeling,
        "write_results",
        lambda rates, record, *_: calls.append(("results", record)) or tmp_path / "results",
    )
    return calls


def run(source: Path, peers: list[str], **options: Any) -> None:
    usual = {
        "rows": 4, "repeats": 1, "peer_repeats": 1, "limits": "none", "engines": ["auto"],
        "daft_packages": source,
    }  # fmt: skip
    folder = source / "run"
    folder.mkdir()
    chosen = argparse.Namespace(source=source, peers=peers, **(usual | options))
    labeling.measure("resnet18", "imagenet", folder, chosen)


def test_imgcls_runs_at_each_precision_of_a_peer(
    measured: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, ["Daft, tuned", "timm, tuned", "OpenVINO, tuned"])
    label = {str(tmp_path / "0.png"): 7}
    assert measured[:-1] == [
        ("export",),
        ("imgcls", "bf16", "auto"),
        ("imgcls", "fp32", "auto"),
        ("Daft, tuned", "fp32", label),
        ("timm, tuned", "fp32", label),
        ("OpenVINO, tuned", "bf16", label),
    ]
    assert measured[-1][1]["forward_images_per_cpu_second"]["torch"] == {"fp32": 28.8, "bf16": 3.6}
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("4 rows; Xeon, 2 cores, avx2; " + labeling.read_cpu().describe_limit())
    assert "  timm, tuned, fp32" + " " * 29 + "not comparable: 2 rows written of 4" in shown
    ratios = {line[:38].strip(): line.split()[-2:] for line in shown if line.endswith(" x")}
    assert ratios == {"Daft, tuned": ["2.00", "x"], "OpenVINO, tuned": ["5.00", "x"]}


def test_peers_are_repeated_as_often_as_asked_and_the_first_engine_is_compared(
    measured: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, ["DataLoader, tuned"], repeats=2, engines=["auto", "openvino"])
    names = [call[:2] for call in measured if call[0] not in ("results", "export")]
    once = [("imgcls", "bf16")] * 2 + [("imgcls", "fp32")] * 2
    assert names == [*once, ("DataLoader, tuned", "fp32"), *once]
    shown = capsys.readouterr().out
    assert "imgcls, after start-up" in shown
    assert "imgcls --engine openvino, whole job" in shown
    assert "imgcls --engine openvino, after start-up" not in shown  # too few rows


def test_limits_are_those_of_the_engine_that_is_compared(
    measured: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, [], limits="engine", engines=["openvino", "torch"])
    assert [call for call in measured if call[0] == "limit"] == [
        ("limit", "both", "bf16", "openvino")
    ]
    assert "limits: engine openvino" in capsys.readouterr().out


def test_limits_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert labeling.choose_limits("none", is_first=True) == []
    assert labeling.choose_limits("engine", is_first=True) == ["both"]
    assert labeling.choose_limits("all", is_first=False) == ["both", "both by torchvision"]
    assert set(labeling.choose_limits("all", is_first=True)) > {"both", "forward", "decode"}
    for is_installed, engine in ((True, "openvino"), (False, "torch")):
        monkeypatch.setattr(labeling, "is_openvino_installed", lambda found=is_installed: found)
        assert labeling.choose_limit_engine(["auto", "torch"]) == engine
    assert labeling.choose_limit_engine(["torch", "auto"]) == "torch"


def test_names_stand_for_several_peers() -> None:
    assert labeling.select_peers([]) == []
    assert labeling.select_peers(["Daft"]) == ["Daft"]
    tuned = labeling.select_peers(["tuned", "timm"])
    assert {name for name in tuned if not name.endswith(", tuned")} == {"timm"}
    assert {"OpenVINO, tuned", "ONNX Runtime, tuned", "Daft, tuned"} <= set(tuned)
    assert len(labeling.select_peers(["all"])) == 2 * (len(tuned) - 1)
