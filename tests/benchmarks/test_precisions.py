"""The precision of peers: the fastest on this CPU for tuned ones, their own for documented ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from benchmarks import labeling, precisions


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"fp32": 28.8, "bf16": 3.6}, "fp32"),
        ({"fp32": 28.8, "bf16": 29.5}, "fp32"),
        ({"fp32": 31.0, "bf16": 61.3}, "bf16"),
        ({"fp32": 30.5}, "fp32"),
    ],
    ids=["emulated", "ignored", "native", "alone"],
)
def test_the_fastest_precision_is_chosen(rates: dict[str, float], expected: str) -> None:
    assert precisions.choose_precision(rates) == expected


def test_each_tuned_peer_takes_the_precision_of_its_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {
        "torch": {"fp32": 28.8, "bf16": 3.6},
        "openvino": {"fp32": 28.8, "bf16": 60.1},
        "onnxruntime": {"fp32": 30.5},
    }
    asked = []

    def measure(engines: set[str], bundle: Path) -> dict[str, dict[str, float]]:
        asked.append(engines)
        return {engine: rates[engine] for engine in rates if engine in engines}

    monkeypatch.setattr(precisions, "measure_engines", measure)
    monkeypatch.setattr(
        precisions,
        "find_default_precision",
        lambda engine, bundle: "bf16" if engine == "openvino" else "fp32",
    )
    names = ["DataLoader", "OpenVINO", "Daft, tuned", "OpenVINO, tuned", "ONNX Runtime, tuned"]
    found, chosen = labeling.choose_precisions(names, Path("bundle"))
    assert chosen == {
        "DataLoader": "fp32",
        "OpenVINO": "bf16",
        "Daft, tuned": "fp32",
        "OpenVINO, tuned": "bf16",
        "ONNX Runtime, tuned": "fp32",
    }
    assert asked == [set(rates)]
    assert found == rates
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split(": ", 1)[1] == "fp32 28.8, bf16 3.6; tuned: fp32"
    assert len(shown) == 3


def raise_error() -> None:
    raise RuntimeError("no primitive for bf16")


def test_a_precision_that_cannot_run_is_left_out() -> None:
    fine = lambda: lambda: sum(range(10_000))  # noqa: E731
    for fails in (raise_error, lambda: raise_error):  # while it is prepared, and when it runs
        rates = precisions.measure_rates({"fp32": fine, "bf16": fails})
        assert list(rates) == ["fp32"]
        assert rates["fp32"] > 0


def test_a_network_that_does_not_run_in_fp32_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no primitive"):
        precisions.measure_rates({"fp32": raise_error})


def test_nothing_is_measured_for_documented_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "_measure", None)
    rates, chosen = labeling.choose_precisions(["Daft", "timm"], Path("bundle"))
    assert rates == {}
    assert chosen == {"Daft": "fp32", "timm": "fp32"}


def test_an_engine_that_crashes_is_measured_in_fp32_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(precisions, "_measure", crash_unless_alone)
    found = precisions.measure_engines({"openvino", "onnxruntime"}, tmp_path)
    assert found == {"openvino": {"fp32": 1.0}, "onnxruntime": {"fp32": 1.0}}


def crash_unless_alone(engine: str, bundle: Path, precisions: tuple[str, ...]) -> dict[str, float]:
    if len(precisions) > 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return {"fp32": 1.0}
