"""Networks of timm with several heads: all of them are found, replaced, run and exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, save_bundle
from imgcls.models.classifier import Classifier

timm = pytest.importorskip("timm")

FAMILIES = {
    "deit_tiny_distilled_patch16_224": {"head", "head_dist"},
    "levit_128s": {"head.linear", "head_dist.linear"},
    "pit_ti_distilled_224": {"head", "head_dist"},
    "efficientformer_l1": {"head", "head_dist"},
    "efficientformerv2_s0": {"head", "head_dist"},
    "repvit_m0_9": {"head.head.l", "head.head_dist.l"},
    "swiftformer_xs": {"head", "head_dist"},
    "crossvit_tiny_240": {"head.0", "head.1"},
    "efficientvim_m1": {"heads.0", "heads.1", "heads.2", "heads.3"},
    "volo_d1_224": {"head"},
}
"""The smallest of each family of timm 1.0.31, and the layers that are added up to its logits."""
NAMES = ["a", "b", "c"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_head_is_found_and_its_weights_of_other_classes_are_replaced(name: str) -> None:
    architecture = zoo.resolve_architecture(f"timm:{name}")
    with torch.device("meta"):
        network = zoo.build_network(architecture, len(NAMES))
        other = zoo.build_network(architecture, 10).state_dict()
    assert set(zoo.find_heads(network)) == FAMILIES[name]
    assert list(zoo.find_heads(network))[-1] == zoo.find_head(network)[0]
    own = network.state_dict()
    differ = {key.rpartition(".")[0] for key in own if own[key].shape != other[key].shape}
    assert zoo.list_head_names(network) == differ, "what another number of classes changes"
    kept = zoo.apply_weights(network, other, replace_head=True)
    assert {key.rpartition(".")[0] for key in kept} == differ
    with pytest.raises(BundleError, match=f"do not match the network in {len(kept)} keys"):
        zoo.apply_weights(network, other, replace_head=False)


def test_a_hidden_layer_as_wide_as_the_classes_is_no_head() -> None:
    architecture = zoo.resolve_architecture("timm:convnext_atto", {"head_hidden_size": 10})
    with torch.device("meta"):
        network = zoo.build_network(architecture, 10)
    assert network.get_submodule("head.pre_logits.fc").out_features == 10
    assert set(zoo.find_heads(network)) == {"head.fc"}


def test_an_encoder_without_a_classifier_is_refused_by_name() -> None:
    architecture = zoo.resolve_architecture("timm:mobilenetv5_300m_enc")
    message = "timm:mobilenetv5_300m_enc: is an encoder without a classifier"
    with torch.device("meta"), pytest.raises(BundleError, match=message):
        zoo.build_network(architecture, 3)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("deit_tiny_distilled_patch16_224", "fp32"),
        ("levit_128s", "bf16"),
        ("repvit_m0_9", "fp32"),
    ],
)
def test_any_number_of_images_has_the_scores_of_timm(
    name: str, precision: str, tmp_path: Path
) -> None:
    assert_as_timm(name, precision, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_number_of_images_of_every_family_has_the_scores_of_timm(
    name: str, precision: str, tmp_path: Path
) -> None:
    assert_as_timm(name, precision, tmp_path)


def assert_as_timm(name: str, precision: str, folder: Path) -> None:
    architecture = zoo.resolve_architecture(f"timm:{name}")
    torch.manual_seed(0)
    network = zoo.build_network(architecture, len(NAMES)).eval()
    preprocess = zoo.get_default_preprocess(architecture)
    with torch.no_grad():
        for layer in zoo.list_head_names(network):  # some begin at zero
            torch.nn.init.normal_(network.get_submodule(layer).weight, std=0.05)
    spec = BundleSpec(architecture=architecture, classes=NAMES, preprocess=preprocess)
    save_bundle(str(folder), spec, network.state_dict())
    classifier = Classifier.load(str(folder), precision=precision, device="cpu")
    shape = (5, 3, preprocess.crop, preprocess.crop)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    with torch.inference_mode():
        timms = timm.create_model(name, num_classes=len(NAMES)).eval()
        timms.load_state_dict(network.state_dict())
        wanted = timms((torch.from_numpy(pixels) / 255 - mean) / std).softmax(1).numpy()
    off = 1e-5 if precision == "fp32" else 0.02
    for count in (1, 2, 3, 5):
        found = classifier.classify(pixels[:count], embeddings=True)
        assert found.scores == pytest.approx(wanted[:count], abs=off), f"{count} images"
        assert found.embedding is not None
        assert found.embedding.shape == (count, classifier.embedding_width)
