"""Weights as training scripts leave them are taken, and reading them runs no code."""

from __future__ import annotations

import argparse
import os
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, load_bundle, save_bundle
from imgcls.models.config import ImportConfig
from imgcls.models.import_weights import import_model
from imgcls.training import network as networks

ARCHITECTURE = zoo.resolve_architecture("small_cnn", {"width": 4})
CLASSES = ["a", "b", "c"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def state_of(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return zoo.build_network(ARCHITECTURE, len(CLASSES)).state_dict()


def below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


class AttributeDict(dict[str, Any]):
    """As Lightning keeps hyperparameters."""


def saved(held: Any, file: Path, **options: Any) -> str:
    """Write with `torch.save` where Lightning is installed, to be read where it is not."""
    module: Any = ModuleType("lightning")
    module.AttributeDict = AttributeDict
    sys.modules["lightning"] = module
    AttributeDict.__module__, AttributeDict.__qualname__ = "lightning", "AttributeDict"
    try:
        torch.save(held, file, **options)
    finally:
        del sys.modules["lightning"]
    return str(file)


SCRIPT = {"epoch": 3, "args": argparse.Namespace(lr=0.1, output=Path("out")), "best": np.float64(1)}
STATE = state_of()
TAKEN: dict[str, Any] = {
    "plain": STATE,
    "ordered": OrderedDict(STATE),
    "compiled": below("_orig_mod.", STATE),
    "distributed": below("module.", STATE),
    "compiled and distributed": below("_orig_mod.module.", STATE),
    "compiled in part": {k.replace("head.", "head._orig_mod."): v for k, v in STATE.items()},
    "lightning": {
        "state_dict": below("model.", STATE) | {"criterion.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.5",
        "hyper_parameters": AttributeDict(lr=0.1),
    },
    "lightning's net": {"state_dict": below("net.", STATE)},
    "backbone": {"state_dict": below("backbone.", STATE)},
    "a name of its own": below("my_net.inner.", STATE),
    "torchvision's script": {"model": STATE, **SCRIPT},
    "torchvision's script, averaged": {
        "model": STATE,
        "model_ema": below("module.", state_of(1)) | {"n_averaged": torch.tensor(9)},
        **SCRIPT,
    },
    "timm's script": {"state_dict": STATE, "arch": "small_cnn", **SCRIPT},
    "model_state": {"model_state": STATE, "optimizer": {"lr": 0.1}},
    "ema alone": {"ema": {"module": below("module.", STATE)}},
}


@pytest.mark.parametrize("name", TAKEN)
def test_weights_in_wrappers_are_taken(name: str, tmp_path: Path) -> None:
    network = zoo.build_network(ARCHITECTURE, len(CLASSES))
    loaded = zoo.load_weights(saved(TAKEN[name], tmp_path / "weights.pth"), ARCHITECTURE)
    assert zoo.apply_weights(network, loaded, replace_head=False) == []
    for key, value in network.state_dict().items():
        assert torch.equal(value, STATE[key]), key


def test_safetensors_with_a_prefix_become_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = below("model.", STATE) | {"criterion.weight": torch.ones(3)}
    save_file(held, tmp_path / "weights.bin")  # known by what it holds, not by its name
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    config = {
        "arch": "small_cnn",
        "options": {"width": 4},
        "weights": str(tmp_path / "weights.bin"),
        "classes": str(tmp_path / "classes.txt"),
        "output": str(tmp_path / "bundle"),
    }
    import_model(ImportConfig.model_validate(config))
    note = "note: using the weights below 'model.'; 1 other tensors are ignored (criterion."
    assert note in capsys.readouterr().out
    (tmp_path / "classes.txt").write_text("a\nb")
    with pytest.raises(BundleError, match="has 2 classes, but the weights have 3 outputs"):
        import_model(ImportConfig.model_validate(config | {"overwrite": True}))


def test_two_sets_of_weights_are_not_chosen_from() -> None:
    both = below("one.", STATE) | below("two.", state_of(1))
    with pytest.raises(BundleError, match=r"below 'one\.' and below 'two\.'; save only one"):
        zoo.apply_weights(zoo.build_network(ARCHITECTURE, 3), both, replace_head=False)
    known = below("student.", state_of(1)) | below("teacher.", STATE)
    network = zoo.build_network(ARCHITECTURE, 3)
    zoo.apply_weights(network, known, replace_head=False)
    assert torch.equal(network.state_dict()["head.4.weight"], STATE["head.4.weight"])


class Evil:
    """What `pickle` would run when it loads it."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._place}",)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
def test_reading_weights_runs_no_code(tmp_path: Path, archive: bool) -> None:
    file, trace = tmp_path / "weights.pth", tmp_path / "trace"
    held = {"model": STATE, "args": Evil(trace)}
    torch.save(held, file, _use_new_zipfile_serialization=archive)
    with pytest.raises(BundleError, match=r"posix\.system.*torch\.save\(model\.state_dict"):
        zoo.load_weights(str(file), ARCHITECTURE)
    # what is replaced by a placeholder is not even looked up
    held = {"model": STATE, "args": AttributeDict(trace=1)}
    assert zoo.load_weights(saved(held, file), ARCHITECTURE).keys() == STATE.keys()
    assert not trace.exists()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (POINTER, "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"),
        (b"<!DOCTYPE html><html>", "is an HTML or XML page; download the file itself"),
        (b"nothing that torch knows", "damaged, or not by torch.save"),
        (b"", "damaged, or not by torch.save"),
    ],
    ids=["lfs", "html", "text", "empty"],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_no_weights_file_is_named(
    tmp_path: Path, data: bytes, expected: str, suffix: str
) -> None:
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        zoo.load_weights(str(file), ARCHITECTURE)
    message = str(caught.value)
    if suffix == "pth" or data == POINTER:
        assert expected in message
    assert "\x1b" not in message
    assert "weights_only" not in message


def test_a_whole_network_in_a_file_is_refused_with_the_way_to_save_its_weights(
    tmp_path: Path,
) -> None:
    torch.save(zoo.build_network(ARCHITECTURE, 3), tmp_path / "network.pth")
    expected = r"it has objects of .*imgcls\.models\.small_cnn\.SmallCNN.*which could run code"
    with pytest.raises(BundleError, match=expected) as caught:
        zoo.load_weights(str(tmp_path / "network.pth"), ARCHITECTURE)
    assert "\x1b" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_a_bundle_whose_weights_git_lfs_did_not_fetch_is_named_so(tmp_path: Path) -> None:
    preprocess = zoo.get_default_preprocess(ARCHITECTURE)
    spec = BundleSpec(architecture=ARCHITECTURE, classes=CLASSES, preprocess=preprocess)
    save_bundle(str(tmp_path), spec, STATE)
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(BundleError, match=r"model\.safetensors is a Git LFS pointer"):
        load_bundle(str(tmp_path))


# ------------------------------------------------------------------ backbones without a head


def headless(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    architecture = zoo.resolve_architecture(name)
    network = zoo.build_network(architecture, 3)
    heads = zoo.list_head_names(network)
    state = network.state_dict()
    return architecture, {k: v for k, v in state.items() if k.rpartition(".")[0] not in heads}


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_weights_without_a_head_get_a_new_one_in_training_and_are_not_imported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, state = headless(name)
    file = str(tmp_path / "backbone.pth")
    torch.save(below("backbone.", state), file)
    network = networks.build_initial_network(architecture, file, 5, seed=3)
    head, _ = zoo.find_head(network)
    output = capsys.readouterr().out
    assert f"has no head ({head}.weight, {head}.bias)" in output.replace("have no", "has no")
    for key, value in state.items():
        assert torch.equal(network.state_dict()[key], value)
    fresh = networks.build_initial_network(architecture, None, 5, seed=3).state_dict()
    assert torch.equal(network.state_dict()[f"{head}.weight"], fresh[f"{head}.weight"])
    lines = rf"{head}.weight: is missing in the file\n  {head}.bias: .*\n"
    with pytest.raises(BundleError, match=lines + "the weights are those of a backbone"):
        zoo.apply_weights(network, zoo.load_weights(file, architecture), replace_head=False)
    # a key of the body that is missing is no missing head
    key = next(iter(state))
    torch.save({k: v for k, v in state.items() if k != key}, file)
    with pytest.raises(BundleError, match=f"in 1 keys:\n  {key}: is missing in the file$"):
        networks.build_initial_network(architecture, file, 5, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_dinov2.lvd142m",
        "vit_small_patch16_dinov3.lvd1689m",
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_224.mae",
        "eva02_tiny_patch14_224.mim_in22k",
        "convnext_tiny.dinov3_lvd1689m",
        "beitv2_base_patch16_224",
    ],
)
def test_backbones_of_timm_get_a_new_head(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
    torch.save(state, tmp_path / "backbone.pth")
    architecture = zoo.resolve_architecture(f"timm:{name}")
    network = networks.build_initial_network(
        architecture, str(tmp_path / "backbone.pth"), 3, seed=0
    )
    own = network.state_dict()
    heads = zoo.list_head_names(network)
    body = {key for key in own if key.rpartition(".")[0] not in heads}
    assert body == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in body)


def test_of_weights_under_other_names_the_names_of_both_sides_are_shown() -> None:
    state = {f"layers.{i}.w": torch.zeros(1) for i in range(50)}
    with pytest.raises(BundleError) as caught:
        zoo.apply_weights(zoo.build_network(ARCHITECTURE, 3), state, replace_head=False)
    lines = str(caught.value).splitlines()
    assert "  features.0.0.weight: is missing in the file" in lines
    assert "  layers.0.w: is missing in the network" in lines
