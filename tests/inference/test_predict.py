"""Requests that `imgcls predict` refuses before it starts Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from imgcls.cli import main
from tests.conftest import write_manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--manifest": "nowhere.csv"}, "no such file"),
        ({"--manifest.path-column": "file"}, "--manifest.path-column"),
        ({"--manifest": "taken.csv"}, "column 'confidence' is an output column of predict"),
        ({"--model": "damaged"}, "the file is damaged"),
        ({"--model": "nowhere"}, "imgcls model import"),
        ({"--output": "file/below"}, "cannot be written"),
        ({"--topk": "7"}, "did you mean top_k"),
    ],
)
def test_a_bad_request_exits_2_with_a_remedy_before_ray_starts(
    change: dict[str, str],
    message: str,
    colors: Callable[..., Path],
    color_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "taken.csv", [("a.jpg", "1")], ("path", "confidence"))
    (tmp_path / "file").write_text("in the way")
    damaged = shutil.copytree(color_bundle, tmp_path / "damaged") / "model.safetensors"
    weights = bytearray(damaged.read_bytes())
    weights[-1] ^= 1
    damaged.write_bytes(weights)
    manifest = str(colors(6))
    options = {"--manifest": manifest, "--model": str(color_bundle), "--output": "out"} | change
    code = main(["predict", *(part for pair in options.items() for part in pair)])
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
    assert not list(tmp_path.glob("out/*"))
    assert not ray.is_initialized()
