"""Commands that need no cluster take a bundle of the model registry like one in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from imgcls.config import build
from imgcls.errors import RequestError
from imgcls.evaluation.calibrate import calibrate
from imgcls.evaluation.config import CalibrateConfig, QuantizeConfig
from imgcls.evaluation.quantize import quantize_bundle
from imgcls.models.bundle import load_bundle
from imgcls.models.config import ExportConfig
from imgcls.models.cpu import read_cpu_flags
from imgcls.models.export import export_bundle
from imgcls.serving.config import ServeConfig
from imgcls.serving.deployment import locate_model
from tests.evaluation.runs import CLASSES, commit, drawn
from tests.mlflow_store import ModelStore
from tests.runs.embedded import save_with_head

URI = "models:/held@live"


def run_calibrate(folder: Path, colors: Callable[..., Path]) -> str:
    sha256 = load_bundle(URI).sha256
    run = commit(folder / "run", drawn(600, 2, sharpness=2.0), bundle_sha256=sha256)
    settings = {"model": URI, "predictions": str(run), "output": str(folder / "made")}
    stored = settings | {"output": load_bundle(URI).url, "overwrite": True}
    with pytest.raises(RequestError, match="is the input bundle"):
        calibrate(build(CalibrateConfig, stored))
    made = calibrate(build(CalibrateConfig, settings)).bundle
    return str(made.spec.provenance["calibration"]["bundle_sha256"])


def run_quantize(folder: Path, colors: Callable[..., Path]) -> str:
    if "avx2" not in read_cpu_flags():
        pytest.skip("this CPU has no AVX2")
    settings = {"model": URI, "manifest": str(colors(32)), "output": str(folder / "made")}
    made = quantize_bundle(build(QuantizeConfig, settings | {"images": 32}))
    assert made.weights_sha256 == load_bundle(URI).weights_sha256
    return load_bundle(URI).sha256


def run_export(folder: Path, colors: Callable[..., Path]) -> str:
    settings = {"model": URI, "output": str(folder / "made"), "formats": ["torchscript"]}
    export_bundle(build(ExportConfig, settings))
    sha256 = load_bundle(URI).sha256
    assert sha256 in (folder / "made" / "model.json").read_text()
    return sha256


def run_serve(folder: Path, colors: Callable[..., Path]) -> str:
    """Replicas on other machines read the folder, and never ask the registry."""
    located = locate_model(build(ServeConfig, {"model": URI})).model
    assert not located.startswith("models:")
    return load_bundle(located).sha256


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", [run_calibrate, run_quantize, run_export, run_serve])
def test_a_command_takes_a_registered_model(
    run: Callable[..., str], model_store: ModelStore, tmp_path: Path, colors: Callable[..., Path]
) -> None:
    source = save_with_head(tmp_path / "source", list(CLASSES), 1)
    version = model_store.register("held", source)
    model_store.client.set_registered_model_alias("held", "live", version)
    assert run(tmp_path, colors) == load_bundle(str(source)).sha256
