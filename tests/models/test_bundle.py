"""The bundle is the model: what was saved comes back, and anything else is refused."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import BundleError, RequestError, StorageError
from imgcls.models import zoo
from imgcls.models.acceptance import NEVER_ACCEPT
from imgcls.models.bundle import (
    BundleSpec,
    load_bundle,
    load_bundle_weights,
    read_description,
    save_bundle,
)
from imgcls.models.bundle_card import render_minimal_card
from imgcls.models.classifier import Classifier

FILES = ("bundle.json", "model.safetensors")


def spec_of(classes: list[str], **changes: Any) -> BundleSpec:
    architecture = zoo.resolve_architecture("small_cnn", {"width": 1})
    preprocess = changes.pop("preprocess", zoo.get_default_preprocess(architecture))
    return BundleSpec(architecture=architecture, classes=classes, preprocess=preprocess, **changes)


def network_of(spec: BundleSpec) -> torch.nn.Module:
    return zoo.build_network(spec.architecture, len(spec.classes))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = spec_of(["cat", "dog"], temperature=1.5, threshold=0.25)
    folder = tmp_path_factory.mktemp("pristine") / "bundle"
    save_bundle(str(folder), spec, network_of(spec).state_dict())
    return folder


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A bundle to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def refused(folder: object, call: Callable[[str], object] = load_bundle) -> str:
    with pytest.raises(BundleError) as caught:
        call(str(folder))
    assert str(folder) in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ what was saved comes back


def test_a_bundle_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    spec = spec_of(
        ["cat", "dog", "ünï→猫", 'quo"te', "007", "null", "a/b", " "],
        preprocess=Preprocess(resize=40, crop=36, interpolation="bicubic", mode="pad"),
        temperature=2.25,
        threshold=0.125,
        provenance={"config": {"seed": 1, "deep": [1, None, "x"]}, "git": None},
        metrics={"accuracy": 0.975, "loss": 1e-9},
    )
    state = network_of(spec).state_dict()
    saved = save_bundle(str(tmp_path / "bundle"), spec, state)
    loaded = load_bundle(str(tmp_path / "bundle"))
    assert loaded == saved
    assert loaded.spec == spec
    weights = load_bundle_weights(loaded)
    assert weights.keys() == state.keys()
    for key, value in state.items():
        assert weights[key].dtype == value.dtype
        assert torch.equal(weights[key], value)


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


@settings(max_examples=50)
@given(
    classes=st.lists(
        _TEXT, min_size=1, max_size=5, unique=True
    ),
    temperature=st.floats(1e-6, 1e6),
    threshold=st.floats(0, 1),
    provenance=st.dictionaries(_TEXT, st.none() | st.integers() | _TEXT, max_size=3),
)  # fmt: skip
def test_any_description_comes_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    classes: list[str],
    temperature: float,
    threshold: float,
    provenance: dict[str, Any],
) -> None:
    folder = str(tmp_path_factory.getbasetemp() / "described")
    spec = spec_of(classes, temperature=temperature, threshold=threshold, provenance=provenance)
    save_bundle(folder, spec, {"weight": torch.zeros(1)})
    assert load_bundle(folder).spec == spec


def test_a_metric_that_is_no_number_comes_back_too(tmp_path: Path) -> None:
    spec = spec_of(["a"], metrics={"f1": math.nan})
    found = save_bundle(str(tmp_path / "b"), spec, {"weight": torch.zeros(1)})
    assert math.isnan(found.spec.metrics["f1"])


def test_the_same_model_has_the_same_name_and_another_another(tmp_path: Path) -> None:
    spec = spec_of(["cat", "dog"])
    state = {key: value.clone() for key, value in network_of(spec).state_dict().items()}

    def name(folder: str, spec: BundleSpec) -> str:
        return save_bundle(str(tmp_path / folder), spec, state).sha256

    first = name("one", spec)
    assert name("two", spec) == first
    assert name("three", spec.model_copy(update={"threshold": 0.5})) != first
    assert name("four", spec.model_copy(update={"classes": ["dog", "cat"]})) != first
    next(iter(state.values())).view(-1)[0] += 1
    assert name("five", spec) != first


def test_weights_may_lie_in_memory_in_any_way(tmp_path: Path) -> None:
    state = {
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "gradient": torch.nn.Parameter(torch.ones(3)),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
    }
    state["shared"] = state["half"]
    found = load_bundle_weights(save_bundle(str(tmp_path / "b"), spec_of(["a"]), state))
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_the_card_describes_the_model() -> None:
    spec = spec_of([f"class {i}" for i in range(25)], metrics={"accuracy": 0.5})
    card = render_minimal_card(spec)
    assert "# small_cnn, 25 classes" in card
    assert "class 19 and 5 more" in card
    assert "| accuracy | 0.5000 |" in card


# ------------------------------------------------------------------ what is refused


@settings(max_examples=200)
@given(data=st.data(), file=st.sampled_from(FILES))
def test_any_changed_byte_is_noticed(
    pristine: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, file: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        shutil.copytree(pristine, folder)
    whole = (folder / file).read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[position]))
    (folder / file).write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
    assert file in refused(folder)
    (folder / file).write_bytes(whole)
    load_bundle(str(folder))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", ["empty", "cut", "longer", "spaced", "windows"])
def test_a_file_of_another_length_is_noticed(bundle: Path, file: str, change: str) -> None:
    path = bundle / file
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[:-1],
            "longer": whole + b"\0",
            "spaced": whole + b"\n",
            "windows": whole.replace(b"\n", b"\r\n") + b"\r\n",
        }[change]
    )
    assert file in refused(bundle)


def test_a_missing_file_or_folder_is_named(bundle: Path) -> None:
    (bundle / "README.md").unlink()
    load_bundle(str(bundle))
    (bundle / "model.safetensors").unlink()
    assert "model.safetensors: no such file" in refused(bundle)
    assert read_description(str(bundle)).spec.classes == ["cat", "dog"]
    (bundle / "bundle.json").unlink()
    message = refused(bundle)
    assert "bundle.json: no such file" in message
    assert "pass a folder written by `imgcls train` or `imgcls model import`" in message
    assert refused(bundle.parent / "none")
    assert issubclass(BundleError, RequestError)


def test_a_description_changed_by_hand_is_refused(bundle: Path) -> None:
    path = bundle / "bundle.json"
    body = json.loads(path.read_bytes())
    path.write_text(json.dumps(body | {"threshold": 0.9}, indent=2) + "\n")
    message = refused(bundle)
    assert "was modified (its digest differs)" in message
    assert "instead of editing it" in message


def redescribed(bundle: Path, **changes: Any) -> None:
    """Rewrite the description with other values and a digest that fits them."""
    body = json.loads((bundle / "bundle.json").read_bytes())
    del body["sha256"]
    body |= changes
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    text = json.dumps(body | {"sha256": digest}, indent=2, ensure_ascii=False) + "\n"
    (bundle / "bundle.json").write_bytes(text.encode())


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_a_bundle_of_another_format_is_refused_by_its_version(bundle: Path, version: Any) -> None:
    redescribed(bundle)
    load_bundle(str(bundle))
    redescribed(bundle, format_version=version)
    message = refused(bundle)
    assert f"has format version {version!r}, this imgcls reads 2 and lower" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["cat", "cat"]},
        {"classes": []},
        {"temperature": 0},
        {"threshold": 1.5},
        {"thresholds": {"no class": 0.5}},
        {"thresholds": {"cat": 1.5}},
        {"thresholds": {"cat": float("nan")}},
        {"vector_scaling": {"scale": [1.0], "bias": [0.0]}},
        {"surprise": 1},
        {"architecture": {"source": "pickle", "name": "x"}},
        {"preprocess": {"resize": 10, "crop": 20}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_description_that_makes_no_sense_is_refused(
    bundle: Path, changes: dict[str, Any]
) -> None:
    redescribed(bundle, **changes)
    assert next(iter(changes)) in refused(bundle)  # the key that is wrong


def test_new_weights_are_never_taken_for_those_of_the_old_description(
    bundle: Path, tmp_path: Path
) -> None:
    spec = spec_of(["cat", "dog"])
    save_bundle(str(tmp_path / "new"), spec, network_of(spec).state_dict())
    shutil.copy(tmp_path / "new" / "model.safetensors", bundle)
    assert "the file is damaged" in refused(bundle)


def test_the_description_is_written_last(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    (folder / "README.md" / "in the way").mkdir(parents=True)
    with pytest.raises(StorageError):
        save_bundle(str(folder), spec_of(["a"]), {"weight": torch.zeros(1)})
    assert (folder / "model.safetensors").exists()
    assert not (folder / "bundle.json").exists()


def test_a_preprocessing_that_cannot_be_is_refused() -> None:
    for wrong in (
        {"resize": 10, "crop": 20},
        {"std": (0.1, 0.0, 0.1)},
        {"interpolation": "nearest"},
    ):
        with pytest.raises(ValidationError):
            Preprocess.model_validate(wrong)


def test_classes_of_a_bundle_differ() -> None:
    with pytest.raises(ValidationError, match="class 'cat' is listed twice"):
        spec_of(["cat", "dog", "cat"])


def test_a_backbone_has_no_classes_and_only_embeddings(tmp_path: Path) -> None:
    spec = spec_of([])
    assert (spec.num_outputs, spec.resolve_thresholds(0.5)) == (1, [])
    network = zoo.build_network(spec.architecture, spec.num_outputs)
    save_bundle(str(tmp_path), spec, network.state_dict())
    with pytest.raises(BundleError, match="has no classes; compute embeddings with `imgcls embed`"):
        load_bundle(str(tmp_path))
    assert load_bundle(str(tmp_path), needs_classes=False).spec == spec
    card = (tmp_path / "README.md").read_text()
    assert "No classes: the network computes embeddings." in card
    assert "imgcls embed --model THIS_FOLDER" in card
    classifier = Classifier.load(str(tmp_path), precision="fp32", device="cpu")
    pixels = np.zeros((40, 40, 3), np.uint8)
    assert classifier.embed(pixels).shape == (1, classifier.embedding_width)
    with pytest.raises(BundleError, match="has no classes"):
        classifier.predict(pixels)


# ------------------------------------------------------------------ what loading brings with it


def test_a_description_is_read_and_verified_without_torch(pristine: Path) -> None:
    script = (
        "import sys\n"
        "from imgcls.models.bundle import load_bundle, read_description\n"
        f"assert read_description({str(pristine)!r}).spec.classes == ['cat', 'dog']\n"
        f"load_bundle({str(pristine)!r})\n"
        "heavy = {'torch', 'torchvision', 'ray', 'pandas', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_each_class_has_the_threshold_that_was_chosen_for_it_or_the_common_one() -> None:
    spec = spec_of(["cat", "dog"], threshold=0.5, thresholds={"dog": 0.9})
    assert spec.resolve_thresholds() == [0.5, 0.9]
    assert spec.resolve_thresholds(0.7) == [0.7, 0.7]
    assert "acceptance threshold per class, 0.5 to 0.9" in render_minimal_card(spec)


def test_a_class_that_is_never_accepted_is_named_on_the_card() -> None:
    spec = spec_of(["cat", "dog"], threshold=0.5, thresholds={"cat": 0.9, "dog": NEVER_ACCEPT})
    assert spec.resolve_thresholds() == [0.9, NEVER_ACCEPT]
    assert (
        "acceptance threshold per class, 0.9 to 0.9; never accepted: dog."
        in render_minimal_card(spec)
    )


def test_the_hopeless_classes_of_older_calibrations_are_never_accepted(tmp_path: Path) -> None:
    thresholds = {"cat": 1.0, "dog": 0.75}
    made_by = {"calibration": {"target_precision": 0.95}}
    network = zoo.build_network(spec_of(["cat", "dog"]).architecture, 2)
    found = {}
    for name, provenance in (("calibrated", made_by), ("by hand", {})):
        spec = spec_of(["cat", "dog"], thresholds=thresholds, provenance=provenance)
        save_bundle(str(tmp_path / name), spec, network.state_dict())
        found[name] = load_bundle(str(tmp_path / name)).spec.resolve_thresholds()
    assert found == {"calibrated": [NEVER_ACCEPT, 0.75], "by hand": [1.0, 0.75]}
