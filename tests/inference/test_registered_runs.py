"""A run with a registered model keeps the version that it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls.config import build
from imgcls.errors import RunFailed
from imgcls.inference import predict as job
from imgcls.inference.config import PredictConfig
from imgcls.inference.predict import predict
from imgcls.inference.relabel import relabel
from imgcls.inference.requests import check_request
from imgcls.models.bundle import load_bundle, load_bundle_weights, save_bundle
from imgcls.runs import layout
from imgcls.runs.committed import open_run
from tests.mlflow_store import ModelStore
from tests.runs.embedded import CLASSES, commit_run, save_with_head


def warm(source: Path, folder: Path) -> Path:
    """The bundle with another temperature, so with another hash."""
    bundle = load_bundle(str(source))
    spec = bundle.spec.model_copy(update={"temperature": 2.0})
    save_bundle(str(folder), spec, load_bundle_weights(bundle))
    return folder


def read_record(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((output / layout.RUN_FILE).read_text())
    return record


def start_request(output: Path, manifest: Path, **more: Any) -> PredictConfig:
    settings = {"manifest": str(manifest), "model": "models:/night@champion", "output": str(output)}
    return build(PredictConfig, settings | more)


def write_stored(output: Path, version: str, uri: str = "models:/night@champion") -> None:
    output.mkdir(parents=True)
    stored = {"uri": uri, "name": "night", "version": version, "sha256": "x"}
    record = {"format_version": layout.RUN_FORMAT_VERSION, "registered_model": stored}
    (output / layout.RUN_FILE).write_text(json.dumps(record))


@pytest.fixture
def two_versions(model_store: ModelStore, color_bundle: Path, tmp_path: Path) -> list[str]:
    """Hashes of two versions of a model; the alias has the second one."""
    paths = [color_bundle, warm(color_bundle, tmp_path / "warm")]
    for path in paths:
        model_store.register("night", path, "champion")
    return [load_bundle(str(path)).sha256 for path in paths]


def test_a_resumed_request_gets_the_stored_version_and_others_that_of_the_alias(
    two_versions: list[str], colors: Callable[..., Path], tmp_path: Path
) -> None:
    manifest, old, new = colors(3), *two_versions
    write_stored(tmp_path / "begun", "1")
    write_stored(tmp_path / "other", "1", "models:/night/1")

    def resolve(output: str, **more: Any) -> tuple[str, str]:
        config = start_request(tmp_path / output, manifest, **more)
        checked, _, bundle = check_request(config, str(tmp_path / output))
        assert bundle.registered is not None
        assert bundle.registered.uri == "models:/night@champion"
        return checked.model, bundle.sha256

    assert resolve("fresh") == ("models:/night/2", new)
    assert resolve("begun") == ("models:/night/1", old)
    assert resolve("begun", overwrite=True) == ("models:/night/2", new)
    assert resolve("other") == ("models:/night/2", new)
    begun = {"since": str(tmp_path / "none")}
    assert resolve("begun", **begun) == ("models:/night/1", old)
    (tmp_path / "begun" / layout.SUCCESS_FILE).write_text("{}")
    assert resolve("begun", **begun) == ("models:/night/2", new)  # for what is new since then
    assert resolve("begun") == ("models:/night/1", old)  # committed: the same run


def test_relabeling_keeps_the_version_that_it_began_with(
    model_store: ModelStore, tmp_path: Path
) -> None:
    source = save_with_head(tmp_path / "source", CLASSES, 1)
    commit_run(tmp_path / "run", source)
    for seed in (2, 3):
        model_store.register("heads", save_with_head(tmp_path / str(seed), CLASSES, seed), "live")
        relabel(
            source=str(tmp_path / "run"), model="models:/heads@live", output=str(tmp_path / "out")
        )
        run = open_run(str(tmp_path / "out"))
        assert run.bundle_sha256 == load_bundle(str(tmp_path / "2")).sha256
        assert run.run_record["registered_model"]["version"] == "1"
        assert run.provenance["config"]["model"] == "models:/heads/1"


@pytest.mark.slow
def test_an_alias_that_moves_between_start_and_resume_does_not_change_the_run(
    model_store: ModelStore, color_bundle: Path, colors: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, joined: None,
) -> None:  # fmt: skip
    model_store.register("night", color_bundle)
    model_store.client.set_registered_model_alias("night", "champion", "1")
    output, request = tmp_path / "out", start_request(tmp_path / "out", colors(6))

    def stop(*_: Any, **__: Any) -> None:
        raise RunFailed("killed")

    with monkeypatch.context() as patch:
        patch.setattr(job._PredictRun, "_commit", stop)
        with pytest.raises(RunFailed, match="killed"):
            predict(request)
    model_store.register("night", warm(color_bundle, tmp_path / "warm"), "champion")
    predict(request)
    run = open_run(str(output))
    assert run.bundle_sha256 == load_bundle(str(color_bundle)).sha256
    stored = run.run_record["registered_model"]
    assert stored == {
        "uri": "models:/night@champion", "name": "night", "version": "1",
        "sha256": run.bundle_sha256,
    }  # fmt: skip
