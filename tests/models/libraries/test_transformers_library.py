"""Networks of transformers: the logits of its own classes, from any of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, save_bundle
from imgcls.models.classifier import Classifier
from imgcls.training import network as networks
from imgcls.training.config import ModelConfig

transformers = pytest.importorskip("transformers")

SMALL_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": SMALL_VIT,
    "dinov2": {**SMALL_VIT, "mlp_ratio": 2},
    "dinov2_with_registers": {**SMALL_VIT, "mlp_ratio": 2},
    "dinov3_vit": {**SMALL_VIT, "num_register_tokens": 4},
    "dinov3_convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 32},
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "clip": {"vision_config": SMALL_VIT, "text_config": TEXT},
    "siglip": {"vision_config": SMALL_VIT, "text_config": TEXT},
    "swin": {
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "image_size": 32,
        "window_size": 4,
    },
}
PROCESSORS = {
    "vit": "ViTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov3_vit": "DINOv3ViTImageProcessor",
    "convnext": "ConvNextImageProcessor",
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
}
PROCESSOR_SETTINGS: dict[str, dict[str, Any]] = {"convnext": {"size": {"shortest_edge": 224}}}
"""What the authors' checkpoints are published with."""


def save(folder: Path, kind: str) -> Any:
    """An encoder without a head, as transformers saves it; returns the network."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    encoder = transformers.AutoModel.from_config(config)
    encoder.save_pretrained(folder)
    processor = getattr(transformers, PROCESSORS.get(kind, "ViTImageProcessor"))
    processor(**PROCESSOR_SETTINGS.get(kind, {})).save_pretrained(folder)
    return encoder


def build(folder: Path, classes: int, **settings: Any) -> tuple[Any, torch.nn.Module, Any]:
    """Architecture, network and preprocessing of a training from a folder's weights."""
    asked = ModelConfig(name=str(folder), weights="pretrained", **settings)
    resolved = networks.resolve_model_snapshot(asked)
    architecture, preprocess = networks.resolve_model(resolved)
    network = networks.build_initial_network(architecture, resolved.weights, classes, seed=0)
    return architecture, network.eval(), preprocess


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_encoder_gets_a_head_and_the_logits_of_transformers(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = save(tmp_path / "weights", kind).eval()
    architecture, network, _ = build(tmp_path / "weights", 3)
    assert "the weights have no head" in capsys.readouterr().out
    assert (architecture.source, architecture.name) == ("transformers", kind)
    _, head = zoo.find_head(network)
    assert isinstance(head, torch.nn.Linear)
    assert head.out_features == 3

    images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = network(images)
        if transformers.AutoConfig.for_model(kind).__class__ in (
            transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        ):
            own = transformers.AutoModelForImageClassification.from_pretrained(
                tmp_path / "weights", num_labels=3
            ).eval()
            own.classifier.load_state_dict(head.state_dict())
            expected = own(pixel_values=images).logits
        else:
            expected = head(encoder(pixel_values=images).pooler_output.flatten(1))
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-5)

    # the bundle builds the network from its own description, without the folder
    spec = BundleSpec(
        architecture=architecture,
        classes=["a", "b", "c"],
        preprocess=zoo.get_default_preprocess(
            architecture, f"{tmp_path}/weights/model.safetensors"
        ).model_copy(update={"crop": 32, "resize": 32}),
    )
    save_bundle(str(tmp_path / "bundle"), spec, network.state_dict())
    (tmp_path / "weights" / "config.json").unlink()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    scores = Classifier.load(str(tmp_path / "bundle"), precision="fp32", device="cpu").classify(
        pixels, embeddings=True
    )
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (spec.preprocess.mean, spec.preprocess.std)
    )
    with torch.inference_mode():
        logits = network((torch.from_numpy(pixels) / 255 - mean) / std)
    assert scores.scores == pytest.approx(logits.softmax(1).numpy(), abs=1e-5)
    rounded = Classifier.load(str(tmp_path / "bundle"), precision="bf16", device="cpu")
    assert rounded.classify(pixels).scores == pytest.approx(scores.scores, abs=0.03)
    assert scores.embedding is not None
    assert scores.embedding.shape == (2, head.in_features)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # resize, crop, mode, interpolation, first mean: of the published checkpoints
        ("vit", (224, 224, "squash", "bilinear", 0.5)),
        ("convnext", (256, 224, "crop", "bicubic", 0.5)),
        ("clip", (224, 224, "crop", "bicubic", 0.48145466)),
        ("siglip", (224, 224, "squash", "bicubic", 0.5)),
        ("dinov3_vit", (224, 224, "squash", "bilinear", 0.485)),
    ],
)
def test_the_preprocessing_is_that_of_the_folder(
    kind: str, expected: tuple[Any, ...], tmp_path: Path
) -> None:
    save(tmp_path, kind)
    architecture, _, _ = build(tmp_path, 3)
    found = zoo.get_default_preprocess(architecture, f"{tmp_path}/model.safetensors")
    assert (
        found.resize,
        found.crop,
        found.mode,
        found.interpolation,
        pytest.approx(found.mean[0]),
    ) == expected


def test_an_input_of_another_size_interpolates_the_position_embeddings(tmp_path: Path) -> None:
    save(tmp_path, "vit")
    _, network, preprocess = build(tmp_path, 3, image_size=48)
    assert preprocess.crop == 48
    images = torch.randn((2, 3, 48, 48), generator=torch.Generator().manual_seed(0))
    own = transformers.ViTForImageClassification.from_pretrained(tmp_path, num_labels=3).eval()
    own.classifier.load_state_dict(zoo.find_head(network)[1].state_dict())
    with torch.inference_mode():
        expected = own(pixel_values=images, interpolate_pos_encoding=True).logits
        assert network(images).numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_classifier_keeps_its_head_and_one_of_other_classes_gets_a_new_one(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("vit", **SMALL_VIT, num_labels=3)
    own = transformers.ViTForImageClassification(config).eval()
    own.save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    _, network, _ = build(tmp_path, 3)
    with torch.inference_mode():
        expected = own(pixel_values=images).logits
        assert network(images).numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    _, network, _ = build(tmp_path, 5)
    assert network(images).shape == (2, 5)


def test_weights_that_lack_a_layer_and_networks_of_other_inputs_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, "dinov2")
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layer.1.mlp.fc1.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BundleError, match=r"encoder.layer.1.mlp.fc1.weight: is missing in the"):
        build(tmp_path, 3)
    with pytest.raises(BundleError, match="has no such model type"):
        zoo.resolve_architecture("transformers:dinov99")
    siglip2 = zoo.resolve_architecture("transformers:siglip2", {})
    with pytest.raises(BundleError, match="does not take a batch of images"), torch.device("meta"):
        zoo.build_network(siglip2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, r"its preprocessing .* is not supported"),
        ({"size": {"shortest_edge": 224}}, r"its preprocessing .* is not supported"),
        ({"rescale_factor": 1.0}, r"rescale factor 1.0, filter 2\) is not supported"),
        ({"resample": 1}, r"filter 1\) is not supported"),
        # flips the channels, normalizes twice, resizes to another size than it names
        ({"image_processor_type": "MobileViTImageProcessor"}, "of MobileViTImageProcessor is not"),
        ({"image_processor_type": "EfficientNetImageProcessor"}, "of EfficientNetImage.* is not"),
        ({"image_processor_type": "LevitImageProcessor"}, "of LevitImageProcessor is not"),
        ({"image_processor_type": "NoSuchProcessor"}, "is no image processor of transformers"),
    ],
)
def test_preprocessing_that_cannot_be_expressed_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(tmp_path, "vit")
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        build(tmp_path, 3)
    path.unlink()
    with pytest.raises(BundleError, match=r"preprocessor_config.json.*the preprocessing of the"):
        build(tmp_path, 3)


def test_a_type_alone_has_random_weights_and_the_preprocessing_of_its_type() -> None:
    architecture = zoo.resolve_architecture("transformers:vit", SMALL_VIT)
    network = zoo.build_network(architecture, 4).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    preprocess = zoo.get_default_preprocess(architecture)
    assert (preprocess.crop, preprocess.resize, preprocess.mode) == (32, 32, "squash")
    wrong = zoo.resolve_architecture("transformers:vit", {**SMALL_VIT, "hidden_size": "wide"})
    with pytest.raises(BundleError, match=r"hidden_size.*check model.options"):
        zoo.build_network(wrong, 4)


def test_a_configuration_loads_no_code_of_a_repository(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    code = {
        "auto_map": {"AutoModelForImageClassification": "someone/repository--code.Model"},
        "attn_implementation": "someone/kernels",
        "_attn_implementation": "someone/kernels",
    }
    config |= code
    config["vision_config"] |= code
    path.write_text(json.dumps(config))
    architecture, network, _ = build(tmp_path, 3)
    assert "someone" not in json.dumps(architecture.options)
    # nor do the options of a bundle
    named = architecture.model_copy(update={"options": {**architecture.options, **code}})
    assert type(zoo.build_network(named, 3)) is type(network)
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
