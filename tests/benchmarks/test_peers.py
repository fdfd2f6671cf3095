"""Peers: the names of Hugging Face's ResNet are those of torchvision's, entry by entry."""

from __future__ import annotations

import pytest

from benchmarks.peers import _find_torchvision_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet.embedder.embedder.convolution.weight", "conv1.weight"),
        ("resnet.embedder.embedder.normalization.running_var", "bn1.running_var"),
        ("resnet.encoder.stages.0.layers.1.layer.0.convolution.weight", "layer1.1.conv1.weight"),
        ("resnet.encoder.stages.3.layers.0.layer.2.normalization.bias", "layer4.0.bn3.bias"),
        (
            "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight",
            "layer2.0.downsample.0.weight",
        ),
        (
            "resnet.encoder.stages.1.layers.0.shortcut.normalization.running_mean",
            "layer2.0.downsample.1.running_mean",
        ),
        ("classifier.1.bias", "fc.bias"),
    ],
)
def test_entries_of_hugging_face_have_a_name_in_torchvision(name: str, expected: str) -> None:
    assert _find_torchvision_name(name) == expected
