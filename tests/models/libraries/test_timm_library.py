"""timm's networks: the same scores as timm gives, the preprocessing of its own configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, save_bundle
from imgcls.models.classifier import Classifier

timm = pytest.importorskip("timm")

NETWORKS = ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv4_conv_small"]


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_and_embeddings_are_timms(name: str, tmp_path: Path) -> None:
    architecture = zoo.resolve_architecture(f"timm:{name}")
    torch.manual_seed(0)
    network = zoo.build_network(architecture, 7).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    preprocess = zoo.get_default_preprocess(architecture)
    spec = BundleSpec(architecture=architecture, classes=list("abcdefg"), preprocess=preprocess)
    save_bundle(str(tmp_path), spec, network.state_dict())
    crop = preprocess.crop
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, crop, crop), dtype=np.uint8)
    found = Classifier.load(str(tmp_path), precision="fp32", device="cpu").classify(
        pixels, embeddings=True
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    with torch.inference_mode():
        inputs = (torch.from_numpy(pixels) / 255 - mean) / std
        expected = network(inputs).softmax(dim=1)
        embedding = network.forward_head(network.forward_features(inputs), pre_logits=True)  # type: ignore[operator]
    assert found.scores == pytest.approx(expected.numpy(), abs=1e-5)
    assert found.embedding == pytest.approx(embedding.numpy(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", [*NETWORKS, "xception41", "beit_base_patch16_224"])
def test_the_preprocessing_is_that_of_timms_own_transform(name: str) -> None:
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    resize, crop = create_transform(**config).transforms[:2]
    preprocess = zoo.get_default_preprocess(zoo.resolve_architecture(f"timm:{name}"))
    assert (preprocess.resize, preprocess.crop) == (
        resize.size if isinstance(resize.size, int) else resize.size[0],
        crop.size[0],
    )
    assert resize.interpolation.value == preprocess.interpolation
    assert preprocess.mean == pytest.approx(config["mean"])


def test_preprocessing_that_cannot_be_expressed_is_refused() -> None:
    name = "timm:vit_medium_patch16_gap_384"
    with pytest.raises(
        BundleError, match="padded or stretched to 404 pixels and then cropped to 384"
    ):
        zoo.get_default_preprocess(zoo.resolve_architecture(name))


def test_a_name_that_timm_has_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(BundleError, match=r"did you mean .*timm:resnet18"):
        zoo.resolve_architecture("timm:resnet_18")
    with pytest.raises(BundleError, match=r"timm:convnext_tiny|no such architecture"):
        zoo.resolve_architecture("convnext_tinyy")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    architecture = zoo.resolve_architecture("timm:resnet18")
    network = zoo.build_network(architecture, 5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    state = zoo.load_weights(str(tmp_path / "weights.pth"), architecture)
    assert zoo.apply_weights(zoo.build_network(architecture, 3), state, replace_head=True) == [
        "fc.weight",
        "fc.bias",
    ]
    with pytest.raises(BundleError, match="pass a file, or one of pretrained"):
        zoo.load_weights(str(tmp_path / "none.pth"), architecture)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", 96),
        ("swin_tiny_patch4_window7_224.ms_in1k", 112),
        ("eva02_tiny_patch14_224.mim_in22k", 98),
    ],
)
def test_the_image_size_alone_sets_what_a_network_needs(name: str, size: int) -> None:
    architecture = zoo.resolve_architecture(f"timm:{name}")
    sized = zoo.set_image_size(architecture, size)
    assert sized.options == {"img_size": size}
    default = zoo.get_default_preprocess(architecture).crop
    assert zoo.set_image_size(architecture, default) == architecture
    torch.manual_seed(0)
    state = timm.create_model(name.partition(".")[0], num_classes=0).state_dict()
    network = zoo.build_network(sized, 3)
    zoo.apply_weights(network, state, replace_head=True)
    # what timm itself makes of the same weights at this size
    theirs = timm.create_model(name.partition(".")[0], num_classes=0, img_size=size)
    convert = sys.modules[type(theirs).__module__].checkpoint_filter_fn  # type: ignore[attr-defined]
    theirs.load_state_dict(convert(dict(state), theirs), strict=False)
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = theirs.eval()(images)
        found = network.eval().forward_head(network.forward_features(images), pre_logits=True)  # type: ignore[operator]
    assert torch.equal(found, expected)


def test_weights_of_another_patch_size_are_refused_and_not_resampled() -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    network = zoo.build_network(
        zoo.resolve_architecture("timm:vit_tiny_patch16_224", {"patch_size": 32}), 3
    )
    with pytest.raises(BundleError, match=r"patch_embed.proj.weight: shape \(192, 3, 16, 16\) in"):
        zoo.apply_weights(network, state, replace_head=True)


def test_networks_without_a_fixed_size_need_no_option() -> None:
    for name in ("timm:resnet18", "timm:convnext_atto"):
        architecture = zoo.resolve_architecture(name)
        assert zoo.set_image_size(architecture, 96) == architecture
