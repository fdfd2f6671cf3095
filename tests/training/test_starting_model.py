"""A training from a registered bundle: verified, recorded, and resumed with the same version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls.config import build
from imgcls.errors import BundleError, OutputError, RequestError
from imgcls.models.bundle import load_bundle, load_bundle_weights, save_bundle
from imgcls.training.checkpoints import Checkpoints
from imgcls.training.config import TrainConfig
from imgcls.training.epoch_metrics import EpochMetrics, TrainLoopResult
from imgcls.training.publish import _build_spec
from imgcls.training.search_space import TuneConfig, claim_search, parse_search_model
from imgcls.training.setup import resolve_setup
from imgcls.training.starting_model import check_space_models, find_starting_model, use_model
from tests.mlflow_store import ModelStore

EPOCH = EpochMetrics(1, 0.4, 0.9, 1.0, 0.5, 1e-3, 1.0, 1.0, 100, 10)


def ask(manifest: Path, output: Path, **model: Any) -> TrainConfig:
    data = {"train": str(manifest), "val": str(manifest)}
    chosen = {"name": "models:/start@live", "weights": "pretrained"} | model
    return build(TrainConfig, {"data": data, "output": str(output), "model": chosen})


def move_alias(store: ModelStore, source: Path, folder: Path) -> None:
    """Register the bundle with another temperature, which the alias then has."""
    bundle = load_bundle(str(source))
    spec = bundle.spec.model_copy(update={"temperature": 3.0})
    save_bundle(str(folder), spec, load_bundle_weights(bundle))
    store.register("start", folder, "live")


@pytest.fixture
def start(model_store: ModelStore, color_bundle: Path) -> str:
    """Version of a model that the alias `live` has."""
    version = model_store.register("start", color_bundle)
    model_store.client.set_registered_model_alias("start", "live", version)
    return version


def test_a_training_records_its_version_and_keeps_it_when_it_is_resumed(
    start: str, model_store: ModelStore, color_bundle: Path, colors: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    request = ask(colors(6), tmp_path / "out")
    first = resolve_setup(request)
    record = {
        "uri": "models:/start@live",
        "name": "start",
        "version": start,
        "sha256": load_bundle(str(color_bundle)).sha256,
    }
    assert first.identity["registered_model"] == record
    spec = _build_spec(first, TrainLoopResult((EPOCH,), "fp32"), "1", EPOCH, (0, 0))
    assert spec.provenance["registered_model"] == record
    Checkpoints(str(tmp_path / "out")).start_run(first.identity)
    move_alias(model_store, color_bundle, tmp_path / "moved")
    assert resolve_setup(request).identity == first.identity
    shutil.rmtree(tmp_path / "out")  # finished: its bundle has the version
    save_bundle(str(tmp_path / "out"), spec, load_bundle_weights(load_bundle(str(color_bundle))))
    assert resolve_setup(request).identity == first.identity
    fresh = resolve_setup(request.model_copy(update={"overwrite": True}))
    assert fresh.identity["registered_model"]["version"] == str(int(start) + 1)


def test_a_search_resolves_an_alias_once_for_all_trials_and_when_it_is_resumed(
    start: str, model_store: ModelStore, color_bundle: Path, colors: Callable[..., Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = ask(colors(6), tmp_path / "search").model_dump(mode="json")
    space = {"optim.lr": {"choice": [0.1, 0.2]}}
    config = build(TuneConfig, settings | {"tune": {"space": space}})
    found = find_starting_model(config)
    assert found is not None
    inputs = {"data": {"train": "1" * 32}, "initial_weights": "2" * 32}
    claim_search(use_model(config, found.pinned_uri), inputs, found.record)
    move_alias(model_store, color_bundle, tmp_path / "moved")
    again = find_starting_model(config)
    assert again == found
    pinned = use_model(config, again.pinned_uri)
    claim_search(pinned, inputs, again.record)
    other = inputs | {"data": {"train": "3" * 32}}
    with pytest.raises(OutputError, match="other images, labels or initial weights"):
        claim_search(pinned, other, again.record)
    text = (tmp_path / "search" / "_tune.json").read_text()
    assert load_bundle(str(color_bundle)).sha256 in text
    assert parse_search_model(text) == found.record
    (tmp_path / "search" / "_tune.json").write_text(text.partition('{"inputs"')[0])
    claim_search(pinned, other, again.record)  # a search of an earlier version
    newer = find_starting_model(config.model_copy(update={"overwrite": True}))
    assert newer is not None
    with pytest.raises(OutputError, match="has a search with other settings"):
        claim_search(use_model(config, newer.pinned_uri), inputs, newer.record)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # as in the actor of a trial
    trial = build(TrainConfig, use_model(config, found.url).model_dump(exclude={"tune"}))
    assert resolve_setup(trial, found.record).identity["registered_model"] == found.record


def test_a_search_over_registered_models_is_refused(tmp_path: Path) -> None:
    space = {"model.name": {"choice": ["small_cnn", "models:/start@live"]}}
    settings = {"data": "x", "output": str(tmp_path), "tune": {"space": space}}
    with pytest.raises(RequestError, match=r"tune\.space\.model\.name: models:/start@live"):
        check_space_models(build(TuneConfig, settings))


def test_a_version_whose_artifacts_have_other_weights_is_refused(
    start: str, colors: Callable[..., Path], tmp_path: Path, color_bundle: Path
) -> None:
    found = find_starting_model(ask(colors(6), tmp_path / "out"))
    assert found is not None
    weights = Path(found.url) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(BundleError, match="the bundle in its folder names"):
            resolve_setup(ask(colors(6), tmp_path / "out"))
    finally:
        weights.write_bytes(whole)


def test_a_version_that_has_another_bundle_than_at_the_start_is_refused(
    start: str, colors: Callable[..., Path], tmp_path: Path
) -> None:
    stored = {"uri": "models:/start@live", "name": "start", "version": start, "sha256": "e" * 64}
    (tmp_path / "out" / "_train").mkdir(parents=True)
    identity = tmp_path / "out" / "_train" / "run.json"
    identity.write_text(json.dumps({"registered_model": stored}))
    with pytest.raises(BundleError, match="began with eeeeeeeeeeee; pass --overwrite"):
        find_starting_model(ask(colors(6), tmp_path / "out"))


def test_random_weights_of_a_registered_model_are_noted_and_a_uri_as_weights_refused(
    start: str, colors: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find_starting_model(ask(colors(6), tmp_path / "out", weights=None))
    assert "starts from random weights; pass --model.weights pretrained" in capsys.readouterr().out
    with pytest.raises(RequestError, match=r"model\.weights models:/start/1: is a bundle; pass it"):
        find_starting_model(
            ask(colors(6), tmp_path / "out", name="small_cnn", weights="models:/start/1")
        )
