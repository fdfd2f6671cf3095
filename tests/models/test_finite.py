"""Weights with NaN or infinity are refused by name, and a network's NaN is never a prediction."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from imgcls.data.decoding.decode import preprocess_pil_image
from imgcls.errors import BundleError, NotFinite
from imgcls.evaluation.config import QuantizeConfig
from imgcls.evaluation.quantize import quantize_bundle
from imgcls.models import zoo
from imgcls.models.bundle import (
    BundleSpec,
    Int8Calibration,
    VectorScaling,
    load_bundle,
    load_bundle_weights,
    read_description,
    save_bundle,
)
from imgcls.models.classifier import Classifier
from imgcls.models.config import ExportConfig, ImportConfig
from imgcls.models.export import export_bundle
from imgcls.models.finite import check_finite_safetensors, check_finite_tensors
from imgcls.models.import_weights import import_model
from tests.conftest import COLORS, draw, write_manifest

BAD = [float("nan"), float("inf"), float("-inf")]
ARCHITECTURE = zoo.resolve_architecture("small_cnn", {"width": 4})
SPEC = BundleSpec(
    architecture=ARCHITECTURE,
    classes=list(COLORS),
    preprocess=zoo.get_default_preprocess(ARCHITECTURE),
)


def state_with(name: str, value: float) -> dict[str, torch.Tensor]:
    """The weights of a small CNN, one value of a tensor replaced."""
    torch.manual_seed(0)
    state = zoo.build_network(ARCHITECTURE, len(COLORS)).state_dict()
    state[name].view(-1)[1] = value
    return state


def last_of(kind: str) -> str:
    return [name for name in state_with("head.4.bias", 0.0) if name.endswith(kind)][-1]


def rewritten(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """A bundle whose weights are replaced and whose digests fit them: as another tool writes it."""
    save_bundle(str(folder), SPEC, state_with("head.4.bias", 0.0))
    data = save(state)
    (folder / "model.safetensors").write_bytes(data)
    body = json.loads((folder / "bundle.json").read_text())
    del body["sha256"]
    body["weights_sha256"] = hashlib.sha256(data).hexdigest()
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", BAD)
def test_a_tensor_of_any_floating_dtype_is_checked(dtype: torch.dtype, value: float) -> None:
    largest = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    sound = {"a": largest, "b": -largest, "count": torch.tensor(2**40), "none": torch.zeros(0)}
    sound["tiny"] = torch.full((2,), torch.finfo(dtype).tiny, dtype=dtype)
    check_finite_tensors(sound, "here")
    check_finite_safetensors(save(sound), "here")
    broken = sound | {"b": largest.clone(), "c": largest.clone()}
    broken["b"][1, 2] = broken["b"][2, 3] = broken["c"][0, 0] = value
    message = (
        r"^here: 2 of 12 values of the tensor 'b' are NaN or infinite, and in 1 more of 6 tensors"
    )
    with pytest.raises(BundleError, match=message):
        check_finite_tensors(broken, "here")
    with pytest.raises(BundleError, match=message):
        check_finite_safetensors(save(broken), "here")


def test_a_tensor_of_eight_bit_floats_is_checked() -> None:
    sound = torch.ones(4).to(torch.float8_e5m2)
    check_finite_tensors({"a": sound}, "here")
    broken = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    with pytest.raises(BundleError, match=r"here: 1 of 2 values of the tensor 'b' are NaN"):
        check_finite_tensors({"a": sound, "b": broken}, "here")


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", ["bias", "running_mean", "running_var"])
def test_such_weights_become_no_bundle_and_are_loaded_from_none(
    tmp_path: Path, kind: str, value: float
) -> None:
    name = last_of(kind)
    state = state_with(name, value)
    with pytest.raises(BundleError, match=f"1 of \\d+ values of the tensor '{name}'"):
        save_bundle(str(tmp_path / "new"), SPEC, state)
    assert not (tmp_path / "new").exists()
    url = str(rewritten(tmp_path / "old", state))
    bundle = read_description(url)
    for load in (load_bundle, Classifier.load):
        with pytest.raises(BundleError, match=f"bundle .*old: model.safetensors: .* '{name}'"):
            load(url)
    with pytest.raises(BundleError, match=name):
        load_bundle_weights(bundle)


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_such_weights_are_not_imported_nor_trained_from(tmp_path: Path, file: str) -> None:
    name = last_of("weight")
    place = tmp_path / file
    state = state_with(name, float("nan"))
    torch.save(state, place) if file.endswith("pth") else save_file(state, place)
    (tmp_path / "classes.txt").write_text("\n".join(COLORS))
    with pytest.raises(BundleError, match=f"model.weights .*{file}: .* '{name}'"):
        zoo.load_weights(str(place), ARCHITECTURE)
    config = ImportConfig(
        arch="small_cnn",
        options={"width": 4},
        weights=str(place),
        classes=str(tmp_path / "classes.txt"),
        output=str(tmp_path / "bundle"),
    )
    with pytest.raises(BundleError, match=name):
        import_model(config)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "changes",
    [
        lambda x: {"temperature": x},
        lambda x: {"vector_scaling": VectorScaling(scale=[1.0, x, 1.0], bias=[0.0] * 3)},
        lambda x: {"vector_scaling": VectorScaling(scale=[1.0] * 3, bias=[x, 0.0, 0.0])},
        lambda x: {
            "int8": Int8Calibration(
                ranges={"conv": {"input": (0.0, x)}},
                calibration_images=1,
                judged_images=1,
                agreement=1.0,
            )
        },
        lambda x: {"preprocess": {"mean": (x, 0.5, 0.5)}},
        lambda x: {"preprocess": {"std": (0.5, x, 0.5)}},
    ],
    ids=["temperature", "scale", "bias", "int8", "mean", "std"],
)
def test_a_description_holds_finite_numbers(changes: Any, value: float) -> None:
    with pytest.raises(ValueError, match=r"finite|greater than 0"):
        BundleSpec.model_validate(SPEC.model_dump() | changes(value))


def test_saved_weights_are_what_was_given(tmp_path: Path) -> None:
    state = state_with("head.4.bias", torch.finfo(torch.float32).max)
    save_bundle(str(tmp_path), SPEC, state)
    assert load_file(tmp_path / "model.safetensors")["head.4.bias"][1] == state["head.4.bias"][1]


# ------------------------------------------------------------------ what the network gives


def test_an_image_that_the_network_overflows_for_is_no_prediction(
    overflowing_bundle: Path, tmp_path: Path
) -> None:
    classifier = Classifier.load(str(overflowing_bundle), precision="fp32", device="cpu")
    white = Image.new("RGB", (64, 48), "white")
    white.save(tmp_path / "white.png")
    pair = [preprocess_pil_image(image, classifier.preprocess) for image in (draw("red"), white)]
    scored = classifier.classify(np.stack(pair))
    assert scored.is_finite.tolist() == [True, False]
    assert scored.scores[0].sum() == pytest.approx(1.0)
    assert np.isnan(scored.scores[1]).all()
    with pytest.raises(
        NotFinite, match=r"white\.png: the network of .* NaN or infinity .* in fp32"
    ):
        classifier.predict([draw("red"), str(tmp_path / "white.png")])
    assert len(classifier.predict([draw("red"), draw("blue")])) == 2


def test_a_logit_of_minus_infinity_is_no_score_of_zero(
    overflowing_bundle: Path, tmp_path: Path
) -> None:
    state = load_bundle_weights(load_bundle(str(overflowing_bundle)))
    state["head.4.weight"] = -state["head.4.weight"]
    save_bundle(str(tmp_path), read_description(str(overflowing_bundle)).spec, state)
    classifier = Classifier.load(str(tmp_path), precision="fp32", device="cpu")
    white = preprocess_pil_image(Image.new("RGB", (64, 48), "white"), classifier.preprocess)
    assert not classifier.classify(white[None]).is_finite.any()


def test_a_network_that_overflows_is_neither_quantized_nor_exported(
    overflowing_bundle: Path, tmp_path: Path
) -> None:
    for seed in range(40):
        draw("red", seed=seed).save(tmp_path / f"{seed}.png")
    Image.new("RGB", (64, 48), "white").save(tmp_path / "1.png")
    rows = [(f"{seed}.png",) for seed in range(40)]
    manifest = str(write_manifest(tmp_path / "m.csv", rows, ("path",)))
    config = {"model": str(overflowing_bundle), "output": str(tmp_path / "out")}
    with pytest.raises(BundleError, match="outputs NaN or infinity for 1 of 20 images in fp32"):
        quantize_bundle(QuantizeConfig.model_validate(config | {"manifest": manifest}))
    with pytest.raises(BundleError, match="outputs NaN or infinity for 1 of 40 images in fp32"):
        export_bundle(
            ExportConfig.model_validate(config | {"images": manifest, "formats": "program"})
        )
    assert not (tmp_path / "out").exists()
