"""Zero-shot bundles: the scores of open_clip's own code, without its text tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imgcls.errors import BundleError, OutputError
from imgcls.models import zoo
from imgcls.models.bundle import load_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.config import ZeroShotConfig
from imgcls.models.libraries.open_clip_library import _check_activation
from imgcls.models.linear_head import load_linear_head
from imgcls.models.zero_shot import make_zero_shot
from imgcls.training import network as networks
from imgcls.training.config import ModelConfig
from tests.processes import imgcls

open_clip = pytest.importorskip("open_clip")

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
CLASSES = ["cat", "dog", "grand piano"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of two small models, which open_clip knows by name from now on."""
    path = tmp_path_factory.mktemp("configs")
    (path / "test-clip.json").write_text(json.dumps(CONFIG))
    (path / "test-bias.json").write_text(
        json.dumps({**CONFIG, "init_logit_bias": -10, "custom_text": True})
    )
    open_clip.add_model_config(path)
    return path


def save_weights(folder: Path, name: str) -> tuple[Any, Path]:
    """Random weights of both towers, far enough apart for a clear order of the classes."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.logit_scale.fill_(3.0)
    path = folder / f"{name}.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def compute_expected(
    model: Any, name: str, pixels: torch.Tensor, classes: list[str], templates: list[str]
) -> torch.Tensor:
    """open_clip's scores, by the code of its README."""
    tokenize = open_clip.get_tokenizer(name)
    with torch.no_grad():
        vectors = []
        for each in classes:
            text = model.encode_text(tokenize([t.format(each) for t in templates]))
            text = (text / text.norm(dim=-1, keepdim=True)).mean(0)
            vectors.append(text / text.norm())
        image = model.encode_image(pixels)
        image = image / image.norm(dim=-1, keepdim=True)
        logits = model.logit_scale.exp() * image @ torch.stack(vectors).T
        if getattr(model, "logit_bias", None) is not None:
            logits = logits + model.logit_bias
        return logits.softmax(dim=-1)


@pytest.mark.parametrize("name", ["test-clip", "test-bias"])
@pytest.mark.parametrize("templates", ["imagenet", "mine"])
def test_scores_are_those_of_open_clip(
    name: str, templates: str, folder: Path, tmp_path: Path
) -> None:
    model, weights = save_weights(tmp_path, name)
    texts = ["a photo of a {}.", "{} in a drawing"]
    if templates == "mine":
        templates = str(tmp_path / "templates.txt")
        Path(templates).write_text("\n".join(texts) + "\n\n")
    else:
        texts = [each("{}") for each in open_clip.OPENAI_IMAGENET_TEMPLATES]
    make_zero_shot(
        ZeroShotConfig(
            arch=f"open_clip:{name}",
            weights=str(weights),
            classes=CLASSES,
            templates=templates,
            output=str(tmp_path / "bundle"),
        )
    )
    classifier = Classifier.load(str(tmp_path / "bundle"), precision="fp32", device="cpu")
    assert classifier.classes == CLASSES
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    found = classifier.classify(pixels, embeddings=True)
    preprocess = classifier.preprocess
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    inputs = (torch.from_numpy(pixels) / 255 - mean) / std
    expected = compute_expected(model, name, inputs, CLASSES, texts)
    assert found.scores == pytest.approx(expected.numpy(), abs=1e-4)
    assert expected.std() > 0.01, "scores that do not differ compare nothing"
    # the embedding is the normalized one, as open_clip's `encode_image(normalize=True)`
    assert found.embedding is not None
    with torch.no_grad():
        own = model.encode_image(inputs, normalize=True)
    assert found.embedding == pytest.approx(own.numpy(), abs=1e-5)
    rounded = Classifier.load(str(tmp_path / "bundle"), precision="bf16", device="cpu")
    assert rounded.classify(pixels).scores == pytest.approx(expected.numpy(), abs=0.1)
    # a run of this bundle can be labeled again from its embeddings
    assert load_linear_head(load_bundle(str(tmp_path / "bundle"))).weight.shape == (3, 16)


def convert_to_transformers(state: dict[str, torch.Tensor]) -> Any:
    """transformers' model of `CONFIG` with weights of open_clip."""
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2}
    tower |= {"num_hidden_layers": 1, "hidden_act": "gelu"}
    config = transformers.CLIPConfig(
        text_config={**tower, "eos_token_id": 49407},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    names = {
        "logit_scale": "logit_scale",
        "text_projection": "text_projection.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.": "text_model.final_layer_norm.",
        "visual.proj": "visual_projection.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.": "vision_model.embeddings.patch_embedding.",
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        "transformer.resblocks.": "text_model.encoder.layers.",
    }
    parts = {"ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "mlp.c_fc.": "mlp.fc1."}
    parts |= {"mlp.c_proj.": "mlp.fc2.", "attn.out_proj.": "self_attn.out_proj."}
    converted = {}
    for key, value in state.items():
        if key == "attn_mask":
            continue
        start = max((each for each in names if key.startswith(each)), key=len)
        name = names[start] + key.removeprefix(start)
        for old, new in parts.items():
            name = name.replace(old, new)
        if ".attn.in_proj_" in name:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                own = name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")
                converted[own] = third
        else:
            converted[name] = value.T if key in ("text_projection", "visual.proj") else value
    model = transformers.CLIPModel(config)
    model.load_state_dict(converted)
    return model.eval()


def test_scores_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    model, weights = save_weights(tmp_path, "test-clip")
    (tmp_path / "templates.txt").write_text("a photo of a {}.")
    make_zero_shot(
        ZeroShotConfig(
            arch="open_clip:test-clip",
            weights=str(weights),
            classes=CLASSES,
            templates=str(tmp_path / "templates.txt"),
            output=str(tmp_path / "bundle"),
        )
    )
    classifier = Classifier.load(str(tmp_path / "bundle"), precision="fp32", device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    preprocess = classifier.preprocess
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    tokens = open_clip.get_tokenizer("test-clip")([f"a photo of a {each}." for each in CLASSES])
    with torch.no_grad():
        expected = convert_to_transformers(model.state_dict())(
            input_ids=tokens, pixel_values=(torch.from_numpy(pixels) / 255 - mean) / std
        ).logits_per_image.softmax(dim=-1)
    assert expected.std() > 0.01, "scores that do not differ compare nothing"
    assert classifier.classify(pixels).scores == pytest.approx(expected.numpy(), abs=1e-4)


def test_a_bundle_is_where_a_training_begins(folder: Path, tmp_path: Path) -> None:
    _, weights = save_weights(tmp_path, "test-clip")
    request = ZeroShotConfig(
        arch="open_clip:test-clip",
        weights=str(weights),
        classes=CLASSES,
        output=str(tmp_path / "bundle"),
    )
    make_zero_shot(request)
    asked = ModelConfig(name=str(tmp_path / "bundle"), weights="pretrained")
    resolved = networks.resolve_model_snapshot(asked)
    assert resolved.name == "open_clip:test-clip"
    architecture, preprocess = networks.resolve_model(resolved)
    assert preprocess.mean == load_bundle(str(tmp_path / "bundle")).spec.preprocess.mean
    network = networks.build_initial_network(architecture, resolved.weights, 2, seed=0)
    original = load_bundle(str(tmp_path / "bundle"))
    assert networks.compute_head_coefficients(network, preprocess) == pytest.approx((1.0,))
    for key, value in zoo.load_weights(str(resolved.weights), architecture).items():
        if not key.startswith("head."):
            assert torch.equal(network.state_dict()[key], value), key
    # an input of another size interpolates the position embeddings
    sized = networks.resolve_model_snapshot(asked.model_copy(update={"image_size": 64}))
    architecture, preprocess = networks.resolve_model(sized.model_copy(update={"image_size": 64}))
    network = networks.build_initial_network(architecture, resolved.weights, 2, seed=0).eval()
    assert preprocess.crop == 64
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    with pytest.raises(OutputError, match="already has a bundle"):
        make_zero_shot(request)
    assert load_bundle(str(tmp_path / "bundle")).sha256 == original.sha256
    # so is a file of both towers
    found = zoo.match_weights(network, zoo.load_weights(str(weights), architecture))
    assert found.describe_changes() == [
        "18 other tensors are ignored (ln_final.bias, ln_final.weight, logit_scale, ...)",
        "interpolated to the input size of the network: visual.positional_embedding",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "resnet18"}, "has no text tower; pass a model of open_clip"),
        ({"arch": "open_clip:ViT-B-33"}, "did you mean open_clip:ViT-B-32"),
        ({"classes": ["cat", "cat"]}, "'cat' is also on line 1"),
        ({"classes": ["no.txt"]}, "classes: .*no.txt"),
        ({"templates": "no.txt"}, "templates: .*no.txt"),
        ({"templates": "wrong"}, "has no {} for the class name, or another brace"),
        ({"templates": "brace"}, "has no {} for the class name, or another brace"),
        ({"weights": "vision"}, r"weights could not be loaded .*; pass a file with the state dict"),
        ({"weights": "no.pth"}, r"model.weights: .*no.pth"),
    ],
)
def test_a_wrong_request_makes_no_bundle(
    change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    model, weights = save_weights(tmp_path, "test-clip")
    texts = {"wrong": "a photo of a {0}\n", "brace": "a photo of a {}, :}\n"}
    if change.get("templates") in texts:
        (tmp_path / "wrong.txt").write_text(texts[change["templates"]])
        change = {"templates": str(tmp_path / "wrong.txt")}
    if change.get("weights") == "vision":
        change = {"weights": str(tmp_path / "vision.safetensors")}
        vision = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
        save_file(vision, change["weights"])
    settings: dict[str, Any] = {
        "arch": "open_clip:test-clip",
        "weights": str(weights),
        "classes": CLASSES,
        "output": str(tmp_path / "bundle"),
        **change,
    }
    with pytest.raises(BundleError, match=message):
        make_zero_shot(ZeroShotConfig(**settings))
    assert not (tmp_path / "bundle").exists()


def test_the_command_takes_names_and_the_bundle_needs_no_text_tower(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "ViT-S-32-alt"  # the smallest that open_clip has
    torch.manual_seed(0)
    save_file(open_clip.create_model(name).state_dict(), tmp_path / "clip.safetensors")
    done = imgcls(
        *("model", "zero-shot", "--arch", f"open_clip:{name}"),
        *("--weights", tmp_path / "clip.safetensors", "--classes", "cat,dog,grand piano"),
        *("--output", tmp_path / "bundle"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"bundle  {tmp_path}/bundle  (open_clip:{name}, 3 classes, 80 texts per class)"
    )
    assert "random" not in done.stdout + done.stderr, "open_clip's own warnings are not shown"
    # neither a text tower nor a tokenizer can be built from here on
    monkeypatch.setattr(open_clip, "create_model", None)
    monkeypatch.setattr(open_clip, "get_tokenizer", None)
    classifier = Classifier.load(str(tmp_path / "bundle"), precision="fp32", device="cpu")
    found = classifier.predict(np.zeros((224, 224, 3), np.uint8))[0]
    assert sorted(found.topk_labels) == sorted(CLASSES)
    keys = load_bundle(str(tmp_path / "bundle")).spec.provenance["zero_shot"]
    assert len(keys["templates"]) == 80


def test_weights_of_another_activation_are_refused_before_they_are_downloaded() -> None:
    with pytest.raises(BundleError, match=r"QuickGELU.*; pass open_clip:ViT-B-32-quickgelu"):
        zoo.load_weights("openai", zoo.resolve_architecture("open_clip:ViT-B-32"))
    _check_activation("ViT-B-32-quickgelu", "openai")
    _check_activation("ViT-B-32", "laion2b_s34b_b79k")


def test_only_the_input_size_of_a_tower_can_be_set(folder: Path) -> None:
    architecture = zoo.resolve_architecture(
        "open_clip:test-clip", {"timm_model_name": "hf-hub:a/b"}
    )
    with pytest.raises(BundleError, match="has no option 'timm_model_name'"):
        zoo.build_network(architecture, 2)
