"""The final layer alone gives a network's logits, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imgcls.errors import BundleError
from imgcls.models import linear_head, zoo
from imgcls.models.bundle import BundleSpec, load_bundle, save_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.linear_head import load_linear_head


def save(folder: Path, name: str, options: dict[str, Any] | None = None) -> Path:
    architecture = zoo.resolve_architecture(name, options)
    torch.manual_seed(0)
    weights = zoo.build_network(architecture, 3).state_dict()
    spec = BundleSpec(
        architecture=architecture,
        classes=["a", "b", "c"],
        preprocess=zoo.get_default_preprocess(architecture),
    )
    save_bundle(str(folder), spec, weights)
    return folder


@pytest.mark.parametrize(
    "name",
    ["small_cnn", "resnet18", "mobilenet_v3_small", "timm:vit_tiny_patch16_224"],
)
def test_the_layer_gives_the_scores_of_the_network(tmp_path: Path, name: str) -> None:
    bundle = load_bundle(str(save(tmp_path / "b", name)))
    head = load_linear_head(bundle)
    classifier = Classifier(bundle, precision="fp32", device="cpu")
    crop = bundle.spec.preprocess.crop
    pixels = torch.randint(0, 256, (5, 3, crop, crop), dtype=torch.uint8)
    found = classifier.classify(pixels, embeddings=True)
    assert found.embedding is not None
    logits = F.linear(torch.from_numpy(found.embedding), head.weight, head.bias)
    torch.testing.assert_close(logits.softmax(1).detach().numpy(), found.scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["squeezenet1_1", "timm:levit_128s"])
def test_networks_of_which_the_layer_is_not_enough_are_refused(tmp_path: Path, name: str) -> None:
    bundle = load_bundle(str(save(tmp_path / "b", name)))
    with pytest.raises(BundleError, match="are not computed by one linear layer"):
        load_linear_head(bundle)


def test_the_layer_of_a_backbone_is_checked_with_other_weights_than_its_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BundleSpec(
        architecture=zoo.resolve_architecture("small_cnn", {"width": 8}),
        classes=[],
        preprocess=zoo.get_default_preprocess(zoo.resolve_architecture("small_cnn")),
    )
    network = zoo.build_network(spec.architecture, spec.num_outputs)
    head: Any = zoo.find_head(network)[1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    save_bundle(str(tmp_path), spec, network.state_dict())
    bundle = load_bundle(str(tmp_path), needs_classes=False)
    assert not load_linear_head(bundle).weight.any(), "the weights are as they were"

    class Doubled(nn.Module):
        """Logits that are no linear layer of the embedding."""

        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.inner = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(images)
            return 2 * logits

    load = linear_head.load_network
    monkeypatch.setattr(linear_head, "load_network", lambda *args: Doubled(load(*args)).eval())
    with pytest.raises(BundleError, match="are not computed"):
        load_linear_head(bundle)
